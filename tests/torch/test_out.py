"""Results in tensors that the caller gives: `out` and `lse` of paged_attention, gather_kv and merge_attention."""

import numpy as np
import pytest
import torch

import torchkv
from tests.cases.arrays import to_torch
from tests.cases.torch_ops import gather_arguments as gather_op_arguments
from tests.cases.torch_results import (
    BACKENDS,
    READS,
    attend,
    gather_arguments,
    op_arguments,
    read_case,
    results_of,
    same,
)
from torchkv._library import read as _read_library


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", READS)
def test_attention_in_given_tensors(name, backend):
    case = read_case(name)
    want = attend(case, backend=backend)
    out, lse = results_of(case)
    versions = out._version, lse._version
    got = attend(case, backend=backend, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    same((out, lse), want)
    if out.numel():
        assert out._version > versions[0]
        assert lse._version > versions[1]

    only, _ = results_of(case)
    assert case.call(torchkv, to_torch, backend=backend, out=only) is only
    same([only], want[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in READS if n != "no tokens"])
def test_gather_in_given_tensors(name, backend):
    args, options = gather_arguments(read_case(name))
    want = torchkv.gather_kv(*args, **options, backend=backend)
    given = torch.full_like(want[0], 7), torch.full_like(want[1], 7)
    got = torchkv.gather_kv(*args, **options, backend=backend, out=given)
    assert got[0] is given[0]
    assert got[1] is given[1]
    same(given, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_tensors_may_be_parts_of_larger_ones_but_nothing_else_is_written(backend):
    """As a batch in a buffer for the largest batch, wherever it begins: four bytes after a multiple of 16, too."""
    case = read_case()
    want = attend(case, backend=backend)
    for offset in (0, 1, 4):
        memory, lse_memory = torch.full((4096,), 7.0), torch.full((512,), 7.0)
        out = memory[offset:][: want[0].numel()].view(want[0].shape)
        lse = lse_memory[offset:][: want[1].numel()].view(want[1].shape)
        attend(case, backend=backend, out=out, lse=lse)
        same((out, lse), want)
        assert (memory[:offset] == 7).all()
        assert (memory[offset + out.numel() :] == 7).all()
        assert (lse_memory[offset + lse.numel() :] == 7).all()


def test_the_methods_of_a_cache_hand_them_on():
    cache = torchkv.PagedKVCache.create(num_blocks=4, block_size=4, num_heads=2, head_size=8, dtype=torch.float32)
    key = torch.randn(3, 2, 8)
    cache.write(key, key, torch.arange(3))
    tables, lengths = torch.tensor([[0, 1]]), torch.tensor([3])
    out, lse, rows = torch.empty(1, 4, 8), torch.empty(1, 4), (torch.empty(1, 3, 2, 8), torch.empty(1, 3, 2, 8))
    query = torch.randn(1, 4, 8)
    assert cache.attend(query, tables, lengths, out=out, lse=lse) is out
    same((out, lse), cache.attend(query, tables, lengths, return_lse=True))
    assert cache.gather(tables, lengths, 3, out=rows)[0] is rows[0]
    same([rows[0][0]], [key])


# ---- what does not fit


def strided(tensor):
    return torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7, dtype=tensor.dtype)[..., ::2]


BAD = {
    "shape": (lambda o, s: (o[:3], s), ValueError, "out must have shape (4, 4, 32), got (3, 4, 32)"),
    "shape of lse": (lambda o, s: (o, s.T[:2]), ValueError, "lse must have shape (4, 4), got (2, 4)"),
    "dtype": (lambda o, s: (o.half(), s), TypeError, "out must have dtype float32, got float16"),
    "dtype of lse": (lambda o, s: (o, s.double()), TypeError, "lse must have dtype float32, got float64"),
    "gaps": (lambda o, s: (strided(o), s), ValueError, "out must be contiguous, got strides (256, 64, 2)"),
    "gaps of lse": (lambda o, s: (o, strided(s)), ValueError, "lse must be contiguous, got strides (8, 2)"),
    "order": (lambda o, s: (o, s.T), ValueError, "lse must be contiguous, got strides (1, 4)"),
    "no tensor": (lambda o, s: ([0.0], s), TypeError, "out must be a torch.Tensor, got list"),
    "no tensor for lse": (lambda o, s: (o, [0.0]), TypeError, "lse must be a torch.Tensor, got list"),
    "lse alone": (lambda o, s: (None, s), ValueError, "out must be given where lse is, got None"),
    "each other": (
        lambda o, s: (o, o.view(-1)[32:48].view(4, 4)), ValueError, "out and lse must not overlap in memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_results_that_do_not_fit(name, backend):
    change, kind, message = BAD[name]
    out, lse = change(*results_of(read_case()))
    with pytest.raises(kind) as error:
        attend(read_case(), backend=backend, out=out, lse=lse)
    assert str(error.value) == message
    if isinstance(out, torch.Tensor):
        assert (out == 7).all()


def test_results_that_share_memory_with_what_is_read():
    case = read_case()
    query, caches = to_torch(case.query), tuple(to_torch(c) for c in case.caches)
    tables, lengths = to_torch(case.block_tables), to_torch(case.seq_lens)
    for out, name in ((query, "query"), (caches[1].view(-1)[64:][: query.numel()].view(query.shape), "value_cache")):
        with pytest.raises(ValueError, match=f"^out and {name} must not overlap in memory$"):
            torchkv.paged_attention(query, caches, tables, lengths, layout="NHD", out=out)
    with pytest.raises(ValueError, match=r"^out\[1\] and key_cache must not overlap in memory$"):
        torchkv.gather_kv(
            caches, tables, lengths, 1, out=(torch.empty(4, 1, 2, 32), caches[0].view(-1)[:256].view(4, 1, 2, 32))
        )


@pytest.mark.parametrize(("out", "kind", "message"), [
    (lambda k, v: k, TypeError, "out must be two tensors, for key and value, got Tensor"),
    (lambda k, v: (k, None), TypeError, "out[1] must be a torch.Tensor, got NoneType"),
    (lambda k, v: (k[:2], v), ValueError, "out[0] must have shape (4, 21, 2, 32), got (2, 21, 2, 32)"),
    (lambda k, v: (k, v.half()), TypeError, "out[1] must have dtype float32, got float16"),
    (lambda k, v: (k, strided(v)), ValueError, "out[1] must be contiguous, got strides (2688, 128, 64, 2)"),
    (lambda k, v: (k, k), ValueError, "out[0] and out[1] must not overlap in memory"),
])  # fmt: skip
def test_gathers_that_do_not_fit(out, kind, message):
    args, options = gather_arguments(read_case())
    given = out(*(torch.zeros(4, 21, 2, 32) for _ in range(2)))
    with pytest.raises(kind) as error:
        torchkv.gather_kv(*args, **options, out=given)
    assert str(error.value) == message


def test_results_that_require_gradients():
    case = read_case()
    out, lse = results_of(case)
    with pytest.raises(NotImplementedError, match=r"^torchkv.paged_attention is not differentiable"):
        attend(case, out=out.requires_grad_(), lse=lse)
    with torch.no_grad():
        attend(case, out=out, lse=lse)
    args, options = gather_arguments(case)
    key, value = torchkv.gather_kv(*args, **options)
    with pytest.raises(NotImplementedError, match=r"^torchkv.gather_kv is not differentiable"):
        torchkv.gather_kv(*args, **options, out=(key, value.requires_grad_()))


# ---- on a GPU


# ---- transforms


def test_opcheck():
    arguments, results = op_arguments()
    checked = torch.library.opcheck(_read_library.attention_out, (*results, *arguments))
    assert set(checked.values()) == {"SUCCESS"}
    _, caches, tables, lengths, *_ = arguments
    rows = (torch.zeros(4, 6, 2, 32), torch.zeros(4, 6, 2, 32))
    gather = gather_op_arguments(caches, tables, lengths, 6)
    assert set(torch.library.opcheck(_read_library.gather_out, (*rows, *gather)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    case = read_case()
    query, caches = to_torch(case.query), tuple(to_torch(c) for c in case.caches)
    tables, lengths = to_torch(case.block_tables), to_torch(case.seq_lens)

    def step(query, caches, tables, lengths, out, lse, rows):
        torchkv.paged_attention(query * 2, caches, tables, lengths, out=out, lse=lse)
        torchkv.gather_kv(caches, tables, lengths, 6, out=rows)
        out.add_(1)
        other = torch.empty_like(out)
        torchkv.paged_attention(query, caches, tables, lengths, out=other)
        return other * 2

    def results():
        return (*results_of(case), (torch.full((4, 6, 2, 32), 7.0), torch.full((4, 6, 2, 32), 7.0)))

    want, got = results(), results()
    other = step(query, caches, tables, lengths, *want)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(query, caches, tables, lengths, *got), other)
    torch.testing.assert_close(got[:2], want[:2])
    same(got[2], want[2])


def test_compiled_calls_check_results_while_tracing():
    case = read_case()
    out, lse = results_of(case)
    with pytest.raises(Exception, match=r"out must have shape \(4, 4, 32\), got \(4, 4, 16\)"):
        torch.compile(lambda out: attend(case, out=out, lse=lse), backend="aot_eager")(out[..., :16].contiguous())


def test_vmapped():
    (query, caches, *rest), _ = op_arguments()
    queries = torch.stack([query, 2 * query])
    outs, lses = torch.zeros(2, *query.shape), torch.zeros(2, *query.shape[:2])

    def call(query, out, lse):
        _read_library.attention_out(out, lse, query, caches, *rest)
        return out

    torch.vmap(call)(queries, outs, lses)
    for i in range(2):
        same((outs[i], lses[i]), _read_library.attention(queries[i], caches, *rest))
    with pytest.raises(ValueError, match=r"^vmap must map the tensors that are given for results$"):
        torch.vmap(lambda query: call(query, outs[0], lses[0]))(queries)


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_given_tensors(dtype):
    torch.manual_seed(0)
    outs, lses = torch.randn(3, 4, 2, 8, dtype=dtype), torch.randn(3, 4, 2)
    lses[:, 1, 0] = -torch.inf
    want = torchkv.merge_attention(outs, lses)
    out, lse = torch.full((4, 2, 16), 7.0, dtype=dtype)[..., ::2], torch.full((2, 4), 7.0).T  # strided
    got = torchkv.merge_attention(outs, lses, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    same(got, want)
    only = torch.empty(4, 2, 8, dtype=dtype)
    same(torchkv.merge_attention(outs, lses, out=only), want)
    same([only], want[:1])

    def merge(outs, lses, out, lse):
        return torchkv.merge_attention(outs, lses, out=out, lse=lse)

    again = torch.empty_like(out), torch.empty_like(lse)
    torch.compile(merge, backend="aot_eager")(outs, lses, *again)
    torch.testing.assert_close(again, want)


@pytest.mark.parametrize(("change", "kind", "message"), [
    (lambda o, s: {"out": o[0, :2]}, ValueError, "out must have shape (4, 2, 8), got (2, 2, 8)"),
    (lambda o, s: {"lse": s[0].T}, ValueError, "lse must have shape (4, 2), got (2, 4)"),
    (lambda o, s: {"out": o[0].half()}, TypeError, "out must have dtype float32, got float16"),
    (lambda o, s: {"lse": s[0].double()}, TypeError, "lse must have dtype float32, got float64"),
    (lambda o, s: {"out": o[1]}, ValueError, "out and outs must not overlap in memory"),
    (lambda o, s: {"out": o[1].clone(), "lse": s[1]}, ValueError, "lse and lses must not overlap in memory"),
    (lambda o, s: {"out": np.zeros(3)}, TypeError, "out must be a torch.Tensor, got ndarray"),
    (lambda o, s: {"out": o[1].to("meta")}, ValueError, "out must be on device cpu, as outs, got meta"),
])  # fmt: skip
def test_merged_results_that_do_not_fit(change, kind, message):
    outs, lses = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
    with pytest.raises(kind) as error:
        torchkv.merge_attention(outs, lses, **change(outs, lses))
    assert str(error.value) == message


def test_merging_in_given_tensors_is_not_differentiable():
    outs, lses = torch.randn(3, 4, 2, 8, requires_grad=True), torch.randn(3, 4, 2)
    with pytest.raises(NotImplementedError, match=r"^torchkv.merge_attention with out or lse is not differentiable"):
        torchkv.merge_attention(outs, lses, out=torch.empty(4, 2, 8))
    torchkv.merge_attention(outs.detach(), lses, out=torch.empty(4, 2, 8))
