"""Number formats in NumPy: rounding, packing and decoding, element by element."""

from functools import cache

import numpy as np

from kvcore.formats import (
    E4M3,
    FLOATS,
    FP8,
    FP8_DS_MLA,
    KV_CACHE_DTYPES,
    NVFP4,
    NVFP4_GROUP,
    SMALLEST_SCALE,
    FloatFormat,
)

Scale = float | np.ndarray | None
"""A static scale: one number, one a head, or None for 1."""


def quantise(rows: np.ndarray, stored: FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[…, n]` with a float32 scale each: stored bytes, and the scales `absmax / largest`.

    Rows whose scale would be below float32's normal numbers, such as rows of zeros, have scale 1. With a NaN in it, the
    scale is NaN; without, but with an infinity, infinite: such a row reads as NaN.
    """
    with np.errstate(all="ignore"):
        x = rows.astype(np.float32)
        scale = scale_of(np.abs(x).max(-1), stored.largest)
        return pack(encode(x / scale[..., None], stored), stored), scale


def quantise_ds_mla(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tiles `[…, n]` of fp8_ds_mla: e4m3, and the scales, the first powers of two not below `absmax / 448` and 1e-4.

    The absmax is that of the elements that are no NaN, or 0; NaN is stored as NaN. With an infinity among them, the
    scale is infinite: infinities are stored as NaN, other numbers as zeros, and all is read as NaN. As vLLM has it.
    """
    with np.errstate(all="ignore"):
        x = tiles.astype(np.float32)
        absmax = np.where(np.isnan(x), np.float32(0), np.abs(x)).max(-1)
        bits = np.maximum(absmax / np.float32(448), np.float32(1e-4)).view(np.uint32)
        # A float without mantissa is a power of two; what the mantissa carries into the exponent rounds up to one.
        scale = ((bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
        return encode(x / scale[..., None], FP8_DS_MLA), scale


def quantise_nvfp4(row: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """A head's row in nvfp4: bytes of two elements, and the e4m3 scales of its groups, `absmax / 6 / scale`.

    Elements are multiplied by the reciprocal of the product of both scales, as NVIDIA's writers do; where a group's
    scale is zero, by zero.
    """
    with np.errstate(all="ignore"):
        x = row.astype(np.float32).reshape(-1, NVFP4_GROUP)
        static = np.float32(1 if scale is None else scale)
        group_scales = encode(np.abs(x).max(-1) / np.float32(NVFP4.largest) / static, E4M3)
        decoded = decode(group_scales, E4M3)
        factor = np.where(decoded == 0, np.float32(0), np.float32(1) / (decoded * static))
        return pack(encode(x * factor[:, None], NVFP4).reshape(-1), NVFP4), group_scales


def scale_of(absmax: np.ndarray, largest: float) -> np.ndarray:
    """The float32 scale that makes `largest` of `absmax`; 1 where it would be below float32's normal numbers."""
    with np.errstate(all="ignore"):
        zero = absmax < np.float32(largest * SMALLEST_SCALE)
        scale = np.where(zero, np.float32(1), absmax / np.float32(largest))
        return np.where(np.isnan(scale), np.uint32(0x7FC00000).view(np.float32), scale).astype(np.float32)


def convert(row: np.ndarray, cache_dtype: np.dtype, kv_cache_dtype: str = "auto", scale: Scale = None):
    """What a cache of `cache_dtype` stores for these elements.

    Args:
        row: Elements of key or value.
        cache_dtype: The cache's dtype.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES` with static scales.
        scale: What quantised elements are divided by; None means 1.

    Returns:
        An array of `cache_dtype`: the same bits where the stored format is the input's, else
        `round(float32(row) / scale)`, two in a byte where they have 4 bits.
    """
    stored = KV_CACHE_DTYPES[kv_cache_dtype] or (FLOATS | FP8)[cache_dtype.name]
    if row.dtype.name == stored.name:
        return row.view(cache_dtype)
    with np.errstate(all="ignore"):  # NaN and infinity are input like any other
        x = row.astype(np.float32)
        if stored.name not in FLOATS and scale is not None:
            x = x / np.float32(scale)
        return pack(encode(x, stored), stored).view(cache_dtype)


def encode(x: np.ndarray, stored: FloatFormat) -> np.ndarray:
    """Bits of float32 numbers in another format: the nearest of all its numbers, the even one of two as near.

    Beyond the largest finite number, quantised formats saturate and others give infinity. NaN gives the format's NaN.
    """
    if stored.integer:
        whole = np.rint(
            np.clip(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf), -stored.largest, stored.largest)
        )
        return whole.astype(np.int8).view(np.uint8) & np.uint8((1 << stored.bits) - 1)
    return encode_floats(x, stored)


def encode_floats(x: np.ndarray, stored: FloatFormat) -> np.ndarray:
    """Bit patterns of floats, rounded once, to nearest even."""
    x = x.astype(np.float32)
    if stored.bits == 32:
        return np.where(np.isnan(x), np.uint32(stored.nan), x.view(np.uint32))
    numbers = _numbers(stored)
    magnitude = np.abs(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf).astype(np.float64))
    above = np.clip(np.searchsorted(numbers, magnitude), 1, len(numbers) - 1)
    below = above - 1
    to_above, to_below = numbers[above] - magnitude, magnitude - numbers[below]
    code = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    signed = np.signbit(x) & ((code != 0) | (not stored.unsigned_zero))
    code |= signed.astype(np.int64) << (stored.bits - 1)
    return np.where(np.isnan(x), stored.nan, code).astype(f"uint{max(stored.bits, 8)}")


def pack(codes: np.ndarray, stored: FloatFormat) -> np.ndarray:
    """Codes as they are stored: those of 4 bits two in a byte, the first in its low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4 if stored.bits == 4 else codes


def decode(units: np.ndarray, stored: FloatFormat) -> np.ndarray:
    """Stored elements as float32, before any scale: exact."""
    import ml_dtypes

    if stored.bits == 4:
        codes = np.stack([units & 15, units >> 4], axis=-1).reshape(*units.shape[:-1], -1)
        if stored.integer:
            return ((codes ^ 8).astype(np.float32)) - np.float32(8)
        return np.copysign(_numbers(NVFP4)[codes & 7], np.where(codes & 8, -1.0, 1.0)).astype(np.float32)
    name = "float8_e4m3fn" if stored == FP8_DS_MLA else stored.name
    return units.view(np.dtype(getattr(ml_dtypes, name, name))).astype(np.float32)


@cache
def _numbers(stored: FloatFormat) -> np.ndarray:
    """All non-negative numbers that rounding can give; a number's place is its code.

    For formats with infinity, the last is the power of two after the largest finite number: what rounds to it is
    infinite, and has infinity's code.
    """
    largest = float(np.uint32(stored.clamp).view(np.float32))
    codes = np.arange(1 << (stored.bits - 1), dtype=np.float64)
    exponent, mantissa = np.divmod(codes, 1 << stored.mantissa_bits)
    mantissa /= 1 << stored.mantissa_bits
    numbers = np.where(
        exponent == 0,
        mantissa * 2.0 ** (1 - stored.bias),
        (1 + mantissa) * 2.0 ** (np.minimum(exponent, 2046) - stored.bias),
    )
    if np.isinf(largest):
        largest = 2.0**128
    return numbers[numbers <= largest]
