"""torchkv.slot_mapping as an op: opcheck, compilers, vmap, tensors for the result, launches."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jaxkv.slots
import torchkv
from jaxkv._triton import launch as jax_launch
from kvcore.run.compiler import compile_kernel, kernel_function
from tests.cases.arrays import to_torch
from tests.cases.launches import H100, OnHost, launch
from tests.cases.slots import make_slots
from torchkv._library import slots as _library
from torchkv._slots import SlotCall
from torchkv._triton import launches as _launches
from torchkv._triton.slots import Slots

CASES = {"ragged": {}, "decode": dict(query_lens=None, padding=1)}
EACH = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def tensors_of(case):
    return [None if a is None else to_torch(a) for a in (case.block_tables, case.query_start_loc, case.seq_lens)]


def arguments_of(case, backend=None):
    return *tensors_of(case), case.block_size, case.num_tokens, backend


def same(got, case):
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got, case.wanted)


@EACH
@pytest.mark.parametrize("backend", [None, "interpret"])
def test_opcheck(options, backend):
    case = make_slots(np.random.default_rng(0), **options)
    arguments = arguments_of(case, backend)
    assert set(torch.library.opcheck(_library.slot_mapping, arguments).values()) == {"SUCCESS"}
    out = torch.zeros(case.num_tokens, dtype=torch.int32)
    assert set(torch.library.opcheck(_library.slot_mapping_out, (out, *arguments)).values()) == {"SUCCESS"}


@EACH
def test_compiled_in_one_graph(options):
    case = make_slots(np.random.default_rng(1), **options)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda *x: torchkv.slot_mapping(*x, case.block_size, case.num_tokens), backend=counter, fullgraph=True
    )
    for seed in (1, 2):
        case = make_slots(np.random.default_rng(seed), **options)
        same(function(*tensors_of(case)), case)
    assert counter.frame_count == 1


def test_compiled_for_any_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")

    def step(tables, starts, lens, tokens):
        return torchkv.slot_mapping(tables, starts, lens, 4, tokens.shape[0])

    function = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    case = make_slots(np.random.default_rng(3))
    for case.num_tokens in (9, 11, 20):
        same(function(*tensors_of(case), torch.zeros(case.num_tokens)), case)
    assert counter.frame_count == 1


def test_exported():
    case = make_slots(np.random.default_rng(4))

    class Step(torch.nn.Module):
        def forward(self, *x):
            return torchkv.slot_mapping(*x, 4, case.num_tokens)

    program = torch.export.export(Step(), tuple(tensors_of(case)))
    same(program.module()(*tensors_of(case)), case)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, None, 1)], ids=str)
def test_vmap(dims):
    cases = [make_slots(np.random.default_rng(n)) for n in range(3)]
    for n, case in enumerate(cases):
        case.seq_lens = case.seq_lens + n
        first = cases[0]
        case.block_tables = case.block_tables if dims[0] is not None else first.block_tables
        case.seq_lens = case.seq_lens if dims[2] is not None else first.seq_lens
    given = []
    for tensors, dim in zip(zip(*map(tensors_of, cases), strict=True), dims, strict=True):
        given.append(tensors[0] if dim is None else torch.stack(tensors, dim))
    count = cases[0].num_tokens
    for got, case in zip(torch.vmap(lambda *x: torchkv.slot_mapping(*x, 4, count), dims)(*given), cases, strict=True):
        same(got, case)
    out = torch.zeros(3, count, dtype=torch.int32)
    torch.vmap(lambda o, *x: torchkv.slot_mapping(*x, 4, out=o) * 1, (0, *dims))(out, *given)
    for got, case in zip(out, cases, strict=True):
        same(got, case)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_into_a_given_tensor(backend):
    case = make_slots(np.random.default_rng(5), padding=2)
    memory = torch.full((case.num_tokens + 3,), 77, dtype=torch.int32)
    out = memory[1:-2]
    for count in (case.num_tokens, None):
        memory.fill_(77)
        got = torchkv.slot_mapping(*tensors_of(case), 4, count, out=out, backend=backend)
        assert got is out
        same(out, case)
        assert memory[[0, -2, -1]].tolist() == [77] * 3
    version = out._version
    torchkv.slot_mapping(*tensors_of(case), 4, out=out, backend=backend)
    assert out._version == version + 1


@pytest.mark.parametrize(
    ("out", "kind", "message"),
    [
        (torch.zeros(10, dtype=torch.int32), ValueError, "out must have shape (11,), got (10,)"),
        (torch.zeros(11, dtype=torch.int64), TypeError, "out must have dtype int32, got int64"),
        (torch.zeros(22, dtype=torch.int32)[::2], ValueError, "out must be contiguous, got strides (2,)"),
        (
            torch.zeros(11, dtype=torch.int32, device="meta"), ValueError,
            "out must be on device cpu, as block_tables, got meta",
        ),
        (None, ValueError, "out and block_tables must not overlap in memory"),
        (3, TypeError, "out must be a torch.Tensor, got 3"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_tensors_for_the_result(out, kind, message):
    case = make_slots(np.random.default_rng(6))
    tensors = tensors_of(case)
    if out is None:
        out = tensors[0].view(-1)[5:16]
    for backend in ("torch", "interpret"):
        with pytest.raises(kind) as error:
            torchkv.slot_mapping(*tensors, 4, 11, out=out, backend=backend)
        assert str(error.value) == message


def test_strided_tensors():
    case = make_slots(np.random.default_rng(7))
    tables, starts, lens = tensors_of(case)
    wide = torch.full((2 * tables.shape[0], 3 * tables.shape[1]), 10**6, dtype=torch.int32)
    wide[::2, 1::3] = tables
    both = torch.stack([starts[:-1], lens], 1)
    for backend in ("torch", "interpret"):
        given = wide[::2, 1::3], torch.cat([both[:, 0], starts[-1:]]), both[:, 1]
        same(torchkv.slot_mapping(*given, 4, case.num_tokens, backend=backend), case)
        same(torchkv.slot_mapping(tables.T.contiguous().T, starts, lens, 4, case.num_tokens, backend=backend), case)


# ---- launches


def test_calls_like_earlier_ones(seen):
    for options in CASES.values():
        for seed, dispatched in ((8, 1), (9, 0), (10, 0)):
            case = make_slots(np.random.default_rng(seed), **options)
            same(torchkv.slot_mapping(*arguments_of(case)[:-1]), case)
            assert seen.ways() == (dispatched, 1)
    kernels = len(seen.compiled)
    for case.num_tokens in (2, 3):  # is launched anew, with the kernel that there is
        same(torchkv.slot_mapping(*arguments_of(case)[:-1]), case)
        assert seen.ways() == (1, 1)
    assert {kernel for kernel, _ in map(str_of, seen.compiled[:kernels])} == {k for k, _ in map(str_of, seen.compiled)}
    out = torch.zeros(case.num_tokens, dtype=torch.int32)
    for dispatched in (1, 0):
        assert torchkv.slot_mapping(*arguments_of(case)[:-1], out=out) is out
        assert seen.ways() == (dispatched, 1)
        same(out, case)
    lens = to_torch(case.seq_lens)
    with pytest.raises(ValueError, match="out and seq_lens must not overlap"):
        torchkv.slot_mapping(*tensors_of(case)[:2], lens, 4, out=lens)
    seen.ways()
    case.num_tokens = 0
    same(torchkv.slot_mapping(*arguments_of(case)[:-1]), case)
    assert seen.ways() == (1, 0)


def str_of(compiled):
    kernel, aligned = compiled
    return str(kernel), str(sorted(aligned))


def test_unaligned_tensors_have_a_kernel_of_their_own(monkeypatch):
    host, slots = OnHost(monkeypatch), Slots()
    case = make_slots(np.random.default_rng(11))
    tables, starts, lens = tensors_of(case)
    call = SlotCall(tables, starts, lens, 4, case.num_tokens, None)
    same(launch(slots, call), case)
    shifted = torch.zeros(len(lens) + 1, dtype=torch.int32)[1:].copy_(lens)
    same(launch(slots, call._replace(seq_lens=shifted)), case)
    every = {"block_tables_ptr", "query_start_loc_ptr", "seq_lens_ptr", "slots_ptr"}
    assert [aligned for _, aligned in host.compiled] == [every, every - {"seq_lens_ptr"}]


@EACH
@pytest.mark.parametrize("many", [False, True])
def test_both_frameworks_launch_the_same(monkeypatch, options, many):
    seen = []

    def load(kernel, pointers, aligned):
        compile_kernel(kernel, H100, pointers, aligned)
        return kernel

    def start(kernel, grid, arguments):
        seen.append((kernel, grid, arguments))

    runner = _launches.ON_GPU._replace(start=start, empty=lambda *x: torch.zeros(x[0], dtype=x[2]))
    monkeypatch.setattr(_launches, "load", load)
    monkeypatch.setattr(_launches, "ON_GPU", runner)
    monkeypatch.setattr(_launches, "target", lambda: H100)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    case = make_slots(np.random.default_rng(12), **options)
    case.num_tokens += 20000 * many
    launch(Slots(), SlotCall(*arguments_of(case)))

    def in_jax(kernel, grid, arguments, target, out_type):
        seen.append(
            (kernel, grid, [a if a is None or isinstance(a, int) else "array" for a in [*arguments, *out_type]])
        )
        return [np.zeros(o.shape, o.dtype) for o in out_type]

    monkeypatch.setattr(jax_launch, "launch", in_jax)
    monkeypatch.setattr(
        jaxkv.slots.primitive, "slot_mapping",
        lambda options, operands: jax_launch.slot_mapping(options.describe(operands), operands, H100),
    )  # fmt: skip
    case.call(jaxkv.slot_mapping, lambda a: a)
    (kernel, grid, ours), (jax_kernel, jax_grid, theirs) = seen
    assert (kernel, grid) == (jax_kernel, jax_grid)
    names = kernel_function(kernel).arg_names
    assert set(names[len(ours) :]) == set(kernel.constexprs)
    for name, mine, other in zip(names, ours, theirs, strict=False):
        assert (isinstance(mine, int) and name not in kernel.scalars) if other == "array" else mine == other, name
