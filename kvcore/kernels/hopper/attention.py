"""Attention of many query rows over a paged KV cache, for Hopper: K and V by TMA, products by wgmma, in Gluon.

A program takes 128 or 192 query rows of one sequence that share a KV head, as `paged_attention_kernel` does with its
widest tiles, and gives the same meaning to every argument. Its warps have three kinds of work:

    producers    2 × 1 warp: copy tiles of K, and of V, into shared memory, a box of positions at a time   producer.py
    consumers    2 or 3 × 4 warps: 64 rows each; scores, weights, sums                                     consumer.py
                 … and again, where a value is infinite or NaN that only some rows see                     careful.py

Shared memory; W is H.piece, the columns of K that one product takes. V has a stage more than K where there is room: it
is needed sooner after a stage is free.

    k_tiles  [STAGES * pieces, POSITIONS, W]     K of a tile; stage s has pieces s·pieces … + pieces - 1
    v_tiles  [V_STAGES, POSITIONS, head_size_v]  V of a tile
    q_rows   [consumers * pieces, 64, W]         of each consumer, where its registers have no room for them
    barriers [2 * STAGES + 2 * V_STAGES + 1 + consumers]
                                                 full_k, empty_k, full_v, empty_v of each stage; V has landed; copied,
                                                 of each consumer

A copy takes 64 columns of a box, which is the largest power of two of positions that lie in one block and fit in a
tile. What does not exist (past the end, before the window, in a hole of the block table) is a box outside the cache:
TMA fills it with zeros.

P is kvcore.plan.attention_constants.AttentionConstants, H is kvcore.plan.hopper.HopperConstants.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..sequences import CHUNK, cdiv, find_rows, find_span
from .consumer import consume
from .producer import produce_keys, produce_values
from .shared import Shared, make_barriers, shared_layout


class Arrays(NamedTuple):
    """Arguments of the kernel, and what a program found of them."""

    query_ptr: gl.tensor
    sinks_ptr: gl.tensor
    table_ptr: gl.tensor  # the sequence's row of block_tables
    num_blocks: gl.tensor
    layer: gl.tensor  # its index; 0 where the cache has no axis for it
    out_ptr: gl.tensor
    lse_ptr: gl.tensor


class Work(NamedTuple):
    """What the warps of a program share: tiles first_tile … first_tile + num_tiles - 1."""

    first_tile: gl.tensor
    num_tiles: gl.tensor
    begin_whole: gl.tensor  # tiles begin_whole … end_whole - 1, counted from first_tile, need no masks,
    end_whole: gl.tensor  #   unless the block table has holes
    first_token: gl.tensor  # as in Span
    first: gl.tensor
    limit: gl.tensor


@gluon.jit
def hopper_attention_kernel(
    query_ptr,            # [num_tokens, num_q_heads, head_size]
    key_cache_ptr,        # K, as a TMA descriptor: [layer,] block, head, slot, dim
    value_cache_ptr,      # V, the same
    block_tables_ptr,     # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,         # [num_seqs] int32 or int64
    query_start_loc_ptr,  # [num_seqs + 1] int32 or int64
    sinks_ptr,            # [num_q_heads], or None
    k_scale_ptr,          # None: such caches are not quantised
    v_scale_ptr,          # None
    layer,                # one integer in memory (P.layer_is_pointer), an integer, or None
    num_tokens,           # rows of query
    num_seqs,             # rows of block_tables
    max_blocks,           # entries of a row of block_tables
    table_stride,         # elements from one row of block_tables to the next
    num_blocks,           # of one layer
    num_layers,           # 1 where the cache has no axis layer
    out_ptr,              # [num_tokens, num_q_heads, head_size_v]; P.split: […, splits, head_size_v] float32
    lse_ptr,              # [num_tokens, num_q_heads] float32; P.split: [num_tokens, num_q_heads, splits], to base 2
    P: gl.constexpr,      # kvcore.plan.attention_constants.AttentionConstants
    H: gl.constexpr,      # kvcore.plan.hopper.HopperConstants
):  # fmt: skip
    """Attention of a tile of query rows over one split of the positions."""
    T: gl.constexpr = P.tile
    Q: gl.constexpr = P.query
    index: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    lanes = gl.arange(0, CHUNK, layout=index)
    layer_id = gl.to_tensor(0)
    layer_exists = None
    if layer is not None:
        layer_id, layer_exists = _find_layer(layer, num_layers, P)
    rows, end, seq_len = find_rows(query_start_loc_ptr, seq_lens_ptr, num_tokens, num_seqs, lanes, P, T)
    if rows.first < rows.length * Q.q_per_kv:
        span = find_span(rows, end, seq_len, max_blocks, layer_exists, P, T)
        table_ptr = block_tables_ptr + rows.seq.to(gl.int64) * table_stride
        work = _find_work(rows, span, P, T)
        arrays = Arrays(query_ptr, sinks_ptr, table_ptr, num_blocks, layer_id, out_ptr, lse_ptr)
        shared = _allocate(key_cache_ptr.dtype, P, H)
        # Then come warps, and registers of a thread, of the parts but the first, which has 4 warps and what is left.
        if H.consumers == 2:
            gl.warp_specialize(
                [
                    (consume, (arrays, rows, work, key_cache_ptr, value_cache_ptr, shared, 0, P, H)),
                    (consume, (arrays, rows, work, key_cache_ptr, value_cache_ptr, shared, 1, P, H)),
                    (produce_keys, (arrays, rows.head, work, key_cache_ptr, shared, P, H)),
                    (produce_values, (arrays, rows.head, work, value_cache_ptr, shared, P, H)),
                ],
                [4, 1, 1],
                [240, 24, 24],
            )
        else:
            gl.warp_specialize(
                [
                    (consume, (arrays, rows, work, key_cache_ptr, value_cache_ptr, shared, 0, P, H)),
                    (consume, (arrays, rows, work, key_cache_ptr, value_cache_ptr, shared, 1, P, H)),
                    (consume, (arrays, rows, work, key_cache_ptr, value_cache_ptr, shared, 2, P, H)),
                    (produce_keys, (arrays, rows.head, work, key_cache_ptr, shared, P, H)),
                    (produce_values, (arrays, rows.head, work, value_cache_ptr, shared, P, H)),
                ],
                [4, 4, 1, 1],
                [160, 160, 32, 32],
            )


@gluon.jit
def _find_layer(layer, num_layers, P: gl.constexpr):
    """The layer's index, and whether the cache has it."""
    if P.layer_is_pointer:
        layer = gl.load(layer)
    exists = (layer >= 0) & (layer < num_layers)
    return gl.where(exists, layer, 0).to(gl.int32), exists


@gluon.jit
def _find_work(rows, span, P: gl.constexpr, T: gl.constexpr):
    """The tiles of a program, and which of them every row sees wholly."""
    Q: gl.constexpr = P.query
    OPTIONS: gl.constexpr = P.options
    first_tile = span.begin // T.positions
    end_tile = cdiv(span.end, T.positions)
    limit = span.limit
    begin_whole = first_tile
    if OPTIONS.causal:
        limit = gl.minimum(limit, span.first_token + rows.first // Q.q_per_kv + 1)
        if OPTIONS.sliding_window is not None:
            # In 64 bits: a window may be as long as the longest sequence.
            last_token = gl.minimum((rows.first + T.rows - 1) // Q.q_per_kv, rows.length - 1)
            seen = (span.first_token + last_token).to(gl.int64) - (OPTIONS.sliding_window - 1)
            begin_whole = cdiv(gl.maximum(seen, 0), T.positions).to(gl.int32)
    begin_whole = gl.minimum(gl.maximum(begin_whole, first_tile), end_tile)
    end_whole = gl.maximum(gl.minimum(gl.maximum(limit, 0) // T.positions, end_tile), begin_whole)
    return Work(
        first_tile, gl.maximum(end_tile - first_tile, 0), begin_whole - first_tile, end_whole - first_tile,
        span.first_token, span.first, span.limit,
    )  # fmt: skip


@gluon.jit
def _allocate(dtype: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Shared memory, with barriers that nothing has arrived at."""
    T: gl.constexpr = P.tile
    V: gl.constexpr = P.v
    COUNT: gl.constexpr = T.stages * H.pieces
    k_tiles = gl.allocate_shared_memory(dtype, [COUNT, T.positions, H.piece], shared_layout(H.piece))
    v_tiles = gl.allocate_shared_memory(dtype, [H.v_stages, T.positions, V.main], shared_layout(V.main))
    q_rows = None
    if H.query_in_shared:
        ROWS: gl.constexpr = T.rows // H.consumers
        q_rows = gl.allocate_shared_memory(dtype, [H.consumers * H.pieces, ROWS, H.piece], shared_layout(H.piece))
    return Shared(k_tiles, v_tiles, q_rows, make_barriers(P, H))
