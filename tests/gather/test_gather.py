"""gather_kv: both frameworks, portable and interpreted kernel, bit for bit the oracle's."""

import numpy as np
import pytest

from kvcore.layout import CONSTANTS as LAYOUTS
from tests.cases.arrays import to_torch
from tests.cases.gathers import assert_gathers, gather
from tests.cases.reads import make_read


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, layer):
    layers = None if layer is None else 3
    case = make_read(np.random.default_rng(0), layout=layout, dtype="bfloat16", num_layers=layers, layer=layer)
    assert_gathers(case, 23, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("cache_dtype", "kv_cache_dtype", "storage"),
    [
        ("float32", "auto", None),
        ("float16", "auto", None),
        ("bfloat16", "auto", None),
        (None, "fp8_e4m3", "uint8"),
        (None, "fp8_e4m3", "float8_e4m3fn"),
        (None, "fp8_e5m2", "uint8"),
    ],
)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR"])
def test_dtypes(layout, cache_dtype, kv_cache_dtype, storage, dtype):
    case = make_read(
        np.random.default_rng(1), layout=layout, cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype,
        storage=storage, head_size=24, scales=(0.37, 3.0),
    )  # fmt: skip
    assert_gathers(case, 19, dtype)


@pytest.mark.parametrize("max_len", [0, 1, 7, 50])
def test_lengths(max_len):
    assert_gathers(make_read(np.random.default_rng(2), seq_lens=(0, 1, 8, 33)), max_len, "float32")


def test_no_bits_are_touched():
    """NaN payloads and signs pass a gather that converts nothing."""
    rng = np.random.default_rng(3)
    case = make_read(rng, dtype="bfloat16")
    for cache in case.caches:
        cache.view(np.uint16)[...] = rng.integers(0, 2**16, cache.shape)
    assert_gathers(case, 19, "bfloat16")


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_fp8_number(kv_cache_dtype, dtype):
    case = make_read(
        np.random.default_rng(4), kv_cache_dtype=kv_cache_dtype, storage="uint8", block_size=16, seq_lens=(16,),
        num_heads=1, head_size=16, spare=0, scales=(1.0, 0.3),
    )  # fmt: skip
    for cache in case.caches:
        cache[...] = np.arange(256, dtype=np.uint8).reshape(cache.shape)
    assert_gathers(case, 16, dtype)


def test_entries_that_are_no_blocks_give_zeros():
    case = make_read(np.random.default_rng(5), seq_lens=(9, 19), kv_cache_dtype="fp8")
    case.block_tables[0, 1] = -1
    case.block_tables[1, 0] = 10**6
    case.options["k_scale"] = np.nan  # not even this gets there
    assert_gathers(case, 20, "bfloat16")


def test_default_dtypes():
    import torch

    import torchkv

    for kv_cache_dtype, cache_dtype, want in (("auto", "float16", torch.float16), ("fp8", None, torch.bfloat16)):
        case = make_read(np.random.default_rng(6), cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype)
        key, _ = gather(case, torchkv, lambda a: to_torch(a.copy()), lambda t: t, 5, None, "torch")
        assert key.dtype == want
