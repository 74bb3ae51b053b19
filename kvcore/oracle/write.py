"""The oracle: NumPy, plain loops, no regard for speed. What it writes is what every implementation must write.

Arrays are NumPy's; bfloat16 and the fp8 dtypes are those that ml_dtypes registers (JAX brings it along).
"""

from collections.abc import Sequence

import numpy as np

from kvcore.formats import BFLOAT16, DS_MLA_GROUP, DS_MLA_LATENT, DS_MLA_ROPE, E4M3, FLOATS, FP8, KV_CACHE_DTYPES, NVFP4
from kvcore.layout import CacheLayout
from kvcore.oracle.formats import Scale, convert, encode_floats, quantise, quantise_ds_mla, quantise_nvfp4, scale_of
from kvcore.oracle.views import scale_views, views


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
    write_rows(key, value, caches, slot_mapping, kv_cache_dtype, (k_scale, v_scale), layout, layer)


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
    write_rows(key, value, (kv_cache,), slot_mapping, kv_cache_dtype, (k_scale, v_scale), layout, layer)


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
    write_rows(key, value, caches, slot_mapping, kv_cache_dtype, (None, None), layout, layer, scales, scale_layout)


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
    write_rows(key, value, (kv_cache,), slot_mapping, kv_cache_dtype, (None, None), layout, layer, scales, scale_layout)


def concat_and_cache_mla(
    kv_c: np.ndarray,
    k_pe: np.ndarray,
    kv_cache: np.ndarray,
    slot_mapping: np.ndarray,
    kv_cache_dtype: str = "auto",
    scale: Scale = None,
    *,
    layer: int | None = None,
) -> None:
    """Writes rows of MLA into the cache `[(num_layers,) num_blocks, block_size, …]`, in place."""
    key, value = kv_c[:, None], k_pe[:, None]
    if kv_cache_dtype != "fp8_ds_mla":
        layout = CacheLayout.PACKED_NHD if layer is None else CacheLayout.PACKED_NHD.with_layer()
        rows = (kv_cache[..., None, :],)
        write_rows(key, value, rows, slot_mapping, kv_cache_dtype, (scale, scale), layout, layer)
        return
    cache_rows = kv_cache if layer is not None else kv_cache[None]
    num_layers, num_blocks, block_size, _ = cache_rows.shape
    for token, slot in enumerate(slot_mapping):
        if 0 <= slot < num_blocks * block_size and 0 <= (layer or 0) < num_layers:
            row = cache_rows[layer or 0, slot // block_size, slot % block_size]
            elements, scales = quantise_ds_mla(kv_c[token].reshape(-1, DS_MLA_GROUP))
            row[:DS_MLA_LATENT] = elements.reshape(-1)
            row[DS_MLA_LATENT : -2 * DS_MLA_ROPE] = scales.view(np.uint8)
            rope = k_pe[token] if k_pe.dtype.name == "bfloat16" else encode_floats(k_pe[token], BFLOAT16)
            row[-2 * DS_MLA_ROPE :] = rope.view(np.uint8) if rope.size else 0


def kv_scales(
    key: np.ndarray, value: np.ndarray, kv_cache_dtype: str, granularity: str = "tensor"
) -> tuple[np.ndarray, np.ndarray]:
    """Static scales for keys and values like these: float32 of shape () or (num_heads,)."""
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    assert stored is not None
    largest = stored.largest * (E4M3.largest if stored == NVFP4 else 1)
    axis = (0, 1, 2) if granularity == "tensor" else (0, 2)
    k_scale, v_scale = (scale_of(np.abs(x.astype(np.float32)).max(axis), largest) for x in (key, value))
    return k_scale, v_scale


def write_rows(
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
    """Writes the rows of key and of value, each from its own dtype, into caches of any layout but MLA's, in place.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        caches: The key and the value cache, or the one array of both.
        slot_mapping: `[n]`, n ≤ num_tokens.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`, but not "fp8_ds_mla".
        static: Static scales of key and of value: one, one a head, or a row of such for each layer.
        layout: Of the caches.
        layer: Index of the layer, where caches have several.
        scale_caches: Where each token's head has a scale: those of key and of value.
        scale_layout: Of the scale caches.
    """
    stored = KV_CACHE_DTYPES[kv_cache_dtype] or (FLOATS | FP8)[caches[0].dtype.name]
    units_of = views(caches, layout, key.shape[2], None, stored)
    scales = scale_views(scale_caches, scale_layout, layout) if len(scale_caches) else (None, None)
    for rows, (elements, group_scales), static_scale, scale_cache in zip(
        (key, value), units_of, static, scales, strict=True
    ):
        num_layers, num_blocks, block_size, num_heads, runs, x = elements.shape
        if not 0 <= (layer or 0) < num_layers:
            continue
        for token, slot in enumerate(slot_mapping):
            if not 0 <= slot < num_blocks * block_size:
                continue
            place = (layer or 0, *divmod(int(slot), block_size))
            for head in range(num_heads):
                row, scale = rows[token, head], _scale_of_head(scale_of_layer(static_scale, layer), head)
                if scale_cache is not None:
                    units, scale_cache[(*place, head)] = quantise(row, stored)
                elif group_scales is not None:
                    units, computed = quantise_nvfp4(row, scale)
                    group_scales[(*place, head)] = computed.reshape(-1, 1)
                else:
                    units = convert(row, elements.dtype, kv_cache_dtype, scale)
                elements[(*place, head)] = units.view(elements.dtype).reshape(runs, x)


def scale_of_layer(scale: Scale, layer: int | None) -> Scale:
    """The layer's static scale, or static scales: a row of those that have two axes."""
    return scale[layer or 0] if isinstance(scale, np.ndarray) and scale.ndim == 2 else scale


def _scale_of_head(scale: Scale, head: int) -> Scale:
    """A head's static scale, of one for all heads or one for each."""
    return scale[head] if isinstance(scale, np.ndarray) and scale.size > 1 else scale
