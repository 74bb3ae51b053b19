"""torchkv.swap_blocks: as an op, fake, compiled, exported, under vmap; strides; methods of a cache."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torchkv
from kvcore.oracle import blocks as reference
from tests.cases.arrays import from_torch, random_bits, to_torch
from tests.cases.blocks import assert_same
from tests.cases.swaps import PAIRS, make_swap, run_oracle
from tests.cases.torch_compile import assert_no_copies, compiled_code
from torchkv._library import swap as _library

BACKENDS = pytest.mark.parametrize("backend", ["torch", "interpret"])
KINDS = {
    "NHD": {}, "HEAD_MAJOR": {"layout": "HEAD_MAJOR"}, "PALLAS": {"layout": "PALLAS", "num_layers": 2},
    "one array": {"layout": "KV_NHD"}, "scales": {"kv_cache_dtype": "int8", "per_token_head": True},
    "one array, scales": {"layout": "PACKED_NHD", "kv_cache_dtype": "int8", "per_token_head": True},
}  # fmt: skip


def tensors(case):
    sides = [[to_torch(array.copy()) for array in side.memory] for side in (case.source, case.destination)]
    return *sides, to_torch(case.pairs.copy())


def assert_bits(got, want):
    assert_same(list(map(from_torch, got)), want)


def op_arguments(case, source, destination, pairs, backend=None):
    padded = []
    for memory in (source, destination):
        arrays, scales = memory[: len(case.source.caches)], memory[len(case.source.caches) :]
        padded += [*arrays, *[None] * (2 - len(arrays)), *(scales or [None, None])]
    return *padded, pairs, case.source.layout.pattern, case.source.scale_layout, backend


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_opcheck(options):
    case = make_swap(np.random.default_rng(0), PAIRS["no blocks"], **options)
    for side in (case.source, case.destination):
        side.caches = [np.ones_like(cache) for cache in side.caches]  # it finds NaN unequal to itself
        side.scale_caches = [np.ones_like(cache) for cache in side.scale_caches]
    found = torch.library.opcheck(_library.swap_blocks, op_arguments(case, *tensors(case)))
    assert set(found.values()) == {"SUCCESS"}


@BACKENDS
def test_in_place(backend):
    case = make_swap(np.random.default_rng(1), PAIRS["apart"])
    source, destination, pairs = tensors(case)
    addresses = [tensor.data_ptr() for tensor in destination]
    case.call(torchkv, source, destination, pairs, backend=backend)
    assert [tensor.data_ptr() for tensor in destination] == addresses
    assert_bits(destination, run_oracle(case))
    assert_bits([*source, pairs], [*case.source.memory, case.pairs])


VIEWS = {
    "unbind(1)": lambda x, n: x[: n * 256].view(n, 2, 4, 2, 16).unbind(1),
    "heads in front": lambda x, n: x[: n * 256].view(2, n, 2, 4, 16).transpose(2, 3).unbind(0),
    "unaligned": lambda x, n: (x[1 : n * 128 + 1].view(n, 4, 2, 16), x[n * 128 + 4 : n * 256 + 4].view(n, 4, 2, 16)),
    "every other element": lambda x, n: x[: n * 256].view(n, 4, 2, 16, 2).unbind(4),
    "elements in front": lambda x, n: x[: n * 256].view(2, n, 16, 4, 2).permute(0, 1, 3, 4, 2).unbind(0),
}


@BACKENDS
@pytest.mark.parametrize("views", [(a, b) for a in VIEWS for b in VIEWS if a != b], ids=" to ".join)
def test_strided_caches(views, backend):
    """Of the one in another order than of the other; parts of buffers, of which the rest stays as it is."""
    case, rng = make_swap(np.random.default_rng(2), PAIRS["no blocks"] + [[3, 10]]), np.random.default_rng(3)
    source, destination, want = (
        torch.from_numpy(random_bits(rng, (6000,), "int8").copy()).view(torch.bfloat16) for _ in range(3)
    )
    want.view(torch.int16).copy_(destination.view(torch.int16))
    ours, theirs, wanted = VIEWS[views[0]](source, 7), VIEWS[views[1]](destination, 11), VIEWS[views[1]](want, 11)
    case.source.caches, case.destination.caches = ([from_torch(t).copy() for t in side] for side in (ours, theirs))
    for tensor, array in zip(wanted, run_oracle(case), strict=True):
        tensor.view(torch.int16).copy_(to_torch(array).view(torch.int16))
    case.call(torchkv, list(ours), list(theirs), to_torch(case.pairs), backend=backend)
    assert torch.equal(destination.view(torch.int16), want.view(torch.int16))


@BACKENDS
def test_autograd_is_told_that_the_destination_changed(backend):
    case = make_swap(np.random.default_rng(4), PAIRS["apart"], dtype="float32", layout="KV_NHD")
    (source,), (destination,), pairs = tensors(case)
    for changed, kept in ((destination, source),):
        loss = (torch.ones_like(changed, requires_grad=True) * changed).sum()
        fine = (torch.ones_like(kept, requires_grad=True) * kept).sum()
        torchkv.swap_blocks((source,), (destination,), pairs, layout="KV_NHD", backend=backend)
        fine.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_caches_that_require_gradients_are_refused():
    cache, other = torch.ones(3, 4, 1, 8, requires_grad=True), torch.zeros(5, 4, 1, 8)
    pairs = torch.tensor([[0, 1]])
    for source, destination in ((cache, other), (other, cache)):
        with pytest.raises(NotImplementedError, match=r"torchkv.swap_blocks is not differentiable"):
            torchkv.swap_blocks((source,), (destination,), pairs, layout="PACKED_NHD")
    with torch.no_grad():
        torchkv.swap_blocks((cache,), (other,), pairs)
    assert other[1].all()


def test_fake_tensors_need_no_memory():
    with FakeTensorMode():
        caches, host = (
            [torch.empty(1 << 20, 16, 8, 128, dtype=torch.bfloat16, device=d) for _ in range(2)]
            for d in ("cuda", "cpu")
        )
        pairs = torch.empty(1 << 20, 2, dtype=torch.int32, device="cuda")
        assert torchkv.swap_blocks(caches, host, pairs) is None
        assert torchkv.swap_blocks(host, caches, pairs) is None


# ---- torch.compile, torch.export


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_compiled_without_copies(options):
    case = make_swap(np.random.default_rng(5), PAIRS["apart"], **options)
    source, destination, pairs = tensors(case)
    addresses = [tensor.data_ptr() for tensor in destination]
    code = compiled_code(lambda s, d, p: case.call(torchkv, s, d, p), source, destination, pairs)
    assert_no_copies(code)
    assert_bits(destination, run_oracle(case))
    assert [tensor.data_ptr() for tensor in destination] == addresses


def test_export():
    case = make_swap(np.random.default_rng(6), PAIRS["apart"])

    class Step(torch.nn.Module):
        def forward(self, source, destination, pairs):
            torchkv.swap_blocks(source, destination, pairs)
            return pairs + 1

    source, destination, pairs = tensors(case)
    program = torch.export.export(Step(), (source, destination, pairs))
    program.module()(source, destination, pairs)
    assert_bits(destination, run_oracle(case))


# ---- vmap


@BACKENDS
@pytest.mark.parametrize("dim", [0, 2])
def test_vmap(dim, backend):
    cases = [make_swap(np.random.default_rng(seed), PAIRS["apart"]) for seed in range(3)]
    for shared in (False, True):
        batch = [
            [to_torch(np.stack(x, axis=dim)) for x in zip(*(side.memory for side in sides), strict=True)]
            for sides in ([c.source for c in cases], [c.destination for c in cases])
        ]
        pairs = to_torch(cases[0].pairs) if shared else torch.stack([to_torch(case.pairs) for case in cases])
        torch.vmap(
            lambda s, d, p: cases[0].call(torchkv, s, d, p, backend=backend),
            in_dims=([dim] * 2, [dim] * 2, None if shared else 0), out_dims=None,
        )(*batch, pairs)  # fmt: skip
        assert_bits(batch[1], [np.stack(x, axis=dim) for x in zip(*map(run_oracle, cases), strict=True)])


@BACKENDS
def test_vmap_of_pairs_alone_is_one_call_of_all(backend):
    case = make_swap(np.random.default_rng(7), [[0, 1], [1, 2], [2, 3], [5, 0]])
    source, destination, pairs = tensors(case)
    torch.vmap(lambda p: case.call(torchkv, source, destination, p, backend=backend), in_dims=1, out_dims=None)(
        pairs.view(2, 2, 2).movedim(0, 1)
    )
    assert_bits(destination, run_oracle(case))
    with pytest.raises(ValueError, match="vmap must map all caches of destination, or none and none of source"):
        torch.vmap(lambda s: case.call(torchkv, (s, source[1]), destination, pairs), out_dims=None)(source[0][None])


# ---- PagedKVCache


@BACKENDS
@pytest.mark.parametrize("options", [
    {}, {"layout": "HND", "num_layers": 2}, {"layout": "PACKED_NHD", "head_size_v": 24},
    {"kv_cache_dtype": "nvfp4", "head_size": 32}, {"kv_cache_dtype": "int4", "per_token_head": True, "num_layers": 2},
    {"layout": "KV_NHD", "kv_cache_dtype": "int8", "per_token_head": True, "scale_layout": "head block slot"},
    {"layout": "MLA", "num_heads": 1, "head_size_v": 8},
    {"layout": "MLA", "num_heads": 1, "head_size": 576, "head_size_v": 512, "kv_cache_dtype": "fp8_ds_mla"},
    {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": 0.25},
], ids=str)  # fmt: skip
def test_a_cache(options, backend):
    rng = np.random.default_rng(8)
    cache = torchkv.PagedKVCache.create(**{"num_blocks": 7, "block_size": 4, "num_heads": 2, "head_size": 16} | options)
    host = cache.create_host(num_blocks=11)
    assert (host.num_blocks, host.spec.shapes) == (11, tuple(tuple(t.shape) for t in host.caches))
    if cache.spec.scale_layout is None and cache.k_scale is not None:  # its own, where the host can read with it
        assert host.k_scale is not cache.k_scale
        assert torch.equal(host.k_scale, cache.k_scale)
    same = cache.create_host(memory=cache.nbytes)
    assert same.spec == cache.spec
    assert not any(tensor.view(torch.uint8).any() for tensor in same._memory)
    memory = []
    for each in (cache, host):
        memory.append([random_bits(rng, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in each._memory])
        for tensor, array in zip(each._memory, memory[-1], strict=True):
            tensor.untyped_storage().copy_(to_torch(array).untyped_storage())
    axes = [names.index(("block",)) for names in cache.spec.layout.arrays]
    if cache.spec.scale_layout is not None:
        axes += [names.index(("block",)) for names in cache.spec.scale_layout.arrays]
        axes = axes if len(axes) == len(memory[0]) else [*axes, axes[-1]]
    cache.swap_blocks(host, torch.tensor(PAIRS["no blocks"]), backend=backend)
    host.swap_blocks(cache, torch.tensor([[2, 0], [10, 6], [-1, 3]]), backend=backend)
    reference.swap_blocks(memory[0], memory[1], PAIRS["no blocks"], axes)
    reference.swap_blocks(memory[1], memory[0], [[2, 0], [10, 6]], axes)
    assert_bits(cache._memory, memory[0])
    assert_bits(host._memory, memory[1])
