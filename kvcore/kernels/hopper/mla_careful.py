"""MLA again, where infinite or NaN values spoil rows that do not see them: see `careful.py`.

A warpgroup works alone: it copies blocks into the one of the pair that is its own, once nobody uses that any more,
makes all weights itself, and sums its half of the columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .careful import take_infinite
from .mla_shared import BLOCK, HALF, ROWS, STRIPES, copied, empty, expect_stripes, find_blocks, load_stripe, stripe
from .mla_tiles import shrunk, start_scores, weigh
from .tiles import operands, products, rows_of


@gluon.jit
def attend_carefully(arrays, work, holes, position, desc, shared, SIDE: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """The running maximum, the normalizer and the sums of 64 rows, for a side's half of the columns."""
    m = gl.full([ROWS], float("-inf"), gl.float32, rows_of(BLOCK))
    l = gl.full([ROWS], 0.0, gl.float32, rows_of(BLOCK))
    acc = gl.zeros([ROWS, HALF], gl.float32, products(HALF))
    used = (work.num_tiles - 1) & 1
    mbarrier.wait(empty(shared, SIDE, 0), used)
    mbarrier.wait(empty(shared, SIDE, 1), used)
    values = shared.keys.left.index(SIDE)
    if SIDE == 1:
        values = shared.keys.right.index(SIDE)
    arrived = copied(shared, SIDE)
    for j in range(2 * work.num_tiles):
        begin = (2 * work.first_tile + j) * BLOCK
        fence_async_shared()
        gl.barrier()
        expect_stripes(arrived, STRIPES)
        blocks = find_blocks(arrays, work, begin, P, H)
        for C in gl.static_range(STRIPES):
            load_stripe(desc, stripe(shared.keys, SIDE, C), arrived, blocks, C, arrays, begin, P, H)
        mbarrier.wait(arrived, j & 1)

        scores = start_scores(shared, j, SIDE, False)  # before V, which is a part of K, is changed
        scores = warpgroup_mma_wait(0, deps=(scores,))
        m, l, weights, shrink = weigh(scores, m, l, arrays, work, holes, j, position, P)
        acc = gl.where(gl.abs(acc) < float("inf"), shrunk(acc, shrink), acc)
        acc = take_infinite(acc, weights, values, arrays, work, begin, position, P)
        weights = gl.convert_layout(weights.to(values.dtype), operands(HALF))
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(weights, values, acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    return m, l, acc
