"""The oracle of `rope_and_cache`: norm, rotation and write, every operation in float32 and rounded by itself."""

from collections.abc import Sequence

import numpy as np

from kvcore.formats import FLOAT32, FLOATS, FP8_DS_MLA
from kvcore.layout import CacheLayout
from kvcore.oracle.formats import Scale, encode_floats
from kvcore.oracle.views import logical_view
from kvcore.oracle.write import concat_and_cache_mla, write_rows


def rope_and_cache(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    caches: Sequence[np.ndarray],
    positions: np.ndarray,
    cos_sin: np.ndarray,
    slot_mapping: np.ndarray,
    *,
    rope: str = "neox",
    rotary_dim: int | None = None,
    mrope_section: Sequence[int] | None = None,
    q_norm: np.ndarray | None = None,
    k_norm: np.ndarray | None = None,
    eps: float = 1e-6,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    layout: str | CacheLayout | None = None,
    scale_layout: str | None = None,
    layer: int | None = None,
) -> np.ndarray:
    """Norms and rotates query and key, and writes key and value into the caches, in place. Returns the new query.

    Of MLA, key is kv_c `[num_tokens, kv_lora_rank]` and value k_pe `[num_tokens, qk_rope_head_dim]`; value is rotated.
    What is computed of key and value is written as a writer writes float32, the rest as it writes that dtype.
    """
    num_arrays = 2 - len(caches) % 2  # the others are scale caches
    arrays, scale_caches = caches[:num_arrays], caches[num_arrays:]
    layout = _default_layout(arrays, layer) if layout is None else CacheLayout.of(layout)
    assert cos_sin.shape[1] == (query.shape[2] if rotary_dim is None else rotary_dim)
    angles = [angles_of(cos_sin, positions[..., token], mrope_section) for token in range(len(query))]

    new_query = rotated(normed(query, q_norm, eps), angles, rope)
    if not layout.latent:
        key = canonical(rotated(normed(key, k_norm, eps), angles, rope))
    else:
        value = canonical(rotated(value.astype(np.float32)[:, None], angles, rope)[:, 0])
        if k_norm is not None:
            key = canonical(normed(key, k_norm, eps))

    if layout.latent and kv_cache_dtype == FP8_DS_MLA.name:
        rows = logical_view(arrays[0], layout.arrays[0])[0, ..., 0, :, 0]  # [layer, block, slot, byte]
        concat_and_cache_mla(key, value, rows, slot_mapping, kv_cache_dtype, layer=layer or 0)
    else:
        if layout.latent:
            layout, rows, key, value = _row_of_one_head(layout, arrays[0], key, value)
            arrays, v_scale = (rows,), k_scale
        static = (k_scale, v_scale)
        write_rows(key, value, arrays, slot_mapping, kv_cache_dtype, static, layout, layer, scale_caches, scale_layout)
    return encode_floats(new_query, FLOATS[query.dtype.name]).view(query.dtype)


def normed(x: np.ndarray, weights: np.ndarray | None, eps: float) -> np.ndarray:
    """`x * (1 / sqrt(mean(x * x) + eps)) * weights` of rows `[…, n]`, in float32; without weights x, in float32."""
    x = x.astype(np.float32)
    if weights is None:
        return x
    with np.errstate(all="ignore"):  # NaN and infinity are input like any other
        root = np.sqrt(sum_in_pairs(x * x) / np.float32(x.shape[-1]) + np.float32(eps))
        inverse = np.float32(1) / root
        return x * inverse[..., None] * weights.astype(np.float32)


def sum_in_pairs(x: np.ndarray) -> np.ndarray:
    """The sum of rows `[…, n]`: zeros make n a power of two, then neighbours are added until one number is left."""
    missing = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    x = np.concatenate([x, np.zeros((*x.shape[:-1], missing), x.dtype)], -1)
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def angles_of(
    cos_sin: np.ndarray, positions: np.ndarray, sections: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Cosines and sines of a token's pairs, in float32; None if a position is outside the table."""
    rows = [int(p) for p in np.atleast_1d(positions)]
    if not all(0 <= row < len(cos_sin) for row in rows):
        return None
    half = cos_sin.shape[1] // 2
    row_of_pair = np.repeat(rows, [half] if sections is None else sections)
    pairs = np.arange(half)
    cosines, sines = cos_sin[row_of_pair, pairs], cos_sin[row_of_pair, half + pairs]
    return cosines.astype(np.float32), sines.astype(np.float32)


def rotated(x: np.ndarray, angles: Sequence[tuple[np.ndarray, np.ndarray] | None], rope: str) -> np.ndarray:
    """Heads `[num_tokens, num_heads, head_size]` of float32, each token's rotated by its angles; without any, zeros."""
    out = np.zeros_like(x)
    for heads, new, of_token in zip(x, out, angles, strict=True):
        if of_token is not None:
            new[:] = rotated_pairs(heads, *of_token, rope)
    return out


def rotated_pairs(heads: np.ndarray, cosines: np.ndarray, sines: np.ndarray, rope: str) -> np.ndarray:
    """Heads `[num_heads, head_size]`, with the pairs among their first elements rotated; the other elements stay."""
    half = len(cosines)
    if rope == "neox":
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = heads[:, first], heads[:, second]
    out = heads.copy()
    with np.errstate(all="ignore"):
        out[:, first] = a * cosines - b * sines
        out[:, second] = b * cosines + a * sines
    return out


def canonical(x: np.ndarray) -> np.ndarray:
    """The same float32 numbers, every NaN with the same bits."""
    return encode_floats(x, FLOAT32).view(np.float32)


def _default_layout(caches: Sequence[np.ndarray], layer: int | None) -> CacheLayout:
    rank = caches[0].ndim - (layer is not None)
    if len(caches) == 2:
        layout = CacheLayout.HEAD_MAJOR if rank == 5 else CacheLayout.NHD
    else:
        layout = CacheLayout.MLA if rank == 3 else CacheLayout.PACKED_NHD
    return layout if layer is None else layout.with_layer()


def _row_of_one_head(
    layout: CacheLayout, kv_cache: np.ndarray, key: np.ndarray, value: np.ndarray
) -> tuple[CacheLayout, np.ndarray, np.ndarray, np.ndarray]:
    """A cache of MLA, kv_c and k_pe with an axis for heads: the row of one head, with k_pe behind kv_c."""
    at = layout.arrays[0].index(("latent",))
    with_head = CacheLayout(layout.pattern.replace("latent", "head k+v"))
    return with_head, np.expand_dims(kv_cache, at), key[:, None], value[:, None]
