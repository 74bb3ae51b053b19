"""Attention of many query rows over a paged KV cache, for Hopper: K and V by TMA, products by wgmma, in Gluon.

A program takes 128 query rows of one sequence that share a KV head, as `paged_attention_kernel` does with its
widest tiles, and gives the same meaning to every argument. Its warps have three kinds of work:

    producers    2 × 1 warp: copy tiles of K, and of V, into shared memory, a box of positions at a time   producer.py
    consumers    2 × 4 warps: 64 rows each; scores, weights, sums                                          consumer.py
                 … and again, where a value is infinite or NaN that only some rows see                     careful.py

Shared memory, for stages s = 0 … STAGES - 1; W is H.piece, the columns of K that one product takes:

    k_tiles  [STAGES * pieces, POSITIONS, W]     K of a tile; stage s has pieces s·pieces … + pieces - 1
    v_tiles  [STAGES, POSITIONS, head_size_v]    V of a tile
    q_rows   [2 * pieces, 64, W]                 of each consumer
    barriers [4 * STAGES + 3]                    full_k, full_v, empty_k, empty_v of each stage; landed; copied, of each

A copy takes 64 columns of a box, which is the largest power of two of positions that lie in one block and fit in a
tile. What does not exist (past the end, before the window, in a hole of the block table) is a box outside the cache:
TMA fills it with zeros.

P is kvcore.plan.attention_constants.AttentionConstants, H is kvcore.plan.hopper.HopperConstants.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .consumer import consume
from .producer import produce_keys, produce_values
from .program import find_program
from .shared import allocate


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
    Q: gl.constexpr = P.query
    rows, work, arrays = find_program(
        query_ptr, block_tables_ptr, seq_lens_ptr, query_start_loc_ptr, sinks_ptr, layer, num_tokens, num_seqs,
        max_blocks, table_stride, num_blocks, num_layers, out_ptr, lse_ptr, P,
    )  # fmt: skip
    if rows.first < rows.length * Q.q_per_kv:
        shared = allocate(key_cache_ptr.dtype, P, H)
        # Then come warps, and registers of a thread, of the parts but the first, which has 4 warps and what is left.
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
