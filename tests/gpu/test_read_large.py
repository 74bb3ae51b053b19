"""On a GPU: caches of which no 32-bit number reaches the end, read as small ones are."""

import pytest

from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from tests.cases.gpu import DEVICE, HAS_GPU

pytestmark = pytest.mark.gpu


@pytest.mark.xdist_group("large")  # one at a time: GBs each
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_offsets_beyond_32_bits(kv_cache_dtype):
    """Two blocks at the ends of a cache of more than 2³² elements give what they give in a small one."""
    import torch

    import torchkv

    num_blocks = 2**32 // (16 * 4 * 128) + 64 if HAS_GPU else 64
    dtype = torch.bfloat16 if kv_cache_dtype == "auto" else torch.uint8
    cache = torch.zeros((num_blocks, 16, 2, 2, 128), dtype=dtype, device=DEVICE)
    tables = torch.tensor([[num_blocks - 1, num_blocks // 2 + 1]], device=DEVICE, dtype=torch.int32)
    slots = (tables.long()[0, :, None] * 16 + torch.arange(16, device=DEVICE)).flatten()
    lens = torch.tensor([32], device=DEVICE, dtype=torch.int32)
    key, value = torch.randn((2, 32, 2, 128), device=DEVICE, dtype=torch.bfloat16)
    query = torch.randn((1, 4, 128), device=DEVICE, dtype=torch.bfloat16)
    options = {"kv_cache_dtype": kv_cache_dtype, "layout": "block slot kv head dim"}
    torchkv.reshape_and_cache_flash_diffkv(key, value, cache, slots, **options)
    small, first_two = cache[tables[0].long()].contiguous(), torch.tensor([[0, 1]], device=DEVICE)
    out = torchkv.paged_attention(query, cache, tables, lens, **options)
    assert out.abs().max() > 0
    assert torch.equal(out, torchkv.paged_attention(query, small, first_two, lens, **options))
    for got, want in zip(
        torchkv.gather_kv(cache, tables, lens, 32, **options),
        torchkv.gather_kv(small, first_two, lens, 32, **options),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.xdist_group("large")  # one at a time: GBs each
@pytest.mark.parametrize(
    ("pattern", "kv_cache_dtype"),
    [("PALLAS", "auto"), ("PALLAS", "fp8"), ("PALLAS", "nvfp4"), ("head dim block slot", "fp8")],
)
def test_heads_beyond_32_bits(pattern, kv_cache_dtype):
    """Heads, or their elements, that lie more than 2³² bytes apart give what they give in a small cache."""
    import torch

    import torchkv

    stored, layout = KV_CACHE_DTYPES[kv_cache_dtype], CacheLayout.of(pattern)
    units = stored_size(stored, 128)
    dtype = torch.bfloat16 if stored is None else torch.uint8
    apart = 2**32 if pattern == "PALLAS" else 2**25 + 2**19  # which 127 elements make more than 2³² of
    far = apart // (16 * (units if pattern == "PALLAS" else 1) * dtype.itemsize) + 64 if HAS_GPU else 64
    key, value = torch.randn((2, 32, 2, 128), device=DEVICE, dtype=torch.bfloat16)
    query = torch.randn((1, 4, 128), device=DEVICE, dtype=torch.bfloat16)
    scale = None if stored is None else torch.tensor([0.01, 0.02], device=DEVICE)
    options = {"kv_cache_dtype": kv_cache_dtype, "k_scale": scale, "v_scale": scale, "layout": layout}
    results = []
    for num_blocks, blocks in ((far, [far - 1, far // 2 + 1]), (2, [0, 1])):
        shapes = layout.shapes(num_blocks=num_blocks, block_size=16, num_heads=2, head_size=units)
        caches = tuple(torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in shapes)
        tables = torch.tensor([blocks], device=DEVICE, dtype=torch.int32)
        slots = (tables.long()[0, :, None] * 16 + torch.arange(16, device=DEVICE)).flatten()
        lens = torch.tensor([32], device=DEVICE, dtype=torch.int32)
        torchkv.reshape_and_cache_flash(key, value, *caches, slots, **options)
        out = torchkv.paged_attention(query, caches, tables, lens, **options)
        results.append((out, *torchkv.gather_kv(caches, tables, lens, 32, head_size=128, **options)))
        del caches
    assert results[0][0].abs().max() > 0
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
