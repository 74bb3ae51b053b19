"""Batches in the pages of Pallas's two functions, and attention of one row at a time."""

import ml_dtypes
import numpy as np

HEADS, GROUP, DIM, PAGE, PAGES = 2, 3, 16, 4, 20


def soft(logits, values):
    """Weighted values `[heads, dim]` of logits `[heads, positions]` and values `[positions, heads, dim]`."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hp,phd->hd", weights / weights.sum(-1, keepdims=True), values)


def attend(q, key, value, scale=1.0, cap=None):
    """One row `[q_heads, dim]` over `[positions, heads, dim]`, in float64."""
    if not len(key):
        return np.zeros((len(q), value.shape[-1]))
    group = len(q) // key.shape[1]
    key, value = (np.repeat(x.astype(np.float64), group, axis=1) for x in (key, value))
    logits = np.einsum("hd,phd->hp", q.astype(np.float64), key) * scale
    return soft(logits if cap is None else cap * np.tanh(logits / cap), value)


# ---- decode: head, page, slot, dim


def decode_case(lengths=(0, 1, 7, 12), dtype=np.float32, pages_per_sequence=3, seed=0):
    """Arrays of a call, and keys and values of each sequence; pages hold NaN wherever nothing is."""
    rng = np.random.default_rng(seed)
    tables = rng.permutation(PAGES)[: len(lengths) * pages_per_sequence].reshape(len(lengths), -1).astype(np.int32)
    k_pages, v_pages = np.full((2, HEADS, PAGES, PAGE, DIM), np.nan, np.float32)
    rows = []
    for table, length in zip(tables, lengths, strict=True):
        key, value = rng.normal(size=(2, length, HEADS, DIM)).astype(np.float32)
        for n in range(length):
            k_pages[:, table[n // PAGE], n % PAGE] = key[n]
            v_pages[:, table[n // PAGE], n % PAGE] = value[n]
        rows.append((key, value))
        table[-(-length // PAGE) :] = 2**30  # never read
    q = rng.normal(size=(len(lengths), HEADS * GROUP, DIM)).astype(dtype)
    return q, k_pages, v_pages, tables, np.array(lengths, np.int32), rows


def wanted(q, rows, **options):
    return np.stack([attend(x, *kv, **options) for x, kv in zip(q, rows, strict=True)])


def close(got, want, tolerance=1e-4):
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tolerance, atol=tolerance)


def quantise(pages, dtype, scale_dtype=np.float32):
    """Pages in a dtype of 8 bits, a scale for each slot's head, NaN where nothing is."""
    largest = 127 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    scales = (np.abs(pages).max(-1) / largest).astype(scale_dtype)
    with np.errstate(invalid="ignore"):
        units = pages / scales[..., None].astype(np.float32)
    units = np.nan_to_num(np.rint(units) if dtype == np.int8 else units, nan=5.0)
    return units.astype(dtype), scales


def dequantised(units, scales, tables, lengths):
    """Rows of each sequence, in float32."""
    pages = units.astype(np.float32) * (1 if scales is None else scales[..., None].astype(np.float32))
    slots = [[(tables[s, n // PAGE], n % PAGE) for n in range(length)] for s, length in enumerate(lengths)]
    return [np.array([pages[:, p, i] for p, i in each]).reshape(-1, HEADS, DIM) for each in slots]


# ---- ragged: page, slot, head and K or V, dim


def ragged_case(query_lens=(1, 3, 0, 4), kv_lens=(5, 3, 6, 11), spare=2, rows_past=3, dtype=np.float32, tail=0):
    """Arrays of a call with room for `spare` more sequences, whose starts are `tail`; and keys and values."""
    rng = np.random.default_rng(1)
    sequences, pages_per_seq = len(kv_lens) + spare, 3
    tables = rng.permutation(PAGES)[: sequences * pages_per_seq].reshape(sequences, -1).astype(np.int32)
    pages = np.full((PAGES, PAGE, 2 * HEADS, DIM), np.nan, np.float32)
    rows = []
    for table, length in zip(tables, kv_lens, strict=False):
        key, value = rng.normal(size=(2, length, HEADS, DIM)).astype(dtype)
        for n in range(length):
            pages[table[n // PAGE], n % PAGE, 0::2] = key[n]
            pages[table[n // PAGE], n % PAGE, 1::2] = value[n]
        rows.append((key, value))
        table[-(-length // PAGE) :] = 2**30
    tables[len(kv_lens) :] = 0
    starts = np.concatenate([[0], np.cumsum(query_lens), [tail] * spare]).astype(np.int32)
    lens = np.array([*kv_lens, *[7] * spare], np.int32)
    q = rng.normal(size=(sum(query_lens) + rows_past, HEADS * GROUP, DIM)).astype(dtype)
    return [q, pages, lens, tables, starts, np.array([len(kv_lens)], np.int32)], rows


def ragged_wanted(arrays, rows, window=None, **options):
    q, _, lens, _, starts, _ = arrays
    want = np.zeros(q.shape)
    for s, (key, value) in enumerate(rows):
        for row in range(starts[s], starts[s + 1]):
            last = lens[s] - (starts[s + 1] - row) + 1
            seen = slice(0 if window is None else max(0, last - window), last)
            want[row] = attend(q[row], key[seen], value[seen], **options)
    return want
