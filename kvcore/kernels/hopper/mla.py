"""Attention over a latent cache (MLA) for Hopper: K by TMA, products by wgmma, in Gluon.

A head of K has 576 elements, of which the first 512 are V and the last 64 rotary ones. A program takes 64 query rows:
that many heads, for all share the one KV head. Their sums, 64 × 512, fill the registers of two warpgroups, so each has
a half of the columns. Positions are taken two blocks of 64 at a time, and each warpgroup makes weights of one of them:

    producers  2 × 1 warp: copy blocks of K into shared memory, a box of positions at a time   mla_producer.py
    left       4 warps: weights of the first block;  columns 0 … 255 of V, of both blocks      mla_consumer.py
    right      4 warps: weights of the second block; columns 256 … 511 of V, of both blocks    mla_consumer.py
               … and again, where a value is infinite or NaN that only some rows see           mla_careful.py

Shared memory; s = 0, 1 is the block of a pair:

    query    left, right [1, 64, 256], rotary [1, 64, 64]
    keys     left, right [2, 64, 256], rotary [2, 64, 64]; once its scores are known, rotary holds the block's weights
    maxima   [2, 64]    the running maximum after each block, for the other warpgroup
    sums     [2, 64]    of the weights that each warpgroup made
    barriers            see `mla_shared.py`

P is kvcore.plan.attention_constants.AttentionConstants, H is kvcore.plan.hopper.LatentConstants.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .mla_consumer import attend
from .mla_producer import produce
from .mla_shared import CONSUMER_REGISTERS, PRODUCER_REGISTERS, allocate
from .program import find_program


@gluon.jit
def hopper_mla_kernel(
    query_ptr,            # [num_tokens, num_q_heads, 576]
    key_cache_ptr,        # as a TMA descriptor: [layer,] block, head, slot, dim
    value_cache_ptr,      # the same array; not used
    block_tables_ptr,     # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,         # [num_seqs] int32 or int64
    query_start_loc_ptr,  # [num_seqs + 1] int32 or int64, or None
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
    out_ptr,              # [num_tokens, num_q_heads, 512]; P.split: […, splits, 512] float32
    lse_ptr,              # [num_tokens, num_q_heads] float32; P.split: [num_tokens, num_q_heads, splits], to base 2
    P: gl.constexpr,      # kvcore.plan.attention_constants.AttentionConstants
    H: gl.constexpr,      # kvcore.plan.hopper.LatentConstants
):  # fmt: skip
    """Attention of 64 query rows over one split of the positions."""
    Q: gl.constexpr = P.query
    rows, work, arrays = find_program(
        query_ptr, block_tables_ptr, seq_lens_ptr, query_start_loc_ptr, sinks_ptr, layer, num_tokens, num_seqs,
        max_blocks, table_stride, num_blocks, num_layers, out_ptr, lse_ptr, P,
    )  # fmt: skip
    if rows.first < rows.length * Q.q_per_kv:
        shared = allocate(key_cache_ptr.dtype)
        gl.warp_specialize(
            [
                (attend, (arrays, rows, work, key_cache_ptr, shared, 0, P, H)),
                (attend, (arrays, rows, work, key_cache_ptr, shared, 1, P, H)),
                (produce, (arrays, work, key_cache_ptr, shared, 0, P, H)),
                (produce, (arrays, work, key_cache_ptr, shared, 1, P, H)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
