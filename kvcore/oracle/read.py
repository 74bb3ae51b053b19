"""The oracle of reading: NumPy in float64, plain loops. It defines what `gather_kv` and `paged_attention` give."""

from collections.abc import Sequence

import numpy as np

from kvcore.formats import (
    DS_MLA_GROUP,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
    E4M3,
    FLOATS,
    FP8,
    FP8_DS_MLA,
    KV_CACHE_DTYPES,
    NVFP4_GROUP,
    FloatFormat,
)
from kvcore.layout import CacheLayout
from kvcore.oracle.formats import decode, encode
from kvcore.oracle.views import logical_view, scale_views, views
from kvcore.oracle.write import Scale, scale_of_layer


def gather_kv(
    caches: Sequence[np.ndarray],
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    max_len: int,
    *,
    dtype: np.dtype,
    head_size: int,
    head_size_v: int | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    layout: str | CacheLayout = "NHD",
    scale_layout: str | None = None,
    layer: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[num_seqs, max_len, num_heads, dim]`, and zeros where there are none."""
    stored = _stored(caches, kv_cache_dtype)
    readers = _readers(caches, CacheLayout.of(layout), stored, head_size, head_size_v, (k_scale, v_scale), scale_layout)
    out = []
    for read in readers:
        result = np.zeros((len(seq_lens), max_len, read.num_heads, read.head_size), dtype)
        for seq, positions in enumerate(_positions(read.units, block_tables, seq_lens, layer)):
            for n, block in positions:
                if n < max_len:
                    place = (layer or 0, block, n % read.units.shape[2])
                    result[seq, n] = _elements(read, place, stored, dtype)
        out.append(result)
    return out[0], out[1]


def gather_slots(
    caches: Sequence[np.ndarray],
    slots: np.ndarray,
    *,
    dtype: np.dtype,
    head_size: int,
    head_size_v: int | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    layout: str | CacheLayout = "NHD",
    scale_layout: str | None = None,
    layer: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[n, num_heads, dim]` of slots, and zeros where there are none."""
    stored = _stored(caches, kv_cache_dtype)
    readers = _readers(caches, CacheLayout.of(layout), stored, head_size, head_size_v, (k_scale, v_scale), scale_layout)
    out = []
    for read in readers:
        result = np.zeros((len(slots), read.num_heads, read.head_size), dtype)
        layers, num_blocks, block_size = read.units.shape[:3]
        for i, slot in enumerate(map(int, slots)):
            place = (layer or 0, slot // block_size, slot % block_size) if block_size else (0, 0, 0)
            if 0 <= place[0] < layers and 0 <= slot < num_blocks * block_size:
                result[i] = _elements(read, place, stored, dtype)
        out.append(result)
    return out[0], out[1]


def _elements(read: "_Reader", place: tuple[int, int, int], stored: FloatFormat, dtype: np.dtype) -> np.ndarray:
    """What a slot holds: the bits, or rounded from float32."""
    if stored.name == dtype.name:
        return read.units[place].reshape(read.num_heads, -1).view(dtype)
    return encode(read(*place), FLOATS[dtype.name]).view(dtype)


class _Reader:
    """Reads K, or V, as float32: `float32(element) * scale`, first by a group's scale, then by a static one."""

    def __init__(
        self,
        units: np.ndarray,
        stored: FloatFormat,
        group_scales: np.ndarray | None,
        scale_cache: np.ndarray | None,
        scale: Scale,
    ) -> None:
        self.units, self.stored, self.group_scales, self.scale_cache = units, stored, group_scales, scale_cache
        self.scale = scale
        self.num_heads = units.shape[3]
        self.head_size = units.shape[4] * units.shape[5] * stored.elements_per_unit

    def __call__(self, layer: int, block: int | np.ndarray, offset: int | np.ndarray) -> np.ndarray:
        """Rows `[…, head, dim]` of the slots at these offsets in blocks; block and offset may be arrays."""
        units = self.units[layer, block, offset]
        with np.errstate(all="ignore"):
            x = decode(np.ascontiguousarray(units.reshape(*units.shape[:-2], -1)), self.stored)
            if self.group_scales is not None:
                scales = self.group_scales[layer, block, offset]
                scales = decode(np.ascontiguousarray(scales.reshape(*scales.shape[:-2], -1)), E4M3)
                x = x * np.repeat(scales, NVFP4_GROUP, -1)
            if self.scale_cache is not None:
                return x * self.scale_cache[layer, block, offset][..., None]
            if self.scale is None or self.stored.name in FLOATS:
                return x
            return x * np.asarray(scale_of_layer(self.scale, layer), np.float32).reshape(-1, 1)


class _MlaReader(_Reader):
    """Reads rows of fp8_ds_mla, or their first `head_size` elements."""

    def __init__(self, units: np.ndarray, head_size: int) -> None:
        super().__init__(units, FP8_DS_MLA, None, None, None)
        self.head_size = head_size

    def __call__(self, layer: int, block: int | np.ndarray, offset: int | np.ndarray) -> np.ndarray:
        import ml_dtypes

        row = np.ascontiguousarray(self.units[layer, block, offset][..., 0])
        with np.errstate(all="ignore"):
            latent = decode(row[..., :DS_MLA_LATENT], FP8_DS_MLA)
            scales = np.ascontiguousarray(row[..., DS_MLA_LATENT : -2 * DS_MLA_ROPE]).view(np.float32)
            rope = np.ascontiguousarray(row[..., -2 * DS_MLA_ROPE :]).view(ml_dtypes.bfloat16).astype(np.float32)
            key = np.concatenate([latent * np.repeat(scales, DS_MLA_GROUP, -1), rope], -1)
        return key[..., : self.head_size]


def _readers(
    caches: Sequence[np.ndarray],
    layout: CacheLayout,
    stored: FloatFormat,
    head_size: int,
    head_size_v: int | None,
    scales: tuple[Scale, Scale],
    scale_layout: str | None,
) -> list[_Reader]:
    if stored == FP8_DS_MLA:
        units = logical_view(caches[0], layout.arrays[0])[0]
        return [_MlaReader(units, DS_MLA_LATENT + DS_MLA_ROPE), _MlaReader(units, DS_MLA_LATENT)]
    scale_caches: list[np.ndarray | None] = [None, None]
    if any(np.ndim(s) > 2 for s in scales):  # type: ignore[arg-type]
        scale_caches = list(scale_views(scales, scale_layout, layout))  # type: ignore[arg-type]
    return [
        _Reader(units, stored, group_scales, scale_cache, scale)
        for (units, group_scales), scale_cache, scale in zip(
            views(caches, layout, head_size, head_size_v, stored), scale_caches, scales, strict=True
        )
    ]


def paged_attention(
    query: np.ndarray,
    caches: Sequence[np.ndarray],
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    *,
    query_start_loc: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    layout: str | CacheLayout = "NHD",
    scale_layout: str | None = None,
    layer: int | None = None,
    head_size_v: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The result and its log-sum-exp, both float64; zeros and -inf in rows that see nothing.

    Sequence s has the query tokens from the largest of `query_start_loc[: s + 1]` to below `query_start_loc[s + 1]`, as
    far as they exist, and token t of them stands at position `seq_lens[s] - query_start_loc[s + 1] + t`.
    """
    num_tokens, num_q_heads, head_size = query.shape
    stored = _stored(caches, kv_cache_dtype)
    keys, values = _readers(
        caches, CacheLayout.of(layout), stored, head_size, head_size_v, (k_scale, v_scale), scale_layout
    )
    scale = head_size**-0.5 if scale is None else scale
    block_size, num_heads = values.units.shape[2:4]
    q_per_kv = num_q_heads // num_heads
    out = np.zeros((num_tokens, num_q_heads, values.head_size))
    lse = np.full((num_tokens, num_q_heads), -np.inf)
    if sinks is not None:
        lse[:] = sinks
    starts = list(range(len(seq_lens) + 1)) if query_start_loc is None else query_start_loc.tolist()
    with np.errstate(all="ignore"):
        for seq, positions in enumerate(_positions(values.units, block_tables, seq_lens, layer)):
            n, block = np.array(positions, np.int64).reshape(-1, 2).T
            k, v = (
                read(layer or 0, block, n % block_size).astype(np.float64)
                if len(n) else np.zeros((0, num_heads, read.head_size))
                for read in (keys, values)
            )  # fmt: skip
            begin = max(0, *starts[: seq + 1])  # not before any earlier start
            for token in range(begin, min(starts[seq + 1], num_tokens)):
                position = int(seq_lens[seq]) - starts[seq + 1] + token
                seen = n <= position if causal else n >= 0
                if sliding_window is not None:
                    seen = seen & (n > position - sliding_window)
                for head in range(num_q_heads):
                    logits = k[seen, head // q_per_kv] @ query[token, head].astype(np.float64) * scale
                    if soft_cap is not None:
                        logits = soft_cap * np.tanh(logits / soft_cap)
                    if sinks is not None:
                        logits = np.append(logits, np.float64(sinks[head]))
                    if not len(logits):
                        continue
                    top = logits.max()
                    weights = np.exp(logits - top)
                    lse[token, head] = top + np.log(weights.sum())
                    out[token, head] = weights[: seen.sum()] / weights.sum() @ v[seen, head // q_per_kv]
    return out, lse


def _positions(view: np.ndarray, block_tables: np.ndarray, seq_lens: np.ndarray, layer: int | None):
    """For each sequence its positions that exist, each with its block."""
    num_layers, num_blocks, block_size = view.shape[:3]
    for table, length in zip(block_tables, seq_lens, strict=True):
        positions = []
        if 0 <= (layer or 0) < num_layers:
            for n in range(min(int(length), len(table) * block_size)):
                block = int(table[n // block_size])
                if 0 <= block < num_blocks:
                    positions.append((n, block))
        yield positions


def _stored(caches: Sequence[np.ndarray], kv_cache_dtype: str) -> FloatFormat:
    return KV_CACHE_DTYPES[kv_cache_dtype] or (FLOATS | FP8)[caches[0].dtype.name]
