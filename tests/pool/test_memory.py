"""Caches that are as large as memory allows: as many blocks as fit, whose arrays have the bytes that were counted."""

import re
from itertools import product

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import jaxkv
import torchkv
from kvcore.fitting import blocks_that_fit
from kvcore.formats import KV_CACHE_DTYPES, PER_TOKEN_HEAD
from kvcore.layout import CONSTANTS
from kvcore.nbytes import bytes_of, readable

HEADS = {"block_size": 4, "num_heads": 2, "head_size": 32}
ROWS = {"block_size": 4, "num_heads": 1, "head_size": 576, "head_size_v": 512, "layout": "MLA"}
CASES = [
    {**(ROWS if layout == "MLA" else HEADS), "layout": layout, "kv_cache_dtype": kv_cache_dtype, "num_layers": 3}
    for layout, kv_cache_dtype in product(CONSTANTS, KV_CACHE_DTYPES)
    if (layout == "MLA" or kv_cache_dtype != "fp8_ds_mla") and (layout, kv_cache_dtype) != ("HEAD_MAJOR", "nvfp4")
]
CASES += [
    {**HEADS, "layout": layout, "kv_cache_dtype": kv_cache_dtype, "num_layers": 2, "per_token_head": True, **order}
    for layout, kv_cache_dtype, order in product(
        CONSTANTS, PER_TOKEN_HEAD, ({}, {"scale_layout": "layer head block slot"})
    )
    if layout != "MLA"
]
CASES += [{**HEADS, "layout": layout, "head_size_v": 16, "dtype": "float32"} for layout in ("PACKED_NHD", "NHD")]
CASES += [{**HEADS, "dtype": dtype} for dtype in ("float16", "float32")]
BOTH = pytest.mark.parametrize("module", [jaxkv, torchkv], ids=["jax", "torch"])


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def name(case):
    return "-".join(str(value) for value in case.values())


def bytes_in(cache):
    """Bytes of a cache's arrays, as the framework counts them. (Static scales are not its arrays.)"""
    arrays = [*cache.caches, *((cache.k_scale, cache.v_scale) if cache.spec.scale_layout else ())]
    return sum(array.nbytes for array in arrays)


@BOTH
@pytest.mark.parametrize("case", CASES, ids=name)
def test_as_many_blocks_as_fit(case, module):
    block = module.PagedKVCache.create(num_blocks=1, **case).nbytes
    for memory in (5 * block, 6 * block - 1):
        assert module.blocks_that_fit(memory, **case) == 5
        cache = module.PagedKVCache.create(memory=memory, **case)
        assert cache.num_blocks == 5
        assert cache.nbytes == bytes_in(cache) == 5 * block <= memory
        assert cache.spec == module.PagedKVCache.create(num_blocks=5, **case).spec
    assert bytes_in(module.PagedKVCache.create(num_blocks=7, **case)) == 7 * block


def test_a_known_size():
    llama = {"num_layers": 32, "block_size": 16, "num_kv_heads": 8, "head_size": 128}
    assert blocks_that_fit(131072 * 16 * 10, **llama) == 10
    int8 = {"kv_cache_dtype": "int8", "per_token_head": True}
    assert blocks_that_fit(32 * 2 * 8 * (128 + 4) * 16 * 10, **llama, **int8) == 10
    assert blocks_that_fit(32 * 2 * 8 * (128 + 4) * 16 * 10 - 1, **llama, **int8) == 9
    assert blocks_that_fit(0, **llama) == 0


@pytest.mark.parametrize("dtype", [
    "float32", jnp.float32, torch.float32, np.float32, np.dtype("float32"), jnp.zeros(1).dtype,
])  # fmt: skip
def test_dtypes_of_every_framework(dtype):
    assert blocks_that_fit(4 * 4 * 2 * 64 * 2, block_size=4, num_heads=2, head_size=64, dtype=dtype) == 1
    assert blocks_that_fit(4 * 4 * 2 * 64 * 2 - 1, block_size=4, num_heads=2, head_size=64, dtype=dtype) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, torch.bfloat16, np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16])
def test_bfloat16_of_every_framework(dtype):
    assert blocks_that_fit(4 * 4 * 2 * 64, block_size=4, num_heads=2, head_size=64, dtype=dtype) == 1


@BOTH
def test_memory_as_text(module):
    assert module.PagedKVCache.create(memory="1.5 KiB", dtype="float16", **HEADS).num_blocks == 1
    assert module.PagedKVCache.create(memory="2MiB", dtype="float16", **HEADS).num_blocks == 2048
    assert module.PagedKVCache.create(memory=np.int64(2048), dtype="float16", **HEADS).num_blocks == 2


@pytest.mark.parametrize(("text", "number"), [
    ("2GiB", 2**31), ("0.5 TiB", 2**39), ("1.1KiB", 1126), ("0MiB", 0), ("12345678.9 GiB", 13256071780604313),
])  # fmt: skip
def test_bytes_of_text(text, number):
    assert bytes_of("memory", text) == number


def test_readable_bytes_are_read_back():
    for number in (1024, 1536, 2**20 * 3, 2**30 * 5 // 2):
        assert bytes_of("memory", readable(number)) == number


# ---- what is refused

NEITHER = "num_blocks or memory must be given, and not both, got "
BAD = {
    "neither": ({}, TypeError, NEITHER + "neither"),
    "both": ({"num_blocks": 4, "memory": "2GiB"}, TypeError, NEITHER + "both: 4 and '2GiB'"),
    "too little": ({"memory": 1023}, ValueError, "memory must be at least 1024 bytes, which one block has, got 1023"),
    "none": ({"memory": 0}, ValueError, "memory must be at least 1024 bytes, which one block has, got 0"),
    "negative": ({"memory": -1}, ValueError, "memory must be at least 0, got -1"),
    "float": (
        {"memory": 2e9}, TypeError,
        "memory must be bytes, as an int or as text such as '2GiB', got 2000000000.0",
    ),
    "bool": ({"memory": True}, TypeError, "memory must be bytes, as an int or as text such as '2GiB', got True"),
    "unit": (
        {"memory": "2GB"}, ValueError, "memory must be a number of TiB, GiB, MiB or KiB, as '2GiB' is, got '2GB'",
    ),
    "no number": (
        {"memory": "-2GiB"}, ValueError, "memory must be a number of TiB, GiB, MiB or KiB, as '2GiB' is, got '-2GiB'",
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", BAD)
def test_no_cache(case, module):
    arguments, error, text = BAD[case]
    with says(error, text):
        module.PagedKVCache.create(**arguments, **HEADS)


def test_nothing_that_fits():
    with says(ValueError, "nbytes must be at least 0, got -1"):
        blocks_that_fit(-1, **HEADS)
    with says(ValueError, "nbytes must be a number of TiB, GiB, MiB or KiB, as '2GiB' is, got '2'"):
        blocks_that_fit("2", **HEADS)
    with says(TypeError, "dtype must be float32, bfloat16 or float16, the type of elements, got int8: what a "
              "quantised cache holds is kv_cache_dtype='int8'"):  # fmt: skip
        blocks_that_fit(2**20, **HEADS, dtype=jnp.int8)
