"""The oracle of reading: NumPy in float64, plain loops. It defines what `gather_kv` and `paged_attention` give."""

from collections.abc import Sequence

import numpy as np

from kvcore.layout import CacheLayout
from kvcore.quantization import FLOATS, FP8, KV_CACHE_DTYPES, FloatFormat
from kvcore.reference import encode, logical_view


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
    k_scale: float | None = None,
    v_scale: float | None = None,
    layout: str | CacheLayout = "NHD",
    layer: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[num_seqs, max_len, num_heads, dim]`, and zeros where there are none."""
    stored = _stored(caches, kv_cache_dtype)
    out = []
    for view, scale in zip(_views(caches, layout, head_size, head_size_v), (k_scale, v_scale), strict=True):
        _, _, block_size, num_heads, _, _ = view.shape
        result = np.zeros((len(seq_lens), max_len, num_heads, view.shape[-1] * view.shape[-2]), dtype)
        for seq, positions in enumerate(_positions(view, block_tables, seq_lens, layer)):
            for n, block in positions:
                if n < max_len:
                    row = view[layer or 0, block, n % block_size].reshape(num_heads, -1)
                    result[seq, n] = convert(row, stored, dtype, scale)
        out.append(result)
    return out[0], out[1]


def convert(row: np.ndarray, stored: FloatFormat, dtype: np.dtype, scale: float | None) -> np.ndarray:
    """Elements of a cache in another dtype: the same bits where it is the stored one, else `round(float32 · scale)`."""
    if stored.name == dtype.name:
        return row.view(dtype)
    with np.errstate(all="ignore"):
        x = decode(row, stored)
        if stored.name in FP8 and scale is not None:
            x = x * np.float32(scale)
        return encode(x, FLOATS[dtype.name]).view(dtype)


def decode(row: np.ndarray, stored: FloatFormat) -> np.ndarray:
    """Elements of a cache as float32, before any scale: exact."""
    import ml_dtypes

    return row.view(getattr(ml_dtypes, stored.name, stored.name)).astype(np.float32)


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
    k_scale: float | None = None,
    v_scale: float | None = None,
    layout: str | CacheLayout = "NHD",
    layer: int | None = None,
    head_size_v: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The result and its log-sum-exp, both float64; zeros and -inf in rows that see nothing."""
    num_tokens, num_q_heads, head_size = query.shape
    stored = _stored(caches, kv_cache_dtype)
    keys, values = _views(caches, layout, head_size, head_size_v)
    scales = [1.0 if s is None or stored.name not in FP8 else float(np.float32(s)) for s in (k_scale, v_scale)]
    scale = head_size**-0.5 if scale is None else scale
    *_, block_size, num_heads, chunks, x = values.shape
    group = num_q_heads // num_heads
    out = np.zeros((num_tokens, num_q_heads, chunks * x))
    lse = np.full((num_tokens, num_q_heads), -np.inf)
    if sinks is not None:
        lse[:] = sinks
    starts = np.arange(len(seq_lens) + 1) if query_start_loc is None else query_start_loc
    with np.errstate(all="ignore"):
        for seq, positions in enumerate(_positions(values, block_tables, seq_lens, layer)):
            read = {n: (block, n % block_size) for n, block in positions}
            n = np.array(list(read), np.int64)
            at = np.array(list(read.values()), np.int64).reshape(-1, 2)
            k, v = (
                decode(np.ascontiguousarray(view[layer or 0, at[:, 0], at[:, 1]]), stored).astype(np.float64) * s
                if len(n) else np.zeros((0, num_heads, 1, view.shape[-1] * view.shape[-2]))
                for view, s in ((keys, scales[0]), (values, scales[1]))
            )  # fmt: skip
            k, v = k.reshape(len(n), num_heads, head_size), v.reshape(len(n), num_heads, chunks * x)
            for token in range(starts[seq], starts[seq + 1]):
                position = seq_lens[seq] - starts[seq + 1] + token
                seen = n <= position if causal else n >= 0
                if sliding_window is not None:
                    seen = seen & (n > position - sliding_window)
                for head in range(num_q_heads):
                    logits = k[seen, head // group] @ query[token, head].astype(np.float64) * scale
                    if soft_cap is not None:
                        logits = soft_cap * np.tanh(logits / soft_cap)
                    if sinks is not None:
                        logits = np.append(logits, np.float64(sinks[head]))
                    if not len(logits):
                        continue
                    top = logits.max()
                    weights = np.exp(logits - top)
                    lse[token, head] = top + np.log(weights.sum())
                    out[token, head] = weights[: seen.sum()] / weights.sum() @ v[seen, head // group]
    return out, lse


def _positions(view: np.ndarray, block_tables: np.ndarray, seq_lens: np.ndarray, layer: int | None):
    """For each sequence its positions that exist, each with its block."""
    num_layers, num_blocks, block_size = view.shape[:3]
    for table, length in zip(block_tables, seq_lens, strict=True):
        found = []
        if 0 <= (layer or 0) < num_layers:
            for n in range(min(int(length), len(table) * block_size)):
                block = int(table[n // block_size])
                if 0 <= block < num_blocks:
                    found.append((n, block))
        yield found


def _stored(caches: Sequence[np.ndarray], kv_cache_dtype: str) -> FloatFormat:
    return KV_CACHE_DTYPES[kv_cache_dtype] or (FLOATS | FP8)[caches[0].dtype.name]


def _views(caches: Sequence[np.ndarray], layout: str | CacheLayout, head_size: int, head_size_v: int | None):
    """K and V as `[layer, block, slot, head, dim // x, x]`."""
    layout = CacheLayout.of(layout)
    if not layout.single_array:
        keys, values = (logical_view(c, axes)[0] for c, axes in zip(caches, layout.arrays, strict=True))
        return keys, values
    view = logical_view(caches[0], layout.arrays[0])
    if layout.packed:
        return view[0, ..., :head_size, :], view[0, ..., head_size:, :]
    if layout.latent:
        return view[0], view[0, ..., :head_size_v, :]
    return view[0], view[1]
