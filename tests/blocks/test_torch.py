"""torchkv.copy_blocks and zero_blocks: as ops, fake, compiled, exported, under vmap; methods of a cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torchkv
from kvcore.oracle import blocks as reference
from tests.cases.arrays import from_torch, random_bits, to_torch
from tests.cases.blocks import PAIRS, assert_same, make_blocks, run_oracle
from tests.cases.torch_compile import assert_no_copies, compiled_code
from torchkv._library import blocks as _library

BACKENDS = pytest.mark.parametrize("backend", ["torch", "interpret"])
INDICES = pytest.mark.parametrize("indices", [PAIRS["circle with branches"], [3, -1, 0, 7]], ids=["copy", "zero"])
KINDS = {
    "NHD": {}, "HEAD_MAJOR": {"layout": "HEAD_MAJOR"}, "PALLAS": {"layout": "PALLAS", "num_layers": 2},
    "one array": {"layout": "KV_NHD"}, "scales": {"kv_cache_dtype": "int8", "per_token_head": True},
    "one array, scales": {"layout": "PACKED_NHD", "kv_cache_dtype": "int8", "per_token_head": True},
}  # fmt: skip


def tensors(case):
    return [to_torch(array.copy()) for array in case.memory], to_torch(case.indices.copy())


def assert_bits(got, want):
    assert_same(list(map(from_torch, got)), want)


def op_arguments(case, memory, indices, backend=None):
    arrays, scales = memory[: len(case.caches)], memory[len(case.caches) :]
    padded = [*arrays, *[None] * (2 - len(arrays)), *(scales or [None, None])]
    return *padded, indices, case.layout.pattern, case.scale_layout, backend


@INDICES
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_opcheck(options, indices):
    case = make_blocks(np.random.default_rng(0), indices, **options)
    case.caches = [np.ones_like(cache) for cache in case.caches]  # it finds NaN unequal to itself
    case.scale_caches = [np.ones_like(cache) for cache in case.scale_caches]
    op = getattr(_library, case.name)
    assert set(torch.library.opcheck(op, op_arguments(case, *tensors(case))).values()) == {"SUCCESS"}


def test_schemas():
    caches = "Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor(c!)? k_scale_cache, Tensor(d!)? v_scale_cache"
    rest = "str? layout, str? scale_layout, str? backend) -> ()"
    assert str(_library.copy_blocks._schema) == f"torchkv::copy_blocks({caches}, Tensor pairs, {rest}"
    assert str(_library.zero_blocks._schema) == f"torchkv::zero_blocks({caches}, Tensor blocks, {rest}"


@INDICES
@BACKENDS
def test_in_place(backend, indices):
    case = make_blocks(np.random.default_rng(1), indices)
    memory, index = tensors(case)
    addresses = [tensor.data_ptr() for tensor in memory]
    case.call(torchkv, memory, index, backend=backend)
    assert [tensor.data_ptr() for tensor in memory] == addresses
    assert_bits(memory, run_oracle(case))
    assert_bits([index], [case.indices])


VIEWS = {
    "unbind(1)": lambda x: x[:1792].view(7, 2, 4, 2, 16).unbind(1),
    "heads in front": lambda x: x[:1792].view(2, 7, 2, 4, 16).transpose(2, 3).unbind(0),
    "unaligned": lambda x: (x[1:897].view(7, 4, 2, 16), x[900:1796].view(7, 4, 2, 16)),
    "a part of larger ones": lambda x: x[: 2 * 7 * 5 * 34].view(2, 7, 5, 2, 17)[:, :, 1:, :, 1:].unbind(0),
    "every other element": lambda x: x[:1792].view(7, 4, 2, 16, 2).unbind(4),
    "every other head": lambda x: x[:1792].view(7, 4, 4, 16).unflatten(2, (2, 2)).unbind(3),
}


@INDICES
@BACKENDS
@pytest.mark.parametrize("view", VIEWS)
def test_strided_caches(view, backend, indices):
    """Parts of one buffer, of which the rest stays as it is."""
    case, buffer = (
        make_blocks(np.random.default_rng(2), indices),
        random_bits(np.random.default_rng(3), (5000,), "int8"),
    )
    views = []
    for data in (buffer.copy(), buffer.copy()):
        whole = torch.from_numpy(data[: 2 * (data.size // 2)]).view(torch.bfloat16)
        views.append(VIEWS[view](whole))
    got, want = views
    case.caches = [from_torch(tensor).copy() for tensor in want]
    for tensor, array in zip(want, run_oracle(case), strict=True):
        tensor.view(torch.int16).copy_(to_torch(array).view(torch.int16))
    case.call(torchkv, list(got), to_torch(case.indices), backend=backend)
    assert_bits(got, run_oracle(case))
    a, b = (torch.tensor(tensors[0].untyped_storage().tolist()) for tensors in (got, want))
    assert torch.equal(a, b)


@BACKENDS
def test_autograd_is_told_that_the_caches_changed(backend):
    case = make_blocks(np.random.default_rng(3), PAIRS["swap"], dtype="float32", layout="KV_NHD")
    (cache,), pairs = tensors(case)
    loss = (torch.ones_like(cache, requires_grad=True) * cache).sum()
    torchkv.copy_blocks((cache,), pairs, layout="KV_NHD", backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_caches_that_require_gradients_are_refused():
    cache = torch.ones(3, 4, 1, 8, requires_grad=True)
    for name, index in (("copy_blocks", torch.tensor([[0, 1]])), ("zero_blocks", torch.tensor([1]))):
        with pytest.raises(NotImplementedError, match=f"torchkv.{name} is not differentiable"):
            getattr(torchkv, name)((cache, cache.detach().clone()), index)
        with torch.no_grad():
            getattr(torchkv, name)((cache, cache.detach().clone()), index)
    assert not cache[1].any()


def test_tensors_made_in_inference_mode():
    case = make_blocks(np.random.default_rng(4), PAIRS["tree"])
    with torch.inference_mode():
        memory, index = tensors(case)
        case.call(torchkv, memory, index, backend="interpret")
    assert_bits(memory, run_oracle(case))


def test_fake_tensors_need_no_memory():
    with FakeTensorMode():
        caches = [torch.empty(1 << 20, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        assert torchkv.copy_blocks(caches, torch.empty(1 << 20, 2, dtype=torch.int32, device="cuda")) is None
        assert torchkv.zero_blocks(caches, torch.empty(1 << 20, dtype=torch.int32, device="cuda")) is None


# ---- torch.compile, torch.export


@pytest.mark.usefixtures("compiler")
@INDICES
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_compiled_without_copies(options, indices):
    case = make_blocks(np.random.default_rng(5), indices, **options)
    memory, index = tensors(case)
    addresses = [tensor.data_ptr() for tensor in memory]
    assert_no_copies(compiled_code(lambda memory, index: case.call(torchkv, memory, index), memory, index))
    assert_bits(memory, run_oracle(case))
    assert [tensor.data_ptr() for tensor in memory] == addresses


@pytest.mark.usefixtures("compiler")
def test_compiled_with_two_views_of_one_tensor():
    case = make_blocks(np.random.default_rng(6), PAIRS["circle"])
    both = to_torch(np.stack(case.caches))
    code = compiled_code(lambda kv, index: torchkv.copy_blocks(kv.unbind(0), index), both, to_torch(case.indices))
    assert_no_copies(code)
    assert_bits(both.unbind(0), run_oracle(case))


@INDICES
def test_export(indices):
    case = make_blocks(np.random.default_rng(7), indices)

    class Step(torch.nn.Module):
        def forward(self, key_cache, value_cache, index):
            getattr(torchkv, case.name)((key_cache, value_cache), index)
            return index + 1

    memory, index = tensors(case)
    program = torch.export.export(Step(), (*memory, index))
    program.module()(*memory, index)
    assert_bits(memory, run_oracle(case))


# ---- vmap


@BACKENDS
@INDICES
@pytest.mark.parametrize("dim", [0, 2])
def test_vmap(dim, indices, backend):
    cases = [make_blocks(np.random.default_rng(seed), indices) for seed in range(3)]
    for shared in (False, True):
        batch = [to_torch(np.stack(x, axis=dim)) for x in zip(*(case.memory for case in cases), strict=True)]
        every = to_torch(cases[0].indices) if shared else torch.stack([to_torch(case.indices) for case in cases])

        def step(key_cache, value_cache, index):
            cases[0].call(torchkv, (key_cache, value_cache), index, backend=backend)

        torch.vmap(step, in_dims=(dim, dim, None if shared else 0), out_dims=None)(*batch, every)
        assert_bits(batch, [np.stack(x, axis=dim) for x in zip(*map(run_oracle, cases), strict=True)])


@BACKENDS
def test_vmap_of_pairs_alone_is_one_call_of_all(backend):
    case = make_blocks(np.random.default_rng(8), [[0, 1], [1, 2]])
    memory, _ = tensors(case)
    pairs = torch.tensor([[[0, 1], [1, 2]], [[2, 3], [5, 0]]])
    torch.vmap(lambda index: torchkv.copy_blocks(memory, index, backend=backend), in_dims=1, out_dims=None)(
        pairs.movedim(0, 1)
    )
    assert_bits(memory, run_oracle(replace(case, indices=pairs.flatten(0, 1).numpy())))
    with pytest.raises(ValueError, match="vmap must map all caches or none"):
        torch.vmap(lambda c: torchkv.zero_blocks((c, memory[1]), torch.tensor([1])), out_dims=None)(memory[0][None])


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
    rng = np.random.default_rng(9)
    cache = torchkv.PagedKVCache.create(**{"num_blocks": 7, "block_size": 4, "num_heads": 2, "head_size": 16} | options)
    memory = [random_bits(rng, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in cache._memory]
    for tensor, array in zip(cache._memory, memory, strict=True):
        tensor.untyped_storage().copy_(to_torch(array).untyped_storage())
    cache.copy_blocks(torch.tensor(PAIRS["circle with branches"]), backend=backend)
    cache.zero_blocks(torch.tensor([2, -1, 6]), backend=backend)
    scale_axes = [(options.get("scale_layout") or "block").split().index("block")] * 2
    if options.get("num_layers"):
        scale_axes = [1, 1]
    axes = [*(names.index(("block",)) for names in cache.spec.layout.arrays), *scale_axes][: len(memory)]
    reference.copy_blocks(memory, PAIRS["circle with branches"], axes)
    reference.zero_blocks(memory, [2, 6], axes)
    assert_bits(cache._memory, memory)
