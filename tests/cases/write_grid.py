"""Writes that the CPU and the GPU tests share."""

import itertools

import numpy as np
import pytest

from tests.cases.arrays import make_case

# vLLM's own test grid for this kernel.
TOKENS, HEADS = (1, 7, 21, 42), (1, 4, 8)


HEAD_SIZES, BLOCK_SIZES = (64, 80, 120, 128, 256), (8, 16, 32)


DTYPES, KV_CACHE_DTYPES = ("bfloat16", "float16", "float32"), ("auto", "fp8_e4m3", "fp8_e5m2")


CONVERSIONS = pytest.mark.parametrize(
    ("dtype", "cache_dtype", "kv_cache_dtype"),
    [
        ("bfloat16", "bfloat16", "auto"),
        ("float32", "bfloat16", "auto"),
        ("float16", "float8_e4m3fn", "fp8"),
        ("float16", "float8_e5m2", "fp8_e5m2"),
        ("bfloat16", "uint8", "fp8_e5m2"),
    ],
)


def grid_cases(head_size, block_size, dtype, kv_cache_dtype):
    """A case for each number of tokens and of heads."""
    rng = np.random.default_rng([head_size, block_size, len(dtype)])
    for num_tokens, num_heads in itertools.product(TOKENS, HEADS):
        yield make_case(
            rng,
            num_tokens=num_tokens,
            num_heads=num_heads,
            head_size=head_size,
            num_blocks=-(-64 // block_size),
            block_size=block_size,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
        )


def layout_case(layout, dtype, cache_dtype, kv_cache_dtype, layer):
    return make_case(
        np.random.default_rng(1),
        layout=layout,
        head_size_v=24 if "PACKED" in layout else None,
        dtype=dtype,
        cache_dtype=cache_dtype,
        kv_cache_dtype=kv_cache_dtype,
        num_layers=None if layer is None else 3,
        layer=layer,
        slots=[3, -1, 39, 40, 0, 17, 16],
    )


SLOTS = {
    "all skipped": [-1] * 7,
    "far out of range": [-(2**62), -1, 40, 2**31 - 1, 2**31, 2**40, 2**62],
    "wrapping to a valid slot in 32 bits": [2**32 + 3, -(2**32) + 3, 2**33, 5, 2**32, 7, 2**32 - 1],
    "first and last": [0, 39, -1, 1, 38, 40, 8],
    "fewer than tokens": [5, 6, 33],
    "none": [],
}
