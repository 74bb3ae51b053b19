"""torchkv.PagedKVCache with quantised contents."""

import itertools
import re

import numpy as np
import pytest
import torch

import torchkv
from kvcore.oracle import read as reference_attention
from tests.cases.arrays import DTYPES, from_torch, random_normal, to_torch
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401
from tests.cases.torch_quantised import BACKENDS

TABLES, LENS = np.array([[7, 2, 9], [4, 11, -1]], np.int32), np.array([6, 3], np.int32)


SLOTS = np.array([28, 29, 30, 31, 8, 9, 16, 17, 18])  # 6 tokens of the first sequence, 3 of the second


def create(**options):
    defaults = {"num_blocks": 12, "block_size": 4, "num_heads": 2, "head_size": 32, "dtype": "float32"}
    return torchkv.PagedKVCache.create(**(defaults | options))


def assert_reads(cache, query, tables, lens, layer, **options):
    """attend and gather agree with the oracle on the cache's own memory."""
    arrays = [from_torch(c) for c in cache.caches]
    options |= {"kv_cache_dtype": cache.spec.kv_cache_dtype, "layout": cache.spec.layout, "layer": layer}
    options["head_size_v"] = cache.spec.head_size_v
    options |= {
        n: None if s is None else from_torch(s) for n, s in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale))
    }
    if cache.spec.layout.latent:
        options["v_scale"] = options["k_scale"]
    on_device = [to_torch(x) for x in (tables, lens)]
    want, _ = reference_attention.paged_attention(query, arrays, tables, lens, **options)
    np.testing.assert_allclose(cache.attend(to_torch(query), *on_device, layer=layer), want, atol=1e-5)
    want = reference_attention.gather_kv(
        arrays, tables, lens, 7, dtype=DTYPES["float32"], head_size=cache.spec.head_size, **options
    )
    assert_bits(cache.gather(*on_device, 7, dtype="float32", layer=layer), want)
    return want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_layout", [None, "head layer block slot"])
@pytest.mark.parametrize("layout", ["HND", "HEAD_MAJOR", "PACKED_NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e5m2", "int4"])
def test_cache_with_scale_caches(kv_cache_dtype, layout, scale_layout, backend, rng):
    options = {"per_token_head": True, "scale_layout": scale_layout, "num_layers": 3}
    cache = create(layout=layout, kv_cache_dtype=kv_cache_dtype, **options)
    shape = (2, 3, 12, 4) if scale_layout else (3, 12, 4, 2)
    for scale in (cache.k_scale, cache.v_scale):
        assert (tuple(scale.shape), scale.dtype, bool(scale.any())) == (shape, torch.float32, False)
    memory = (*cache.caches, cache.k_scale, cache.v_scale)
    assert cache.nbytes == sum(m.nbytes for m in memory)
    key, value = (random_normal(rng, (9, 2, 32), "float32") for _ in range(2))
    cache.write(to_torch(key), to_torch(value), to_torch(SLOTS), layer=1, backend=backend)
    assert all(a is b for a, b in zip(memory, (*cache.caches, cache.k_scale, cache.v_scale), strict=True))
    assert cache.k_scale.count_nonzero() == cache.v_scale.count_nonzero() == 9 * 2
    query = random_normal(rng, (2, 6, 32), "float32")
    got, _ = assert_reads(cache, query, TABLES, LENS, 1, scale_layout=scale_layout)
    bound = np.abs(key).max(-1, keepdims=True) / (14 if kv_cache_dtype == "int4" else 8) * (1 + 2e-7)
    assert (np.abs(got[0, :6] - key[:6]) <= bound[:6]).all()
    got, _ = assert_reads(cache, query, TABLES, LENS, 0, scale_layout=scale_layout)
    assert not got.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layout", ["HND", "PACKED_NHD", "MLA"])
def test_cache_with_scales_of_layers(layout, heads, backend, rng):
    """Those of the other layer would lose everything."""
    latent = layout == "MLA"
    scale = torch.tensor([[2.0**-5] * heads, [1e9] * heads, [2.0**-5] * heads])
    scale = scale[:, :1] if latent else scale
    sizes = {"num_heads": 1, "head_size": 48, "head_size_v": 32} if latent else {}
    scales = {"k_scale": scale} if latent else {"k_scale": scale, "v_scale": 2 * scale}
    cache = create(layout=layout, kv_cache_dtype="int8", num_layers=3, **scales, **sizes)
    key, value = (random_normal(rng, (9, 32) if latent else (9, 2, 32), "float32") for _ in range(2))
    value = value[:, :16] if latent else value
    query = random_normal(rng, (2, 6, 48 if latent else 32), "float32")
    for layer in (0, 2):
        cache.write(to_torch(key), to_torch(value), to_torch(SLOTS), layer=layer, backend=backend)
        got, _ = assert_reads(cache, query, TABLES, LENS, layer)
        want = np.concatenate([key, value], 1)[:, None] if latent else key
        np.testing.assert_allclose(got[0, :6], want[:6], rtol=0, atol=0.016)
    if not latent:
        cos_sin = torch.cat([torch.ones(1, 16), torch.zeros(1, 16)], 1)
        rows, places = (to_torch(x) for x in (query, key[:2], value[:2])), torch.zeros(2, dtype=torch.int32)
        cache.rope_and_cache(*rows, places, cos_sin, to_torch(SLOTS[:2]), rope="neox", layer=2, backend=backend)
        got, _ = assert_reads(cache, query, TABLES, LENS, 2)
        np.testing.assert_allclose(got[0, :2], key[:2], rtol=0, atol=0.016)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kv_cache_dtype", "layout"),
    [
        *itertools.product(["auto", "int8", "nvfp4", "fp8_ds_mla"], ["MLA", "block layer slot latent"]),
        ("int4", "slot block latent"),  # whose regions nvfp4 could not have: slots lie inside blocks there
        ("fp8_ds_mla", "slot block latent"),
    ],
)
def test_cache_of_rows(kv_cache_dtype, layout, backend, rng):
    rank, rope = (512, 64) if kv_cache_dtype == "fp8_ds_mla" else (32, 16)
    scale = {"int8": 0.05, "int4": 0.5, "nvfp4": 0.05}.get(kv_cache_dtype)
    layers = {"num_layers": 2} if "layer" in layout else {}
    sizes = {"num_heads": 1, "head_size": rank + rope, "head_size_v": rank}
    cache = create(layout=layout, kv_cache_dtype=kv_cache_dtype, k_scale=scale, **sizes, **layers)
    kv_c, k_pe = (random_normal(rng, (9, size), "float32") for size in (rank, rope))
    layer = 1 if layers else None
    cache.write(to_torch(kv_c), to_torch(k_pe), to_torch(SLOTS), layer=layer, backend=backend)
    query = random_normal(rng, (2, 6, rank + rope), "float32")
    key, value = assert_reads(cache, query, TABLES, LENS, layer)
    assert key.shape[-1] == rank + rope
    assert value.shape[-1] == rank
    tolerance = {"auto": 0, "int8": 0.026, "int4": 0.26, "nvfp4": 0.6, "fp8_ds_mla": 0.3}[kv_cache_dtype]
    np.testing.assert_allclose(key[0, :6, 0], np.concatenate([kv_c, k_pe], -1)[:6], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_scale": 0.5}, "k_scale must be None with per_token_head, which computes scales, got 0.5"),
        ({"v_scale": 0.5}, "v_scale must be None with per_token_head, which computes scales, got 0.5"),
        (
            {"per_token_head": False, "scale_layout": "head block slot"},
            "scale_layout must be None without per_token_head, got 'head block slot'",
        ),
        (
            {"per_token_head": False, "layout": "MLA", "num_heads": 1, "head_size_v": 16, "v_scale": 0.5},
            "v_scale must be None for layout 'block slot latent', where k_scale is for both, got 0.5",
        ),
    ],
    ids=str,
)
def test_caches_that_cannot_be(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        create(**({"kv_cache_dtype": "int8", "per_token_head": True} | options))
    assert str(error.value) == message


def test_rows_split_elsewhere():
    cache = create(layout="MLA", num_heads=1, head_size=48, head_size_v=32, kv_cache_dtype="int8")
    with pytest.raises(ValueError, match=re.escape("key must have shape (num_tokens, 32), got (2, 16)")):
        cache.write(torch.ones(2, 16), torch.ones(2, 32), torch.tensor([0, 1]))
    assert not cache.caches[0].any()
