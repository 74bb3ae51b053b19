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

from ..reduce import total
from .careful import sees
from .mla_shared import BLOCK, CHUNKS, HALF, ROWS, chunk, copied, empty, expect_chunks, find_blocks, load_chunk
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
        expect_chunks(arrived, CHUNKS)
        blocks = find_blocks(arrays, work, begin, P, H)
        for C in gl.static_range(CHUNKS):
            load_chunk(desc, chunk(shared.keys, SIDE, C), arrived, blocks, C, arrays, begin, P, H)
        mbarrier.wait(arrived, j & 1)

        scores = start_scores(shared, j, SIDE, False)  # before V, which is a part of K, is changed
        scores = warpgroup_mma_wait(0, deps=(scores,))
        m, l, weights, shrink = weigh(scores, m, l, arrays, work, holes, j, position, P)
        acc = gl.where(gl.abs(acc) < float("inf"), shrunk(acc, shrink), acc)
        acc = _take_infinite(acc, weights, values, arrays, work, begin, position, P)
        weights = gl.convert_layout(weights.to(values.dtype), operands(HALF))
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(weights, values, acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    return m, l, acc


@gluon.jit
def _take_infinite(acc, weights, values, arrays, work, begin, position, P: gl.constexpr):
    """Adds what is not finite to the sums of the rows that see it, and clears it in shared memory.

    Such a value is a part of K, too: its weight may be 0, and then the sum is NaN.
    """
    position = gl.convert_layout(position, rows_of(HALF))
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, products(BLOCK)))
    for place in range(BLOCK):
        # In the layout of sums, [1, HALF]: each thread has its columns.
        index = gl.full([HALF], place, gl.int32, gl.SliceLayout(0, products(HALF)))[None, :]
        v = values.gather(index, axis=0)
        infinite = ~(gl.abs(v.to(gl.float32)) < float("inf"))
        if total(total(infinite.to(gl.int32), 1), 0) > 0:
            seen = sees(begin + place, position, arrays, work, P)
            weight = total(gl.where((column == place)[None, :], weights, 0.0), 1)
            weight = gl.convert_layout(weight, rows_of(HALF))[:, None]
            acc = gl.where(seen[:, None] & infinite, acc + weight * v.to(gl.float32), acc)
            gl.barrier()  # all have read it
            values.scatter(gl.where(infinite, gl.zeros_like(v), v), index, axis=0)
    return acc
