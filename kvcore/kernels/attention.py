"""Attention over a paged KV cache, for any mix of decode, speculative decoding and chunked prefill.

The queries of a sequence that share a KV head are its *rows*: `row = token * GROUP + q_head_in_group`. A program takes
ROWS of them, one KV head, and one of the splits of the KV positions that they see, in tiles of TILE positions:

    tile  of rows   first_row = (tile - first tile of the sequence) * ROWS       first tile of sequence s:
                                                                                 start[s] * GROUP // ROWS + s
    position        n = 0 … seq_len - 1, query i of q stands at seq_len - q + i
    block           block_tables[s, n // BLOCK_SIZE],   place = n % BLOCK_SIZE
    cache element   offset + layer·L + block·B + place·S + head·H + (dim // x)·D + (dim % x)·X

Softmax is online, to base 2, in float32. Where positions are split, each program leaves its part and the logarithm of its
denominator, and `merge_attention_kernel` joins them.
"""

import triton
import triton.language as tl

from .decode import decode
from .encode import encode
from .reduce import maximum, total

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _cdiv(a, b):  # tl.cdiv, which the interpreter cannot call
    return (a + b - 1) // b


@triton.jit
def _find_sequence(query_start_loc_ptr, tile, num_seqs, START_STRIDE: tl.constexpr, GROUP: tl.constexpr,
                   ROWS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The sequence that a tile of rows belongs to; num_seqs stands for the padding after the last one."""
    count = 0
    for first in range(0, num_seqs + 1, CHUNK):
        s = first + tl.arange(0, CHUNK)
        start = tl.load(query_start_loc_ptr + s * START_STRIDE, mask=s <= num_seqs, other=0).to(tl.int64)
        begun = (s <= num_seqs) & (start * GROUP // ROWS + s <= tile)
        count += total(begun.to(tl.int32), 0)
    return tl.maximum(count, 1) - 1


@triton.jit
def _row_of_cache(block, place, head, layer, C: tl.constexpr):
    """Where the head of a slot begins."""
    return C.offset + layer * C.layer_stride + block * C.block_stride + place * C.slot_stride + head * C.head_stride


@triton.jit
def _within_row(dim, C: tl.constexpr):
    if C.x > 1:
        within = (dim // C.x) * C.dim_stride + (dim % C.x) * C.x_stride
    else:
        within = dim * C.dim_stride
    return within


@triton.jit
def _load(cache_ptr, row, good, FIRST: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr):
    """Elements FIRST … FIRST + SIZE - 1 of rows of the cache, `[TILE, SIZE]`; zeros where there is no element."""
    dim = FIRST + tl.arange(0, SIZE)
    at = cache_ptr + row[:, None] + _within_row(dim, C)[None, :]
    if FIRST + SIZE > C.head_size:
        x = tl.load(at, mask=good[:, None] & (dim < C.head_size)[None, :], other=0)
    elif MASKED:
        x = tl.load(at, mask=good[:, None], other=0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _tiles(
    m, l, acc, q_low, q_high, first_tile, end_tile, limit, row_position,
    key_cache_ptr, value_cache_ptr, table_ptr, head, layer, num_blocks, qk_scale,
    K: tl.constexpr, V: tl.constexpr, CACHE: tl.constexpr, COMPUTE: tl.constexpr, HARDWARE_FP8: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, BY_ROW: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, V_IN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds tiles of positions into the running maximum m, denominator l and sum acc.

    Unless MASKED, every position of the tiles exists and is seen by every row. BY_ROW: rows differ in what they see.
    """
    for t in tl.range(first_tile, end_tile, num_stages=STAGES):
        n = t * TILE + tl.arange(0, TILE)
        if MASKED:
            good = n < limit
            if WINDOW is not None and not BY_ROW:
                good = good & (n > row_position - WINDOW)
            block = tl.load(table_ptr + n // BLOCK_SIZE, mask=good, other=-1).to(tl.int64)
            good = good & (block >= 0) & (block < num_blocks)
        else:
            block = tl.load(table_ptr + n // BLOCK_SIZE).to(tl.int64)
            good = n >= 0
        place = n % BLOCK_SIZE
        k_row = _row_of_cache(block, place, head, layer, K)
        k_low = decode(_load(key_cache_ptr, k_row, good, 0, K.low, MASKED, K), CACHE, COMPUTE, HARDWARE_FP8)
        s = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        if K.high > 0:
            k_high = decode(_load(key_cache_ptr, k_row, good, K.low, K.high, MASKED, K), CACHE, COMPUTE, HARDWARE_FP8)
            s = tl.dot(q_high, tl.trans(k_high), s, input_precision=PRECISION)
        if SOFT_CAP is not None:  # tanh(x) = 1 - 2 / (1 + exp(2x))
            s = SOFT_CAP * LOG2E * (1 - 2 / (1 + tl.exp2(s * (qk_scale * (2 / SOFT_CAP)))))
        else:
            s = s * qk_scale
        if MASKED:
            seen = good[None, :]
            if BY_ROW and CAUSAL:
                seen = seen & (n[None, :] <= row_position[:, None])
                if WINDOW is not None:
                    seen = seen & (n[None, :] > row_position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, maximum(s, 1))
        if MASKED:  # a row that has seen nothing yet
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            origin = m_new
        p = tl.exp2(s - origin[:, None])
        shrink = tl.exp2(m - origin)
        l = l * shrink + total(p, 1)
        acc = acc * shrink[:, None]
        if V_IN_K:
            v = k_low
        else:
            v_row = _row_of_cache(block, place, head, layer, V)
            v = decode(_load(value_cache_ptr, v_row, good, 0, V.low, MASKED, V), CACHE, COMPUTE, HARDWARE_FP8)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return m, l, acc


@triton.jit
def _all_blocks_exist(table_ptr, num_entries, num_blocks, CHUNK: tl.constexpr):
    missing = 0
    for first in range(0, num_entries, CHUNK):
        i = first + tl.arange(0, CHUNK)
        block = tl.load(table_ptr + i, mask=i < num_entries, other=0)
        missing += total(((block < 0) | (block >= num_blocks)).to(tl.int32), 0)
    return missing == 0


@triton.jit
def _store(ptr, x, mask, OUT: tl.constexpr):
    """Stores float32, rounded to OUT with integers where the target's cast is not to be trusted."""
    if OUT is None:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        bits = encode(x, None, OUT, False)
        tl.store(ptr.to(tl.pointer_type(bits.dtype)), bits, mask=mask)


@triton.jit
def _finish(m, l, sink):
    """Denominator, factor of the sum, and base-2 logarithm of the denominator, once all positions are in."""
    if sink is not None:
        sink = sink.to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        factor = tl.exp2(m - origin)
        l = l * factor + tl.exp2(sink - origin)
        m = m_new
    else:
        factor = tl.full(m.shape, 1.0, tl.float32)
    nothing = l == 0
    log = tl.where(nothing, float("-inf"), m + tl.log2(l))
    return factor / tl.where(nothing, 1.0, l), log


@triton.jit
def paged_attention_kernel(
    query_ptr,            # [num_tokens, num_q_heads, head_size]
    key_cache_ptr,        # K's array
    value_cache_ptr,      # V's array
    block_tables_ptr,     # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,         # [num_seqs] int32 or int64
    query_start_loc_ptr,  # [num_seqs + 1] int32 or int64, or None for one token a sequence
    sinks_ptr,            # [num_q_heads], or None
    k_scale_ptr,          # one float32, or None for 1
    v_scale_ptr,
    layer,                # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,
    num_seqs,
    max_blocks,           # entries of a row of block_tables
    table_stride,         # elements from one row of block_tables to the next
    num_blocks,           # of one layer
    num_layers,
    out_ptr,              # [num_tokens, num_q_heads, head_size_v]; SPLIT: [num_tokens, num_q_heads, splits, head_size_v]
    lse_ptr,              # [num_tokens, num_q_heads] float32; SPLIT: [num_tokens, num_q_heads, splits], to base 2
    Q: tl.constexpr,              # kvcore.plan_attention.QueryRows
    K: tl.constexpr,              # kvcore.plan_attention.CacheRows
    V: tl.constexpr,
    CACHE: tl.constexpr,          # kvcore.quantization.FloatFormat of the cache
    COMPUTE: tl.constexpr,        # … in which K, V and the weights are multiplied
    OUT: tl.constexpr,            # … to round the result to with integers, or None for the target's cast
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,         # positions seen, or None
    SOFT_CAP: tl.constexpr,       # or None
    V_IN_K: tl.constexpr,         # whether V is the first K.low elements of K
    HARDWARE_FP8: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,          # whether axis 1 of the grid splits the positions
    MIN_TILES: tl.constexpr,      # fewest tiles of a split
    UNMASKED: tl.constexpr,       # whether tiles that all rows see wholly have a loop of their own
    PRECISION: tl.constexpr,      # of tl.dot
):  # fmt: skip
    """Attention of ROWS rows over one split of the positions."""
    head = tl.program_id(0) % Q.num_kv_heads
    # Later tiles of a prefill see more: they start first, so that short ones fill the gaps at the end.
    tile = tl.num_programs(0) // Q.num_kv_heads - 1 - tl.program_id(0) // Q.num_kv_heads
    if query_start_loc_ptr is None:
        TILES_PER_SEQ: tl.constexpr = (Q.group + ROWS - 1) // ROWS
        seq = tile // TILES_PER_SEQ
        first_row = (tile % TILES_PER_SEQ) * ROWS
        start = seq.to(tl.int64)
        length = start * 0 + 1
        seq_len = tl.load(seq_lens_ptr + seq * Q.lens_stride).to(tl.int32)
    else:
        seq = _find_sequence(query_start_loc_ptr, tile, num_seqs, Q.start_stride, Q.group, ROWS, 1024)
        is_seq = seq < num_seqs
        start = tl.load(query_start_loc_ptr + seq * Q.start_stride).to(tl.int64)
        end = tl.load(query_start_loc_ptr + (seq + 1) * Q.start_stride, mask=is_seq, other=num_tokens).to(tl.int64)
        first_row = (tile - (start * Q.group // ROWS + seq).to(tl.int32)) * ROWS
        start = tl.maximum(start, 0)
        length = tl.minimum(end, num_tokens) - start
        seq_len = tl.load(seq_lens_ptr + seq * Q.lens_stride, mask=is_seq, other=0).to(tl.int32)
    if first_row < length * Q.group:
        # ---- rows
        row = first_row + tl.arange(0, ROWS)
        row_inside = row < length * Q.group
        token = row // Q.group
        q_head = head * Q.group + row % Q.group
        q_row = query_ptr + (start + token) * Q.token_stride + q_head * Q.head_stride
        dim = tl.arange(0, K.low)
        q_mask = row_inside[:, None] & (dim < K.head_size)[None, :]
        q_low = tl.load(q_row[:, None] + dim[None, :] * Q.dim_stride, mask=q_mask, other=0)
        q_low = decode(q_low, Q.format, COMPUTE, False)
        qk_scale = SCALE * LOG2E
        if k_scale_ptr is not None:
            qk_scale = qk_scale * tl.load(k_scale_ptr)
        q_high = q_low
        if K.high > 0:
            dim_high = K.low + tl.arange(0, K.high)
            q_mask = row_inside[:, None] & (dim_high < K.head_size)[None, :]
            q_high = tl.load(q_row[:, None] + dim_high[None, :] * Q.dim_stride, mask=q_mask, other=0)
            q_high = decode(q_high, Q.format, COMPUTE, False)

        # ---- positions that they see
        last_token = tl.minimum((first_row + ROWS - 1) // Q.group, length.to(tl.int32) - 1)
        first_token = first_row // Q.group
        offset = seq_len - length.to(tl.int32)  # position of the first query
        limit = tl.minimum(seq_len, max_blocks * BLOCK_SIZE)
        first = 0
        if CAUSAL:
            limit = tl.minimum(limit, offset + last_token + 1)
            if WINDOW is not None:
                first = tl.maximum(offset + first_token - WINDOW + 1, 0)
        at_layer = tl.full([1], 0, tl.int64)
        if layer is not None:
            if LAYER_IS_POINTER:
                at_layer += tl.load(layer)
            else:
                at_layer += layer
            there = total(((at_layer >= 0) & (at_layer < num_layers)).to(tl.int32), 0)
            limit = tl.where(there > 0, limit, 0)
        end_tile = _cdiv(tl.maximum(limit, 0), TILE)
        first_tile = tl.minimum(first // TILE, end_tile)
        if SPLIT:
            share = tl.maximum(_cdiv(end_tile - first_tile, tl.num_programs(1)), MIN_TILES)
            first_tile = tl.minimum(first_tile + tl.program_id(1) * share, end_tile)
            end_tile = tl.minimum(first_tile + share, end_tile)
        if query_start_loc_ptr is None:
            row_position = offset
        else:
            row_position = offset + token

        # ---- online softmax
        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.full([ROWS], 0.0, tl.float32)
        acc = tl.full([ROWS, V.low], 0.0, tl.float32)
        table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
        BY_ROW: tl.constexpr = query_start_loc_ptr is not None
        if UNMASKED:
            whole = tl.minimum(limit, offset + first_token + 1) if CAUSAL else limit
            end_whole = tl.maximum(tl.minimum(whole // TILE, end_tile), first_tile)
            if WINDOW is not None:
                end_whole = first_tile
            exist = _all_blocks_exist(table_ptr, _cdiv(tl.maximum(limit, 0), BLOCK_SIZE), num_blocks, 1024)
            end_whole = tl.where(exist, end_whole, first_tile)
            m, l, acc = _tiles(
                m, l, acc, q_low, q_high, first_tile, end_whole, limit, row_position, key_cache_ptr, value_cache_ptr,
                table_ptr, head, at_layer, num_blocks, qk_scale, K, V, CACHE, COMPUTE, HARDWARE_FP8, BLOCK_SIZE, TILE,
                STAGES, False, BY_ROW, CAUSAL, WINDOW, SOFT_CAP, V_IN_K, PRECISION,
            )  # fmt: skip
            first_tile = end_whole
        m, l, acc = _tiles(
            m, l, acc, q_low, q_high, first_tile, end_tile, limit, row_position, key_cache_ptr, value_cache_ptr,
            table_ptr, head, at_layer, num_blocks, qk_scale, K, V, CACHE, COMPUTE, HARDWARE_FP8, BLOCK_SIZE, TILE,
            STAGES, True, BY_ROW, CAUSAL, WINDOW, SOFT_CAP, V_IN_K, PRECISION,
        )  # fmt: skip

        # ---- result
        sink = None
        if sinks_ptr is not None and not SPLIT:
            sink = tl.load(sinks_ptr + q_head * Q.sink_stride, mask=row_inside, other=0)
        factor, log = _finish(m, l, sink)
        if v_scale_ptr is not None:
            factor = factor * tl.load(v_scale_ptr)
        result_row = (start + token) * Q.num_heads + q_head
        if SPLIT:
            result_row = result_row * tl.num_programs(1) + tl.program_id(1)
        else:
            log = log * LN2
        tl.store(lse_ptr + result_row, log, mask=row_inside)
        dim_v = tl.arange(0, V.low)
        out_mask = row_inside[:, None] & (dim_v < V.head_size)[None, :]
        if SPLIT:
            tl.store(out_ptr + result_row[:, None] * V.head_size + dim_v[None, :], acc * factor[:, None], mask=out_mask)
        else:
            _store(out_ptr + result_row[:, None] * V.head_size + dim_v[None, :], acc * factor[:, None], out_mask, OUT)


@triton.jit
def merge_attention_kernel(
    part_ptr,      # [num_tokens, num_q_heads, splits, head_size_v] float32
    part_lse_ptr,  # [num_tokens, num_q_heads, splits] float32, to base 2; -inf where a part saw nothing
    sinks_ptr,     # [num_q_heads], or None
    splits,
    out_ptr,       # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,       # [num_tokens, num_q_heads] float32
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SINK_STRIDE: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,  # parts taken at a time
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one row: their average, weighted by their denominators."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, COLUMNS)
    dim_inside = dim < HEAD_SIZE
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.full([1], 0.0, tl.float32)
    acc = tl.full([COLUMNS], 0.0, tl.float32)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        log = tl.load(part_lse_ptr + row * splits + part, mask=part < splits, other=float("-inf"))
        saw = log != float("-inf")
        at = part_ptr + (row * splits + part)[:, None] * HEAD_SIZE + dim[None, :]
        x = tl.load(at, mask=saw[:, None] & dim_inside[None, :], other=0.0)
        m_new = tl.maximum(m, maximum(log, 0))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(log - total(origin, 0))
        shrink = tl.exp2(m - origin)
        l = l * shrink + total(weight, 0)
        acc = acc * shrink + total(x * weight[:, None], 0)
        m = m_new
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (row % NUM_HEADS) * SINK_STRIDE + tl.arange(0, 1))
    factor, log = _finish(m, l, sink)
    tl.store(lse_ptr + row + tl.arange(0, 1), log * LN2)
    _store(out_ptr + row * HEAD_SIZE + dim, acc * factor, dim_inside, OUT)
