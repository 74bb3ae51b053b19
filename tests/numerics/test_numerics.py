"""Roundings, exhaustively: the oracle against ml_dtypes, and every implementation against the oracle."""

import ml_dtypes
import numpy as np
import pytest

from kvcore.formats import (
    BFLOAT16,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FLOAT16,
    FLOAT32,
    INT4,
    INT8,
    KV_CACHE_DTYPES,
    NVFP4,
    stored_size,
)
from kvcore.oracle import formats as reference
from tests.cases.arrays import DTYPES, Case, assert_equals_oracle, random_bits

FORMATS = {f.name: f for f in (FLOAT16, BFLOAT16, E4M3, E5M2, E4M3FNUZ, E5M2FNUZ)}
LARGEST = {f.name: f.largest for f in (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ)}


@pytest.mark.parametrize("name", FORMATS)
def test_oracle_rounds_as_ml_dtypes_does(name):
    """Where ml_dtypes overflows, and for NaN, the contract decides: see the next tests."""
    x = random_bits(np.random.default_rng(0), (1_000_000,), "float32")
    with np.errstate(all="ignore"):
        inside = np.clip(x, -LARGEST[name], LARGEST[name]) if name in LARGEST else x
        want = inside.astype(DTYPES[name]).view(f"uint{FORMATS[name].bits}")
    number = ~np.isnan(x)
    np.testing.assert_array_equal(reference.encode(x, FORMATS[name])[number], want[number])


@pytest.mark.parametrize(
    ("stored", "nan", "infinity"),
    [
        (FLOAT32, 0x7FC00000, 0x7F800000),
        (FLOAT16, 0x7E00, 0x7C00),
        (BFLOAT16, 0x7FC0, 0x7F80),
        (E4M3, 0x7F, 0x7E),
        (E5M2, 0x7F, 0x7B),
        (E4M3FNUZ, 0x80, 0x7F),
        (E5M2FNUZ, 0x80, 0x7F),
        (NVFP4, 7, 7),
    ],
)
def test_nan_and_infinity(stored, nan, infinity):
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert (reference.encode(nans, stored) == nan).all()
    top = 1 << (stored.bits - 1)
    np.testing.assert_array_equal(
        reference.encode(np.array([np.inf, -np.inf], np.float32), stored), [infinity, infinity | top]
    )


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (448, 0x7E), (464, 0x7E), (1e30, 0x7E), (-1e30, 0xFE),  # saturates
        (2.0**-9, 0x01), (2.0**-10, 0x00), (1.5 * 2.0**-10, 0x01), (1.5 * 2.0**-9, 0x02),  # ties to even
        (2.0**-6, 0x08), (0.0, 0x00), (-0.0, 0x80), (1.0, 0x38), (17, 0x58), (19, 0x5A),
    ],
)  # fmt: skip
def test_e4m3_by_hand(x, code):
    assert reference.encode(np.float32([x]), E4M3)[0] == code


@pytest.mark.parametrize(
    "kv_cache_dtype", ["auto", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8", "int4", "nvfp4"]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_everywhere(dtype, kv_cache_dtype):
    x = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(64, 4, 256)
    other = "float16" if dtype == "bfloat16" else "bfloat16"
    cache_dtype = other if kv_cache_dtype == "auto" else "uint8"
    scales = (None, None) if kv_cache_dtype == "auto" else (0.37, None)
    units = stored_size(KV_CACHE_DTYPES[kv_cache_dtype], 256)
    caches = [random_bits(np.random.default_rng(0), (4, 16, 4, units), cache_dtype) for _ in range(2)]
    slots = np.random.default_rng(1).permutation(64)
    assert_equals_oracle(Case(x, x[::-1].copy(), caches, slots, kv_cache_dtype, *scales))


@pytest.mark.parametrize(
    ("cache_dtype", "kv_cache_dtype"),
    [
        ("uint8", "fp8_e4m3"),
        ("uint8", "fp8_e5m2"),
        ("uint8", "fp8_e4m3fnuz"),
        ("uint8", "fp8_e5m2fnuz"),
        ("float16", "auto"),
        ("bfloat16", "auto"),
    ],
)
def test_float32_at_every_boundary_everywhere(cache_dtype, kv_cache_dtype):
    """Every number of the format, every midpoint between two, and their neighbours in float32."""
    quantised = KV_CACHE_DTYPES[kv_cache_dtype]
    name = cache_dtype if quantised is None else quantised.name
    numbers = reference._numbers(FORMATS[name])
    if len(numbers) > 1000:
        numbers = numbers[np.random.default_rng(0).integers(0, len(numbers) - 1, 2000)]
        numbers = np.sort(np.append(numbers, numbers[-1]))
    points = np.append(numbers, (numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(points, np.float32(np.inf)), points, np.nextafter(points, np.float32(-1))])
    near = np.concatenate([near, -near])
    rows = np.resize(near, (-(-near.size // 1024), 4, 256)).astype(np.float32)
    blocks = -(-len(rows) // 16)
    caches = [random_bits(np.random.default_rng(1), (blocks, 16, 4, 256), cache_dtype) for _ in range(2)]
    assert_equals_oracle(Case(rows, rows[::-1].copy(), caches, np.arange(len(rows)), kv_cache_dtype))


def test_ml_dtypes_knows_the_formats_constants():
    for stored in FORMATS.values():
        info = ml_dtypes.finfo(DTYPES[stored.name])
        assert (info.nmant, info.bits) == (stored.mantissa_bits, stored.bits)
        assert info.smallest_normal == 2.0 ** (1 - stored.bias)


def test_integers_are_the_nearest_even_one_of_two():
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -1e9, np.inf, -np.inf, np.nan])
    want = [0, 2, 2, 0, -2, -2, 126, 127, 127, -127, 127, -127, 0]
    assert reference.encode(x, INT8).view(np.int8).tolist() == want
    assert reference.encode(x, INT4).tolist() == [int(np.clip(w, -7, 7)) & 15 for w in want]


def test_e2m1_is_the_nearest_number():
    """Against ml_dtypes, over midpoints and their neighbours; where it saturates and for NaN the contract decides."""
    numbers = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    points = np.append(numbers, (numbers[1:] + numbers[:-1]) / 2)
    x = np.concatenate([np.nextafter(points, np.float32(9)), points, np.nextafter(points, np.float32(-9))])
    x = np.clip(np.concatenate([x, -x]), -6, 6).astype(np.float32)
    want = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(reference.encode(x, NVFP4), want)
