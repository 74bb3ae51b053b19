"""Attention again, where infinite or NaN values spoil rows that do not see them: 0 times such a value is NaN.

A consumer copies tiles for itself, into a stage that the others have left, clears what is not finite, and multiplies.
Infinite values and NaN are then added row by row where the row sees them: one is enough to make the sum infinite or
NaN, whatever its weight. That is slow, and rare.
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
from .shared import ROWS, copied, empty_k, empty_v, expect_tile, find_blocks, load_keys, load_values
from .tiles import as_operand, products, rows_of, shrunk, start_scores, weigh


@gluon.jit
def attend_carefully(arrays, head, work, holes, position, k_desc, v_desc, shared, CONSUMER: gl.constexpr,
                     P: gl.constexpr, H: gl.constexpr):  # fmt: skip
    """The running maximum, the normalizer and the sums of 64 rows, as `consumer._attend` gives them."""
    T: gl.constexpr = P.tile
    V: gl.constexpr = P.v
    dtype: gl.constexpr = arrays.query_ptr.dtype.element_ty
    m = gl.full([ROWS], float("-inf"), gl.float32, rows_of(T.positions))
    l = gl.full([ROWS], 0.0, gl.float32, rows_of(T.positions))
    acc = gl.zeros([ROWS, V.main], gl.float32, products(V.main))
    # Each consumer has a stage of its own. Both must have used it for the last time.
    used = ((work.num_tiles - CONSUMER + T.stages - 1) // T.stages) & 1
    mbarrier.wait(empty_k(shared, CONSUMER, P), used ^ 1)
    mbarrier.wait(empty_v(shared, CONSUMER, P), used ^ 1)
    arrived = copied(shared, CONSUMER, P)
    for i in range(work.num_tiles):
        tile = work.first_tile + i
        fence_async_shared()
        gl.barrier()
        expect_tile(arrived, H.pieces * H.piece + V.main, P)
        blocks = find_blocks(arrays, work, tile, H.k_origin, P, H)
        load_keys(k_desc, shared, CONSUMER, arrived, blocks, arrays, head, tile, P, H)
        blocks = find_blocks(arrays, work, tile, H.v_origin, P, H)
        load_values(v_desc, shared, CONSUMER, arrived, blocks, arrays, head, tile, P, H)
        mbarrier.wait(arrived, i & 1)

        acc = take_infinite(acc, None, shared.v_tiles.index(CONSUMER), arrays, work, tile * T.positions, position, P)
        scores = start_scores(shared, i, CONSUMER, CONSUMER, P, H)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        m, l, weights, shrink = weigh(scores, m, l, arrays, work, holes, tile, position, True, P)
        weights = as_operand(weights, dtype, P)
        acc = gl.where(gl.abs(acc) < float("inf"), shrunk(acc, shrink, P), acc)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(weights, shared.v_tiles.index(CONSUMER), acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    return m, l, acc


@gluon.jit
def take_infinite(acc, weights, values, arrays, work, begin, position, P: gl.constexpr):
    """Adds what is not finite to the sums of the rows that see it, and clears it in shared memory.

    Args:
        acc: Sums, `[64, columns]`.
        weights: `[64, positions]`: of a value that is a part of K, too, and then the weight may be 0, the sum NaN. None
            where weights are above 0.
        values: `[positions, columns]`.
        arrays: As all below, of the program.
        work: Its tiles.
        begin: The first of values' positions.
        position: That of each row's token.
        P: All constants.
    """
    POSITIONS: gl.constexpr = values.shape[0]
    COLUMNS: gl.constexpr = values.shape[1]
    position = gl.convert_layout(position, rows_of(COLUMNS))
    for place in range(POSITIONS):
        # In the layout of sums, [1, COLUMNS]: each thread has its columns.
        index = gl.full([COLUMNS], place, gl.int32, gl.SliceLayout(0, products(COLUMNS)))[None, :]
        v = values.gather(index, axis=0)
        infinite = ~(gl.abs(v.to(gl.float32)) < float("inf"))
        if total(total(infinite.to(gl.int32), 1), 0) > 0:
            weighted = v.to(gl.float32)
            if weights is not None:
                column = gl.arange(0, POSITIONS, layout=gl.SliceLayout(0, products(POSITIONS)))
                weight = total(gl.where((column == place)[None, :], weights, 0.0), 1)
                weighted = gl.convert_layout(weight, rows_of(COLUMNS))[:, None] * weighted
            seen = _sees(begin + place, position, arrays, work, P)
            acc = gl.where(seen[:, None] & infinite, acc + weighted, acc)
            gl.barrier()  # all have read it
            values.scatter(gl.where(infinite, gl.zeros_like(v), v), index, axis=0)
    return acc


@gluon.jit
def _sees(n, position, arrays, work, P: gl.constexpr):
    """Which rows see position n, `[64]`."""
    Q: gl.constexpr = P.query
    OPTIONS: gl.constexpr = P.options
    exists = n < work.limit
    block = gl.load(arrays.table_ptr + n // P.block_size * Q.table_step, mask=exists, other=-1)
    exists = (block >= 0) & (block < arrays.num_blocks)
    seen = (n <= position) & exists
    if OPTIONS.sliding_window is not None:
        seen = seen & (position - n < OPTIONS.sliding_window)
    return seen
