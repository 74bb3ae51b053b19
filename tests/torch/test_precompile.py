"""precompile: what it compiles serves the calls, and nothing runs or changes. Compiled for a GPU that is not here."""

import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import kvcore.run.compiler
import torchkv
import torchkv.ahead
from tests.cases.launches import replace, use_driver
from tests.cases.torch_fakes import (
    DIM,
    GROUP,
    HEADS,
    KERNELS,
    POISON,
    TOKENS,
    attention,
    flash,
    integers,
    pair,
    rows,
    tensors_on,
)
from torchkv._triton import launch as _launch


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver that loads what was compiled for an H100, which is the current GPU."""
    monkeypatch.setattr(torchkv.ahead, "_usual_device", lambda: torch.device("cuda", 0))
    return use_driver(monkeypatch, tmp_path / "cache")


@pytest.fixture
def gpu(driver, monkeypatch, seen):
    """Such a GPU whose compiler compiles nothing; calls of CPU tensors are launched there, to no effect.

    Attributes:
        compiled: Names of the kernels that were compiled, in order.
        started: What was started: names of kernels.
    """
    found = SimpleNamespace(compiled=[], started=[])

    def compile_kernel(kernel, target, pointers, aligned):
        assert target.arch == 90
        found.compiled.append(kernel.name)
        return SimpleNamespace(name=kernel.name, run=lambda *_: None, function=None, packed_metadata=None)

    def start(kernel, grid, arguments):
        found.started.append(kernel.compiled.name)

    runner = _launch.INTERPRETED._replace(start=start, address=torch.Tensor.data_ptr)
    monkeypatch.setattr(kvcore.run.compiler, "compile_kernel", compile_kernel)
    replace(monkeypatch, load=_launch.load, target=_launch.target, ON_GPU=runner)
    return found


@pytest.mark.parametrize("device", ["cuda", "meta", "cpu"])
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.__name__)
def test_a_call_compiles_nothing_afterwards(case, device, gpu, monkeypatch):
    kernels = KERNELS[case]
    op, arguments, options = case(tensors_on(device))
    if device == "cpu":  # as if real tensors were on the GPU
        monkeypatch.setattr(torchkv._library.base, "_launches_kernels", lambda call: True)
    assert torchkv.precompile(op, *arguments, **options) == kernels == len(gpu.compiled)
    assert gpu.started == []
    of_ahead = list(gpu.compiled)
    op, arguments, options = case(tensors_on("cpu"))
    op(*arguments, **options)
    assert len(gpu.started) == kernels
    assert set(gpu.started) == set(of_ahead)
    assert gpu.compiled == of_ahead


def test_calls_of_other_shapes_and_places_compile_their_own(gpu):
    for tokens in (3, 5):  # of a write, any number is the same
        _, key, value = rows(tensors_on("meta"), tokens)
        call = (key, value, *pair(tensors_on("meta")), integers(tensors_on("meta"), tokens))
        assert torchkv.precompile(torchkv.reshape_and_cache_flash, *call) == 1
        assert len(gpu.compiled) == 1
    key = tensors_on("meta")(TOKENS, HEADS, DIM)  # other strides, and a beginning that is a multiple of 16
    torchkv.precompile(torchkv.reshape_and_cache_flash, key, key, *call[2:4], integers(tensors_on("meta"), TOKENS))
    assert len(gpu.compiled) == 2


# ---- a whole step


def make_cache(device, **options):
    cache = torchkv.PagedKVCache.create(
        **(dict(num_blocks=6, block_size=4, num_heads=HEADS, head_size=DIM, dtype="float32", num_layers=2) | options),
        device=device,
    )
    for tensor in cache.caches:
        tensor.fill_(POISON)
    return cache


class Step(torch.nn.Module):
    """A layer of a model, with its weights and a cache of its own or of somebody else."""

    def __init__(self, device, cache=None):
        super().__init__()
        self.qkv = torch.nn.Linear(DIM, HEADS * (GROUP + 2) * DIM, device=device)
        self.register_buffer("cos_sin", torch.ones(8, DIM, device=device))
        self.cache = cache

    def forward(self, hidden, positions, slots, tables, lens, cache=None):
        cache = cache or self.cache
        qkv = self.qkv(hidden).unflatten(1, (-1, DIM))
        query, key, value = qkv.split((HEADS * GROUP, HEADS, HEADS), 1)
        query = cache.rope_and_cache(query, key, value, positions, self.cos_sin, slots, layer=1, out=query)
        hidden.add_(cache.attend(query, tables, lens, layer=1).mean(1))
        return hidden


def step_inputs(make, batch):
    return make(batch, DIM), *(integers(make, batch) for _ in range(2)), integers(make, batch, 3), integers(make, batch)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_compiles_nothing_afterwards(mode, gpu):
    with mode():
        _check_step(gpu)


def _check_step(gpu):
    step, cache = Step("meta"), make_cache("meta")
    for batch in (1, 3):
        assert torchkv.precompile(step, *step_inputs(tensors_on("meta"), batch), cache=cache) == 2
    compiled = list(gpu.compiled)
    step, cache = Step("cpu"), make_cache("cpu")
    for batch in (1, 3):
        step(*step_inputs(tensors_on("cpu"), batch), cache)
    assert gpu.compiled == compiled
    assert len(gpu.started) == 4
    *inputs, tables, lens = step_inputs(tensors_on("cpu"), 1)
    step(*inputs, tables.expand(1, 3).repeat(1, 200), lens, cache)
    assert len(gpu.compiled) > len(compiled)


@torch.no_grad()
def test_triton_compiles_each_kernel_of_a_step_once(driver):
    """For real, and in threads that ask for the same at once."""
    step, cache = Step("meta"), make_cache("meta")
    inputs = step_inputs(tensors_on("meta"), 1)

    def one(_):
        with torch.no_grad():
            return torchkv.precompile(step, *inputs, cache=cache)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [2] * 4
    assert len(driver.loaded) == len(set(driver.loaded)) == len(_launch._kernels) == 2


# ---- nothing is written


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_written(mode):
    with mode():
        _check_nothing_is_written()


def _check_nothing_is_written():
    cache = make_cache("cpu")
    step, inputs = Step("cpu", cache), step_inputs(tensors_on("cpu"), 2)
    before = [t.clone() for t in (*step.parameters(), *step.buffers(), *inputs)]
    versions = [] if torch.is_inference_mode_enabled() else [t._version for t in cache.caches]
    for function, arguments in (
        (step, inputs),
        (functools.partial(step, *inputs[:2]), inputs[2:]),
        (step.forward, inputs),
        (lambda: step(*inputs), ()),
        (cache.write, (*rows(tensors_on("cpu"))[1:], integers(tensors_on("cpu"), TOKENS))),
    ):
        options = {"layer": 0} if function == cache.write else {}
        assert torchkv.precompile(function, *arguments, **options) == 0
    assert all((tensor == POISON).all() for tensor in cache.caches)
    assert all(map(torch.equal, (*step.parameters(), *step.buffers(), *inputs), before))
    assert not versions or [t._version for t in cache.caches] == versions
    assert not any(isinstance(t, FakeTensor) for t in (*cache.caches, *step.parameters()))
    inputs[1].fill_(0), inputs[2].fill_(3), inputs[3].fill_(0), inputs[4].fill_(2)
    step(*inputs)
    assert not all((tensor == POISON).all() for tensor in cache.caches)


@pytest.mark.parametrize(
    "change",
    [
        lambda counter: counter.add_(1),  # torch's own fake mode runs it, for want of another tensor
        lambda counter: torch.mul(counter, 2, out=counter),
        lambda counter: counter.__setitem__(0, 5),
        lambda counter: counter.copy_(torch.tensor([8, 9])),
    ],
)
def test_what_a_step_counts_elsewhere_is_not_changed(change):
    counter = torch.tensor([3, 4])
    parameter = torch.nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
    assert torchkv.precompile(lambda: (change(counter), change(parameter))) == 0
    assert counter.tolist() == parameter.tolist() == [3, 4]
    assert torchkv.precompile(lambda: torch.tensor(2).item()) == 0  # a number that is known


def test_tensors_on_meta_stay_what_they_are():
    weight = torch.nn.Parameter(torch.empty(3, DIM, device="meta"), requires_grad=False)
    assert torchkv.precompile(lambda x: x + weight, weight) == 0
    assert weight.device.type == "meta"
    assert weight.data_ptr() == 0


# ---- what runs instead of what was asked for


@torch.no_grad()
def test_functions_of_torch_compile_are_not_compiled_by_torch(gpu):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(Step("meta"), backend="eager")
    assert torchkv.precompile(compiled, *step_inputs(tensors_on("meta"), 1), cache=make_cache("meta")) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_fake_tensors_elsewhere_compile_nothing(gpu):
    op, arguments, options = flash(tensors_on("meta"))
    for _ in range(2):
        assert torchkv.precompile(op, *arguments, **options) == 1
        with pytest.raises(ValueError, match="must have shape"):
            torchkv.precompile(op, *arguments[:4], torch.empty((2, 2), dtype=torch.int32, device="meta"))
    gpu.compiled.clear()
    op, arguments, options = attention(tensors_on("cuda"))
    op(*arguments, **options)
    assert gpu.compiled == []


def test_the_mode_of_fake_tensors(gpu):
    op, arguments, options = attention(tensors_on("cuda"))

    def attend(*arguments):
        return op(*arguments, **options | {"sinks": options["sinks"] * 2})

    assert torchkv.precompile(attend, *arguments) == 1


def test_backends_without_kernels(gpu):
    op, arguments, options = flash(tensors_on("cuda"), backend="torch")
    assert torchkv.precompile(op, *arguments, **options) == 0


# ---- errors


@pytest.mark.parametrize(
    "change",
    [
        lambda key, value, k, v, slots: (key, value[:2], k, v, slots),
        lambda key, value, k, v, slots: (key.double(), value, k, v, slots),
        lambda key, value, k, v, slots: (key, value, k, v, slots.float()),
        lambda key, value, k, v, slots: (key, value, k, k, slots),
        lambda key, value, k, v, slots: (key, value, k, v, slots, "fp9"),
        lambda key, value, k, v, slots: (key, value, k, v, slots.tolist()),
    ],
)
def test_errors_are_those_of_the_call(change):
    op, arguments, _ = flash(tensors_on("cpu"))
    arguments = change(*arguments)
    with pytest.raises((ValueError, TypeError)) as call:
        op(*arguments)
    with pytest.raises(call.type) as ahead:
        torchkv.precompile(op, *arguments)
    assert str(ahead.value) == str(call.value)


def test_results_that_overlap_inputs():
    op, (query, *rest), options = attention(tensors_on("cpu"))
    query = query.contiguous()
    torchkv.precompile(op, query, *rest, **options, out=query.clone())
    with pytest.raises(ValueError, match="out and query must not overlap in memory"):
        torchkv.precompile(op, query, *rest, **options, out=query)


@pytest.mark.parametrize("device", ["cuda", "meta", "cpu"])
def test_a_merge(device, driver):
    make = tensors_on(device)
    outs, lses, out = make(2, TOKENS, HEADS, DIM), make(2, TOKENS, HEADS), make(TOKENS, HEADS, DIM)
    assert torchkv.precompile(torchkv.merge_attention, outs, lses, out=out) == 0
    with pytest.raises(ValueError, match="out and outs must not overlap in memory"):
        torchkv.precompile(torchkv.merge_attention, outs, lses, out=outs[1])


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        ("cpu", "triton", "backend 'triton' needs a CUDA or ROCm device, got cpu"),
        ("cuda", "interpret", "backend 'interpret' needs CPU tensors, got device cuda:0"),
    ],
)
def test_backends_that_the_device_lacks(device, backend, message, driver):
    op, arguments, options = flash(tensors_on(device), backend=backend)
    with pytest.raises(ValueError, match=message):
        torchkv.precompile(op, *arguments, **options)


def test_gradients_are_refused():
    op, arguments, options = attention(tensors_on("cpu"))
    with pytest.raises(NotImplementedError, match=r"torchkv\.paged_attention is not differentiable"):
        torchkv.precompile(op, torch.nn.Parameter(arguments[0]), *arguments[1:], **options)


@pytest.mark.parametrize(("function", "got"), [(None, "NoneType"), (3, "int"), (torch.ones(2), "Tensor")])
def test_what_cannot_be_called(function, got):
    with pytest.raises(TypeError, match=rf"^function must be callable, got {got}$"):
        torchkv.precompile(function, 1)


def test_python_that_depends_on_data():
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        torchkv.precompile(lambda lens: lens.max().item(), torch.ones(3))
