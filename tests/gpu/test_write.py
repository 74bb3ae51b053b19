"""On a GPU: the kernels through both frameworks, bit for bit the oracle's; streams, graphs, compilers, big offsets.

Compiling is what takes the time, so that the grids are thinner than the CPU tests', which run the same kernels in
Triton's interpreter. What the compiler makes of them is seen here: every pair of values of vLLM's grid, each layout
with a copy into a layer and with a conversion, each conversion in one layout, each pair of dtypes. Tests that share
kernels run in one process: they have an `xdist_group`.
"""

from itertools import islice, product

import numpy as np
import pytest

from tests.cases import gpu
from tests.cases.arrays import LAYOUTS, assert_equals_oracle, bits, make_case, run_jax, run_oracle, run_torch
from tests.cases.gpu import DEVICE, HAS_GPU, params
from tests.cases.layouts import VLLM
from tests.cases.write_grid import (
    BLOCK_SIZES,
    CONVERSIONS,
    DTYPES,
    HEAD_SIZES,
    KV_CACHE_DTYPES,
    SLOTS,
    grid_cases,
    layout_case,
)

pytestmark = pytest.mark.gpu

KERNELS = {"jax triton": run_jax, "torch triton": lambda case: run_torch(case, device="cuda")}
PORTABLE = {"jax xla": lambda case: run_jax(case, "xla"), "torch": lambda case: run_torch(case, "torch", "cuda")}
GPU_IMPLEMENTATIONS = KERNELS if HAS_GPU else {"all but the kernels": gpu.write}
ALL_IMPLEMENTATIONS = GPU_IMPLEMENTATIONS | (PORTABLE if HAS_GPU else {})


# Any two of the four values meet; each test has all three numbers of heads, with a number of tokens each.
GRID = [
    (head_size, block_size, DTYPES[(i + j) % 3], KV_CACHE_DTYPES[(i + 2 * j) % 3], (i + j) % 4)
    for (i, head_size), (j, block_size) in product(enumerate(HEAD_SIZES), enumerate(BLOCK_SIZES))
]


@pytest.mark.parametrize(
    ("head_size", "block_size", "dtype", "kv_cache_dtype", "first"), params(GRID, smoke=(GRID[0], GRID[10]))
)
def test_vllm_grid(head_size, block_size, dtype, kv_cache_dtype, first):
    for case in islice(grid_cases(head_size, block_size, dtype, kv_cache_dtype), first, None, 4):
        assert_equals_oracle(case, GPU_IMPLEMENTATIONS)


IN_LAYOUTS = [
    (layout, *conversion, layer)
    for layout, (i, conversion), layer in product(LAYOUTS, enumerate(CONVERSIONS.args[1]), (None, 2))
    if layout == "NHD" or (i, layer) in ((0, 2), (2, None))
]
IN_LAYOUTS += [(VLLM[name], *CONVERSIONS.args[1][0], 2) for name in ("LHBNC", "BLNHC", "BHLNC")]


@pytest.mark.parametrize(
    ("layout", "dtype", "cache_dtype", "kv_cache_dtype", "layer"),
    params(IN_LAYOUTS, smoke=[c for c in IN_LAYOUTS if c[0] in ("HEAD_MAJOR", "PACKED_NHD")]),
)
def test_layouts(layout, dtype, cache_dtype, kv_cache_dtype, layer):
    assert_equals_oracle(layout_case(layout, dtype, cache_dtype, kv_cache_dtype, layer), ALL_IMPLEMENTATIONS)


@pytest.mark.xdist_group("slots")
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PACKED_HND"])
def test_slots(layout, slots):
    assert_equals_oracle(make_case(np.random.default_rng(6), layout=layout, slots=slots), ALL_IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_casts_of_every_kind(dtype, cache_dtype):
    rng = np.random.default_rng(4)
    case = make_case(rng, num_tokens=33, head_size=128, dtype=dtype, cache_dtype=cache_dtype)
    assert_equals_oracle(case, ALL_IMPLEMENTATIONS)


@pytest.mark.xdist_group("scales")
@pytest.mark.parametrize("scales", [(None, None), (2.0, None), (1e-38, 1e38), (1e-40, 3e-45), (0.0, -0.25)])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_scales(kv_cache_dtype, scales):
    for dtype in ("float32", "bfloat16"):
        case = make_case(
            np.random.default_rng(9), dtype=dtype, kv_cache_dtype=kv_cache_dtype, num_tokens=64, num_blocks=16,
            head_size=256, scales=scales,
        )  # fmt: skip
        assert_equals_oracle(case, ALL_IMPLEMENTATIONS)


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_input_is_stored_as_it_is(stored):
    kv_cache_dtype = "fp8_e4m3" if "e4m3" in stored else "fp8_e5m2"
    case = make_case(np.random.default_rng(5), dtype=stored, cache_dtype=stored, kv_cache_dtype=kv_cache_dtype)
    assert_equals_oracle(case, ALL_IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("layout", "kv_cache_dtype"),
    [*product(["NHD"], KV_CACHE_DTYPES), *product(["HND", "HEAD_MAJOR", "PALLAS", "PACKED_NHD"], ["auto"])],
)
def test_many_tokens(layout, kv_cache_dtype):
    """Too many for the oracle: vectorised torch on the CPU stands in, which the CPU's tests hold to the oracle."""
    num_tokens, num_blocks = (5000, 700) if HAS_GPU else (50, 7)
    case = make_case(
        np.random.default_rng(2), layout=layout, num_tokens=num_tokens, num_heads=8, head_size=128,
        num_blocks=num_blocks, block_size=16, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    want = run_torch(case, "torch") if HAS_GPU else run_oracle(case)
    for name, run in GPU_IMPLEMENTATIONS.items():
        for got, cache in zip(run(case), want, strict=True):
            np.testing.assert_array_equal(bits(got), bits(cache), err_msg=name)


@pytest.mark.xdist_group("large")  # one at a time: GBs each
@pytest.mark.parametrize("layout", ["NHD", "PALLAS"])
def test_offsets_beyond_32_bits(layout):
    """A cache of more than 2³² elements; with heads outermost, already a row spans more than 2³¹."""
    import torch

    import torchkv
    from torchkv import CacheLayout

    num_blocks = 2**32 // (16 * 4 * 128) + 64 if HAS_GPU else 64
    (shape, _) = CacheLayout.of(layout).shapes(num_blocks=num_blocks, block_size=16, num_heads=4, head_size=128)
    caches = [torch.zeros(shape, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    key = torch.randint(1, 255, (6, 4, 128), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    slots = torch.tensor([0, 17, 16 * num_blocks - 1, 16 * num_blocks // 2, 16 * num_blocks, -1], device=DEVICE)
    torchkv.reshape_and_cache_flash(key, key, *caches, slots, "fp8", layout=layout)
    key = key.view(torch.uint8)
    for cache in caches:
        logical = cache if layout == "NHD" else cache.permute(1, 2, 0, 3)
        for i in range(4):
            slot = int(slots[i])
            assert (logical[slot // 16, slot % 16] == key[i]).all()
        assert sum(part.count_nonzero() for part in cache.view(-1).split(2**28)) == 4 * 4 * 128
