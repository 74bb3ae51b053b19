"""Attention over a paged KV cache, for any mix of decode, speculative decoding and chunked prefill.

A program takes a tile of query rows of one sequence, which share a KV head (axis 0 of the grid), and one of the splits
of the positions that they see (axis 1):

    position   n = 0 … seq_len - 1; of the L tokens that a sequence has in query, token t is at position seq_len - L + t
    block      block_tables[seq, n // block_size],   place = n % block_size

    sequences.py   which rows, and which positions they see
    query.py       loads the rows
    tiles.py       takes tiles of positions, one after the other
    words.py       loads K and V
    products.py    multiplies query with K, weights with V
    softmax.py     makes weights of logits

Static scales, of all heads or of each, are part of the factors that make logits of scores (K) and the result of sums
(V). Scales of positions, out of scale caches, are multiplied with scores (K) and with weights (V). Only scales of
groups are multiplied with elements.

Where positions are split, each program leaves a partial result and the logarithm of its normalizer, and
`merge_attention_kernel` makes the result of these.

P is kvcore.plan.attention_constants.AttentionConstants, T the Tile of it that is used.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .address import head_offset, layer_index, scales_of_layer
from .encode import store_rounded
from .query import load_query
from .reduce import total
from .sequences import CHUNK, RowTile, all_blocks_exist, cdiv, find_rows, find_span, has_layer
from .softmax import LN2, finish
from .tiles import Sums, fold_tiles, no_sums
from .words import Pages


class Arrays(NamedTuple):
    """Arguments of the kernel, without those that only `find_rows` and `find_span` need."""

    query_ptr: tl.tensor
    key_cache_ptr: tl.tensor
    value_cache_ptr: tl.tensor
    block_tables_ptr: tl.tensor
    sinks_ptr: tl.tensor
    k_scale_ptr: tl.tensor
    v_scale_ptr: tl.tensor
    layer: tl.tensor
    table_stride: tl.tensor
    num_blocks: tl.tensor
    out_ptr: tl.tensor
    lse_ptr: tl.tensor


@triton.jit
def _attend(arrays, rows, span, CAREFUL: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Attention of a tile of rows over a span of positions. Stores the result.

    Returns 0.0 if all sums of values are finite, else NaN.
    """
    # ---- rows, [ROWS]
    Q: tl.constexpr = P.query
    row = rows.first + tl.arange(0, T.rows)
    inside = row < rows.length * Q.q_per_kv
    token = row // Q.q_per_kv
    q_head = rows.head * Q.q_per_kv + row % Q.q_per_kv
    row_offset = Q.offset + (rows.start + token).to(tl.int64) * Q.token_stride + head_offset(q_head, Q)
    position = span.first_token
    if P.by_row:
        position = span.first_token + token
    query = load_query(arrays.query_ptr, arrays.k_scale_ptr, rows.head, row_offset, inside, position, P, T)

    # ---- positions, tile by tile
    table_ptr = arrays.block_tables_ptr + rows.seq.to(tl.int64) * arrays.table_stride
    pages = Pages(
        arrays.key_cache_ptr, arrays.value_cache_ptr, arrays.k_scale_ptr, arrays.v_scale_ptr, table_ptr,
        arrays.num_blocks, rows.head, layer_index(arrays.layer, P.layer_is_pointer),
    )  # fmt: skip
    first_tile = span.begin // T.positions
    end_tile = cdiv(span.end, T.positions)
    sums = no_sums(P, T)
    if P.whole_tiles and not CAREFUL:
        sums, first_tile = _fold_whole_tiles(sums, query, pages, rows, span, first_tile, end_tile, P, T)
    if P.by_row:  # with masks, each row has a largest scale of its own: [ROWS]
        sums = Sums(sums.m, sums.l, sums.acc, tl.full([T.rows], 0.0, tl.float32) + sums.v_scale_max)
    sums = fold_tiles(sums, query, pages, first_tile, end_tile, span.first, span.limit, True, CAREFUL, P, T)

    # ---- result
    return _store_result(arrays, sums, rows, token, q_head, inside, P)


@triton.jit
def _fold_whole_tiles(sums, query, pages, rows, span, first_tile, end_tile, P: tl.constexpr, T: tl.constexpr):
    """Takes the tiles that every row sees wholly into the sums, without masks.

    Returns the sums, and the first tile that remains.
    """
    Q: tl.constexpr = P.query
    OPTIONS: tl.constexpr = P.options
    limit = span.limit
    if OPTIONS.causal:
        limit = tl.minimum(limit, span.first_token + rows.first // Q.q_per_kv + 1)
    num_entries = cdiv(tl.maximum(span.limit, 0), P.block_size)
    exist = all_blocks_exist(pages.table_ptr, num_entries, pages.num_blocks, tl.arange(0, CHUNK), P)
    end_whole = tl.maximum(tl.minimum(limit // T.positions, end_tile), first_tile)
    end_whole = tl.where(exist, end_whole, first_tile)
    sums = fold_tiles(sums, query, pages, first_tile, end_whole, span.first, span.limit, False, False, P, T)
    return sums, end_whole


@triton.jit
def _store_result(arrays, sums, rows, token, q_head, inside, P: tl.constexpr):
    """Stores the result of rows, or their partial result, and the logarithm of their normalizers.

    `token`, `q_head` and `inside` are `[ROWS]`. Returns 0.0 if all sums of values are finite, else NaN.
    """
    Q: tl.constexpr = P.query
    V: tl.constexpr = P.v
    VS: tl.constexpr = V.scales
    m, l, acc, v_scale_max = sums
    sink = None
    if arrays.sinks_ptr is not None and not P.split:
        sink = tl.load(arrays.sinks_ptr + q_head * Q.sink_stride, mask=inside, other=0)
    WEIGHT: tl.constexpr = 2.0**-P.weight_bits
    factor, log = finish(m, l * WEIGHT, sink)
    factor = factor * WEIGHT
    if VS is not None:
        if not VS.inside:
            factor = factor * v_scale_max
    if arrays.v_scale_ptr is not None:
        if VS is None or VS.inside:
            factor = factor * tl.load(arrays.v_scale_ptr + rows.head * Q.v_scale_stride)
    factor = tl.where(l == 0, 0.0, factor)  # what saw nothing is 0, even where a scale is NaN

    result = (rows.start + token).to(tl.int64) * Q.num_heads + q_head
    if P.split:
        result = result * tl.num_programs(1) + tl.program_id(1)
    else:
        log = log * LN2
    tl.store(arrays.lse_ptr + result, log, mask=inside)
    OUT: tl.constexpr = None if P.split else P.out
    ELEMENTS: tl.constexpr = V.elements_per_word
    word = tl.arange(0, V.main)
    mask = inside[:, None] & (word < V.words)[None, :]
    out = arrays.out_ptr + result[:, None] * (V.words * ELEMENTS) + word[None, :] * ELEMENTS
    for element in tl.static_range(ELEMENTS):
        store_rounded(out + element, acc[element] * factor[:, None], mask, OUT)
    zeros = 0.0
    for element in tl.static_range(ELEMENTS):
        zeros += total(total(acc[element] * 0.0, 1), 0)
    return zeros


@triton.jit(noinline=True)
def _attend_with_care(arrays, rows, span, P: tl.constexpr):
    """Attention of few rows, CAREFUL. It stays a function when compiled, so that the usual way keeps its registers."""
    TILE: tl.constexpr = P.careful_tile
    _attend(arrays, rows, span, True, P, TILE)


@triton.jit
def paged_attention_kernel(
    query_ptr,            # [num_tokens, num_q_heads, head_size]
    key_cache_ptr,        # K's array
    value_cache_ptr,      # V's array
    block_tables_ptr,     # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,         # [num_seqs] int32 or int64
    query_start_loc_ptr,  # [num_seqs + 1] int32 or int64, or None for one token a sequence
    sinks_ptr,            # [num_q_heads], or None
    k_scale_ptr,          # float32: one, one a head, rows of such for all layers, or one a token and head; None for 1
    v_scale_ptr,          # … of V
    layer,                # one integer in memory (P.layer_is_pointer), an integer, or None
    num_tokens,           # rows of query
    num_seqs,             # rows of block_tables
    max_blocks,           # entries of a row of block_tables
    table_stride,         # elements from one row of block_tables to the next
    num_blocks,           # of one layer
    num_layers,           # 1 where the cache has no axis layer
    out_ptr,              # [num_tokens, num_q_heads, head_size_v]; P.split: […, splits, head_size_v] float32
    lse_ptr,              # [num_tokens, num_q_heads] float32; P.split: [num_tokens, num_q_heads, splits], to base 2
    P: tl.constexpr,      # kvcore.plan.attention_constants.AttentionConstants
):  # fmt: skip
    """Attention of a tile of rows over one split of the positions."""
    TILE: tl.constexpr = P.tile
    Q: tl.constexpr = P.query
    if k_scale_ptr is not None:
        k_scale_ptr = scales_of_layer(k_scale_ptr, layer, num_layers, P.layer_is_pointer, Q.k_layer_scale_stride)
    if v_scale_ptr is not None:
        v_scale_ptr = scales_of_layer(v_scale_ptr, layer, num_layers, P.layer_is_pointer, Q.v_layer_scale_stride)
    lanes = tl.arange(0, CHUNK)
    rows, end, seq_len = find_rows(query_start_loc_ptr, seq_lens_ptr, num_tokens, num_seqs, lanes, P, TILE)
    if rows.first < rows.length * Q.q_per_kv:
        span = find_span(rows, end, seq_len, max_blocks, has_layer(layer, num_layers, P), P, TILE)
        arrays = Arrays(
            query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, layer,
            table_stride, num_blocks, out_ptr, lse_ptr,
        )  # fmt: skip
        zeros = _attend(arrays, rows, span, False, P, TILE)
        if P.by_row:
            # An infinite or NaN value that only some rows see spoils the others, as 0 times that is NaN. If a sum is
            # not finite, all rows are computed again, a few at a time, in a way that is slow but safe from that.
            if zeros != 0.0:
                tl.debug_barrier()  # other threads of the program may write the same elements
                CAREFUL: tl.constexpr = P.careful_tile
                for part in range(TILE.rows // CAREFUL.rows):
                    part_rows = RowTile(rows.head, rows.seq, rows.start, rows.length, rows.first + part * CAREFUL.rows)
                    _attend_with_care(arrays, part_rows, span, P)
