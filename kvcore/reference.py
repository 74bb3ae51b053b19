"""The oracle: NumPy, plain loops, no regard for speed. What it writes is what every implementation must write.

Arrays are NumPy's; bfloat16 and the fp8 dtypes are those that ml_dtypes registers (JAX brings it along).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from kvcore.layout import CacheLayout
from kvcore.quantization import FLOATS, FP8, KV_CACHE_DTYPES, FloatFormat


def reshape_and_cache_flash(
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str = "auto",
    k_scale: float | None = None,
    v_scale: float | None = None,
    *,
    layout: str | CacheLayout = "NHD",
    layer: int | None = None,
) -> None:
    """Writes key and value into the two caches, in place."""
    keys, values = CacheLayout.of(layout).arrays
    _write_rows(key, logical_view(key_cache, keys), slot_mapping, kv_cache_dtype, k_scale, layer)
    _write_rows(value, logical_view(value_cache, values), slot_mapping, kv_cache_dtype, v_scale, layer)


def reshape_and_cache_flash_diffkv(
    key: np.ndarray,
    value: np.ndarray,
    kv_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str = "auto",
    k_scale: float | None = None,
    v_scale: float | None = None,
    *,
    layout: str | CacheLayout = "PACKED_NHD",
    layer: int | None = None,
) -> None:
    """Writes key and value into the one cache, in place."""
    layout = CacheLayout.of(layout)
    view = logical_view(kv_cache, layout.arrays[0])  # [kv, layer, block, slot, head, dim // x, x]
    if layout.packed:
        keys, values = view[0, ..., : key.shape[2], :], view[0, ..., key.shape[2] :, :]
    else:
        keys, values = view
    _write_rows(key, keys, slot_mapping, kv_cache_dtype, k_scale, layer)
    _write_rows(value, values, slot_mapping, kv_cache_dtype, v_scale, layer)


def _write_rows(
    rows: np.ndarray,
    cache_view: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str,
    scale: float | None,
    layer: int | None,
) -> None:
    *_, num_layers, num_blocks, block_size, num_heads, chunks, x = cache_view.shape
    cache_view = cache_view.reshape(cache_view.shape[-6:])
    layer = 0 if layer is None else layer
    if not 0 <= layer < num_layers:
        return
    for token, slot in enumerate(slot_mapping):
        if not 0 <= slot < num_blocks * block_size:
            continue
        block, place = divmod(int(slot), block_size)
        for head in range(num_heads):
            row = convert(rows[token, head], cache_view.dtype, kv_cache_dtype, scale)
            cache_view[layer, block, place, head] = row.reshape(chunks, x)


def convert(row: np.ndarray, cache_dtype: np.dtype, kv_cache_dtype: str = "auto", scale: float | None = None):
    """What a cache of `cache_dtype` stores for these elements.

    Args:
        row: Elements of key or value.
        cache_dtype: The cache's dtype.
        kv_cache_dtype: "auto", "fp8", "fp8_e4m3" or "fp8_e5m2".
        scale: What fp8 divides by; None means 1.

    Returns:
        An array of `cache_dtype`: the same bits where the stored format is the input's, else
        `round(float32(row) / scale)`.
    """
    stored = KV_CACHE_DTYPES[kv_cache_dtype] or (FLOATS | FP8)[cache_dtype.name]
    if row.dtype.name == stored.name:
        return row.view(cache_dtype)
    with np.errstate(all="ignore"):  # NaN and infinity are input like any other
        x = row.astype(np.float32)
        if stored.name in FP8 and scale is not None:
            x = x / np.float32(scale)
        return encode(x, stored).view(cache_dtype)


def encode(x: np.ndarray, stored: FloatFormat) -> np.ndarray:
    """Bits of float32 numbers in another format: the nearest of all its numbers, the even one of two as near.

    Beyond the largest finite number, fp8 saturates and other formats give infinity. NaN gives the format's NaN.
    """
    if stored.bits == 32:
        return np.where(np.isnan(x), np.uint32(stored.nan), x.view(np.uint32))
    numbers = _numbers(stored)
    magnitude = np.abs(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf).astype(np.float64))
    above = np.clip(np.searchsorted(numbers, magnitude), 1, len(numbers) - 1)
    below = above - 1
    to_above, to_below = numbers[above] - magnitude, magnitude - numbers[below]
    code = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    code |= np.signbit(x).astype(np.int64) << (stored.bits - 1)
    return np.where(np.isnan(x), stored.nan, code).astype(f"uint{stored.bits}")


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


def logical_view(array: np.ndarray, axes: Sequence[tuple[str, ...]]) -> np.ndarray:
    """The array seen as `[kv, layer, block, slot, head, dim // x, x]`; axes that it lacks have size 1."""
    names, shape = [], []
    for axis, size in zip(axes, array.shape, strict=True):
        for name in axis:
            names.append({"dim/x": "dim", "k+v": "dim", "latent": "dim"}.get(name, name))
            shape.append(size if len(axis) == 1 else (2 if name == "kv" else size // 2))
    view = array.reshape(shape)
    order = ("kv", "layer", "block", "slot", "head", "dim", "x")
    present = [name for name in order if name in names]
    view = view.transpose([names.index(name) for name in present])
    return view[tuple(slice(None) if name in names else None for name in order)]
