"""The oracle: NumPy, plain loops, no regard for speed. What it writes is what every implementation must write.

Arrays are NumPy's; bfloat16 and the fp8 dtypes are those that ml_dtypes registers (JAX brings it along).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from kvcore.layout import CacheLayout
from kvcore.quantization import (
    BFLOAT16,
    DS_MLA_GROUP,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
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
from kvcore.scales import region_start, scale_layout_of

Scale = float | np.ndarray | None
"""A static scale: one number, one a head, or None for 1."""


def reshape_and_cache_flash(
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    *,
    layout: str | CacheLayout = "NHD",
    layer: int | None = None,
) -> None:
    """Writes key and value into the two caches, in place."""
    layout = CacheLayout.of(layout)
    caches = (key_cache, value_cache)
    _write(key, value, caches, slot_mapping, kv_cache_dtype, (k_scale, v_scale), layout, layer)


def reshape_and_cache_flash_diffkv(
    key: np.ndarray,
    value: np.ndarray,
    kv_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    *,
    layout: str | CacheLayout = "PACKED_NHD",
    layer: int | None = None,
) -> None:
    """Writes key and value into the one cache, in place."""
    layout = CacheLayout.of(layout)
    _write(key, value, (kv_cache,), slot_mapping, kv_cache_dtype, (k_scale, v_scale), layout, layer)


def reshape_and_cache_flash_per_token_head_quant(
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    k_scale_cache: np.ndarray,
    v_scale_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str,
    *,
    layout: str | CacheLayout = "NHD",
    scale_layout: str | None = None,
    layer: int | None = None,
) -> None:
    """Writes key and value into the two caches, and a scale for each token's head into the scale caches, in place."""
    layout = CacheLayout.of(layout)
    scales = (k_scale_cache, v_scale_cache)
    caches = (key_cache, value_cache)
    _write(key, value, caches, slot_mapping, kv_cache_dtype, (None, None), layout, layer, scales, scale_layout)


def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: np.ndarray,
    value: np.ndarray,
    kv_cache: np.ndarray,
    k_scale_cache: np.ndarray,
    v_scale_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str,
    *,
    layout: str | CacheLayout = "PACKED_NHD",
    scale_layout: str | None = None,
    layer: int | None = None,
) -> None:
    """Writes key and value into the one cache, and a scale for each token's head into the scale caches, in place."""
    layout = CacheLayout.of(layout)
    scales = (k_scale_cache, v_scale_cache)
    _write(key, value, (kv_cache,), slot_mapping, kv_cache_dtype, (None, None), layout, layer, scales, scale_layout)


def concat_and_cache_mla(
    kv_c: np.ndarray,
    k_pe: np.ndarray,
    kv_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str = "auto",
    scale: float | None = None,
    *,
    layer: int | None = None,
) -> None:
    """Writes rows of MLA into the cache `[(num_layers,) num_blocks, block_size, …]`, in place."""
    key, value = kv_c[:, None], k_pe[:, None]
    if kv_cache_dtype != "fp8_ds_mla":
        layout = CacheLayout.PACKED_NHD if layer is None else CacheLayout.PACKED_NHD.with_layer()
        rows = (kv_cache[..., None, :],)
        _write(key, value, rows, slot_mapping, kv_cache_dtype, (scale, scale), layout, layer)
        return
    cache_rows = kv_cache if layer is not None else kv_cache[None]
    num_layers, num_blocks, block_size, _ = cache_rows.shape
    for token, slot in enumerate(slot_mapping):
        if 0 <= slot < num_blocks * block_size and 0 <= (layer or 0) < num_layers:
            row = cache_rows[layer or 0, slot // block_size, slot % block_size]
            elements, scales = quantise_ds_mla(kv_c[token].reshape(-1, DS_MLA_GROUP))
            row[:DS_MLA_LATENT] = elements.reshape(-1)
            row[DS_MLA_LATENT : -2 * DS_MLA_ROPE] = scales.view(np.uint8)
            rope = k_pe[token] if k_pe.dtype.name == "bfloat16" else _encode_floats(k_pe[token], BFLOAT16)
            row[-2 * DS_MLA_ROPE :] = rope.view(np.uint8) if rope.size else 0


def kv_scales(
    key: np.ndarray, value: np.ndarray, kv_cache_dtype: str, granularity: str = "tensor"
) -> tuple[np.ndarray, np.ndarray]:
    """Static scales for keys and values like these: float32 of shape () or (num_heads,)."""
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    assert stored is not None
    largest = stored.largest * (E4M3.largest if stored == NVFP4 else 1)
    axis = (0, 1, 2) if granularity == "tensor" else (0, 2)
    k_scale, v_scale = (_scale_of(np.abs(x.astype(np.float32)).max(axis), largest) for x in (key, value))
    return k_scale, v_scale


def _write(
    key: np.ndarray,
    value: np.ndarray,
    caches: Sequence[np.ndarray],
    slot_mapping: np.ndarray,
    kv_cache_dtype: str,
    static: tuple[Scale, Scale],
    layout: CacheLayout,
    layer: int | None,
    scale_caches: Sequence[np.ndarray] = (),
    scale_layout: str | None = None,
) -> None:
    stored = KV_CACHE_DTYPES[kv_cache_dtype] or (FLOATS | FP8)[caches[0].dtype.name]
    sides = views(caches, layout, key.shape[2], None, stored)
    scales = scale_views(scale_caches, scale_layout, layout) if len(scale_caches) else (None, None)
    for rows, (elements, blocks), scale, own in zip((key, value), sides, static, scales, strict=True):
        num_layers, num_blocks, block_size, num_heads, chunks, x = elements.shape
        if not 0 <= (layer or 0) < num_layers:
            continue
        for token, slot in enumerate(slot_mapping):
            if not 0 <= slot < num_blocks * block_size:
                continue
            at = (layer or 0, *divmod(int(slot), block_size))
            for head in range(num_heads):
                row = rows[token, head]
                one = scale[head] if np.ndim(scale) and len(scale) > 1 else scale  # type: ignore[index,arg-type]
                if own is not None:
                    units, own[(*at, head)] = quantise(row, stored)
                elif blocks is not None:
                    units, of_blocks = quantise_nvfp4(row, one)
                    blocks[(*at, head)] = of_blocks.reshape(-1, 1)
                else:
                    units = convert(row, elements.dtype, kv_cache_dtype, one)
                elements[(*at, head)] = units.view(elements.dtype).reshape(chunks, x)


def quantise(rows: np.ndarray, stored: FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[…, n]` with a float32 scale each: stored bytes, and the scales `absmax / largest`.

    Rows whose scale would be below float32's normal numbers, such as rows of zeros, have scale 1. With a NaN in it, the
    scale is NaN; without, but with an infinity, infinite: such a row reads as NaN.
    """
    with np.errstate(all="ignore"):
        x = rows.astype(np.float32)
        scale = _scale_of(np.abs(x).max(-1), stored.largest)
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
    """A row of nvfp4: bytes of two elements, and the e4m3 scales of its blocks, `absmax / 6 / scale`.

    Elements are multiplied by the reciprocal of the product of both scales, as NVIDIA's writers do; where a block's
    scale is zero, by zero.
    """
    with np.errstate(all="ignore"):
        x = row.astype(np.float32).reshape(-1, NVFP4_GROUP)
        whole = np.float32(1 if scale is None else scale)
        blocks = encode(np.abs(x).max(-1) / np.float32(NVFP4.largest) / whole, E4M3)
        numbers = decode(blocks, E4M3)
        factor = np.where(numbers == 0, np.float32(0), np.float32(1) / (numbers * whole))
        return pack(encode(x * factor[:, None], NVFP4).reshape(-1), NVFP4), blocks


def _scale_of(absmax: np.ndarray, largest: float) -> np.ndarray:
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
    return _encode_floats(x, stored)


def _encode_floats(x: np.ndarray, stored: FloatFormat) -> np.ndarray:
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


# ---- views


def views(
    caches: Sequence[np.ndarray],
    layout: CacheLayout,
    head_size: int,
    head_size_v: int | None,
    stored: FloatFormat,
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Of K and of V: the stored units, and for nvfp4 the scales of its blocks.

    Each is `[layer, block, slot, head, dim // x, x]`. Head sizes count elements.
    """
    if stored != NVFP4:
        units = _sides(caches, layout, head_size // stored.per_byte, (head_size_v or 0) // stored.per_byte)
        return [(u, None) for u in units]
    regions = [_regions(c, axes) for c, axes in zip(caches, layout.arrays, strict=True)]
    elements = _sides([r[0] for r in regions], layout, head_size // 2, (head_size_v or 0) // 2)
    scales = _sides([r[1] for r in regions], layout, head_size // NVFP4_GROUP, (head_size_v or 0) // NVFP4_GROUP)
    return list(zip(elements, scales, strict=True))


def scale_views(scale_caches: Sequence[np.ndarray], scale_layout: str | None, layout: CacheLayout) -> list[np.ndarray]:
    """Scale caches as `[layer, block, slot, head]`."""
    chosen = scale_layout_of(scale_layout, layout.has_layer)
    return [u[..., 0, 0] for u in _sides([c[..., None] for c in scale_caches], chosen, 1, 1)]


def _sides(caches: Sequence[np.ndarray], layout: CacheLayout, head_size: int, head_size_v: int) -> list[np.ndarray]:
    if not layout.single_array:
        return [logical_view(c, axes)[0] for c, axes in zip(caches, layout.arrays, strict=True)]
    view = logical_view(caches[0], layout.arrays[0])
    if layout.packed:
        return [view[0, ..., :head_size, :], view[0, ..., head_size:, :]]
    if layout.latent:
        return [view[0], view[0, ..., :head_size_v, :]]
    return [view[0], view[1]]


def _regions(array: np.ndarray, axes: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Elements and scales of an nvfp4 cache: views of the two parts of each region."""
    start = region_start(axes)
    outer, inner, ninth = array.shape[:start], array.shape[start:-1], array.shape[-1] // 9
    flat = array.reshape(*outer, -1)
    split = flat.shape[-1] // 9 * 8
    elements = flat[..., :split].reshape(*outer, *inner, 8 * ninth)
    scales = flat[..., split:].reshape(*outer, *inner, ninth)
    assert not array.size or np.shares_memory(array, elements)
    return elements, scales


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
