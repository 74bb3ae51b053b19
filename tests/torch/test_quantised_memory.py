"""Scales and elements that share memory, or lie where they cannot be read."""

import numpy as np
import pytest
import torch

import torchkv
from tests.cases.arrays import from_torch, random_bits, run_oracle, to_torch, with_case
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401
from tests.cases.torch_quantised import BACKENDS, inputs, latent_rows, memory_of, quantising
from torchkv._memory import share_elements


def floats_of(byte_cache, shape):
    """The first bytes of a cache, as a scale cache."""
    return byte_cache.flatten()[: 4 * np.prod(shape)].view(torch.float32).view(shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("share", "message"),
    [
        (lambda k, v, ks, vs: (k, k, ks, vs), "key_cache and value_cache must not overlap in memory"),
        (lambda k, v, ks, vs: (k, v, ks, ks), "k_scale_cache and v_scale_cache must not overlap in memory"),
        (
            lambda k, v, ks, vs: (k, v, floats_of(k, ks.shape), vs),
            "key_cache and k_scale_cache must not overlap in memory",
        ),
        (
            lambda k, v, ks, vs: (k, v, ks, floats_of(v, ks.shape)),
            "value_cache and v_scale_cache must not overlap in memory",
        ),
        (
            lambda k, v, ks, vs: (k, v, ks, vs[:1].expand_as(vs)),
            "v_scale_cache axis block with stride 0 puts its 6 elements in one place",
        ),
    ],
)
def test_memory_that_is_shared(share, message, backend, rng):
    case = quantising(rng)
    key, value, slots = inputs(case)
    memory = memory_of(case)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        torchkv.reshape_and_cache_flash_per_token_head_quant(
            key, value, *share(*memory), slots, "int8", backend=backend
        )
    assert str(error.value) == message
    assert_bits(memory, case.memory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_between_the_elements_of_caches(backend, rng):
    """One buffer for everything, as vLLM's per-token-head caches: a head's elements, then its scale."""
    case = quantising(rng)
    whole = to_torch(random_bits(rng, (2, 6, 4, 3, 16 + 4), "uint8"))
    caches = whole[..., :16].unbind()
    scales = whole.view(torch.float32)[..., 4].unbind()
    arrays = [from_torch(t).copy() for t in (*caches, *scales)]
    key, value, slots = inputs(case)
    torchkv.reshape_and_cache_flash_per_token_head_quant(key, value, *caches, *scales, slots, "int8", backend=backend)
    assert_bits((*caches, *scales), run_oracle(with_case(case, caches=arrays[:2], scale_caches=arrays[2:])))


def bytes_of(view):
    size = view.element_size()
    grids = np.indices(tuple(view.shape)).reshape(view.dim(), -1)
    first = view.storage_offset() + np.array(view.stride()) @ grids
    return set((size * first[:, None] + np.arange(size)).ravel().tolist())


def test_tensors_of_different_dtypes_share_bytes(rng):
    buffer, shared = torch.zeros(512, dtype=torch.uint8), 0
    for _ in range(300):
        a, b = (
            buffer.view(dtype).as_strided(rng.integers(1, 4, 2).tolist(), rng.integers(0, 9, 2).tolist(), int(offset))
            for dtype, offset in zip((torch.float32, torch.uint8), rng.integers(0, 40, 2), strict=True)
        )
        shares = bool(bytes_of(a) & bytes_of(b))
        assert share_elements(a, b) == share_elements(b, a) == shares
        shared += shares
    assert 30 < shared < 270


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_with_float32_scales_at_odd_addresses(offset, backend, rng):
    kv_c, k_pe, _, slots = latent_rows(rng, "fp8_ds_mla")
    memory = to_torch(random_bits(rng, (6 * 4 * 656 + 4,), "uint8"))
    before = from_torch(memory).copy()
    cache = memory[offset : offset - 4].view(6, 4, 656)
    message = "kv_cache must begin at a multiple of 4 bytes for kv_cache_dtype 'fp8_ds_mla', got address 0x"
    options = {"kv_cache_dtype": "fp8_ds_mla", "backend": backend}
    kv_c, k_pe, slots = map(to_torch, (kv_c, k_pe, slots))
    tables, lens = torch.tensor([[0, 1]]), torch.tensor([3])
    with pytest.raises(ValueError, match=message):
        torchkv.concat_and_cache_mla(kv_c, k_pe, cache, slots, **options)
    with pytest.raises(ValueError, match=message):
        torchkv.reshape_and_cache_flash_diffkv(kv_c[:, None], k_pe[:, None], cache, slots, **options)
    with pytest.raises(ValueError, match=message):
        torchkv.paged_attention(torch.zeros(1, 2, 576), cache, tables, lens, head_size_v=512, **options)
    with pytest.raises(ValueError, match=message):
        torchkv.gather_kv(cache, tables, lens, 3, head_size_v=512, **options)
    assert_bits([memory], [before])
