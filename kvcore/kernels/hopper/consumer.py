"""Warps that attend: scores, weights and sums of 64 query rows.

The product of weights with V of a tile runs while the weights of the next one are computed:

    scores of tile i          are issued, then the product of weights of i - 1 with V
    scores arrive             K's stage is free
    weights of tile i         while that product runs
    sums of tile i - 1        arrive; V's stage is free; they shrink to the new running maximum

The first tile is taken with masks, whether it needs them or not; of the others, only those that do.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..reduce import total
from .careful import attend_carefully
from .result import store_result
from .shared import ROWS, empty_k, empty_v, full_k, full_v
from .tiles import as_operand, has_holes, load_query, products, rows_of, shrunk, start_scores, weigh


@gluon.jit
def consume(arrays, rows, work, k_desc, v_desc, shared, CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Attends with a half of the program's rows, and stores the result."""
    T: gl.constexpr = P.tile
    Q: gl.constexpr = P.query
    V: gl.constexpr = P.v
    first_row = rows.first + CONSUMER * ROWS
    if first_row < rows.length * Q.q_per_kv:
        m = gl.full([ROWS], float("-inf"), gl.float32, rows_of(T.positions))
        l = gl.full([ROWS], 0.0, gl.float32, rows_of(T.positions))
        acc = gl.zeros([ROWS, V.main], gl.float32, products(V.main))
        if work.num_tiles > 0:
            load_query(arrays, rows, first_row, shared, CONSUMER, P, H)
            row = first_row + gl.arange(0, ROWS, layout=rows_of(T.positions))
            position = work.first_token + row // Q.q_per_kv
            holes = has_holes(arrays, work, P)
            m, l, acc = _attend(arrays, work, holes, position, m, l, acc, shared, CONSUMER, P, H)
            if P.by_row:
                spoilt = total(total(acc * 0.0, 1), 0)
                if spoilt != 0.0:
                    m, l, acc = attend_carefully(
                        arrays, rows.head, work, holes, position, k_desc, v_desc, shared, CONSUMER, P, H
                    )
        store_result(m, l, acc, arrays, rows, first_row, 0, True, P)
    else:
        _use_nothing(work, shared, P)


@gluon.jit
def _use_nothing(work, shared, P: gl.constexpr):
    """Leaves all stages to the other consumer."""
    T: gl.constexpr = P.tile
    for i in range(work.num_tiles):
        stage = i % T.stages
        phase = (i // T.stages) & 1
        mbarrier.wait(full_k(shared, stage, P), phase)
        mbarrier.arrive(empty_k(shared, stage, P), count=1)
        mbarrier.wait(full_v(shared, stage, P), phase)
        mbarrier.arrive(empty_v(shared, stage, P), count=1)


@gluon.jit
def _attend(arrays, work, holes, position, m, l, acc, shared, CONSUMER: gl.constexpr, P: gl.constexpr,
            H: gl.constexpr):  # fmt: skip
    """Takes all tiles into m, l and acc."""
    T: gl.constexpr = P.tile
    OPTIONS: gl.constexpr = P.options
    dtype: gl.constexpr = arrays.query_ptr.dtype.element_ty
    mbarrier.wait(full_k(shared, 0, P), 0)
    scores = start_scores(shared, work.num_tiles, 0, CONSUMER, P, H)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(empty_k(shared, 0, P), count=1)
    m, l, weights, _ = weigh(scores, m, l, arrays, work, holes, work.first_tile, position, True, P)
    state = (m, l, acc, as_operand(weights, dtype, P))

    begin = gl.maximum(work.begin_whole, 1)
    end = gl.where(holes, begin, work.end_whole)
    if OPTIONS.sliding_window is not None:
        state = _fold_tiles(state, 1, begin, arrays, work, holes, position, shared, True, CONSUMER, P, H)
    state = _fold_tiles(state, begin, end, arrays, work, holes, position, shared, False, CONSUMER, P, H)
    begin = gl.maximum(end, begin)
    state = _fold_tiles(state, begin, work.num_tiles, arrays, work, holes, position, shared, True, CONSUMER, P, H)

    m, l, acc, weights = state
    last = work.num_tiles - 1
    mbarrier.wait(full_v(shared, last % T.stages, P), (last // T.stages) & 1)
    acc = warpgroup_mma(weights, shared.v_tiles.index(last % T.stages), acc, is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(empty_v(shared, last % T.stages, P), count=1)
    return m, l, acc


@gluon.jit
def _fold_tiles(state, begin, end, arrays, work, holes, position, shared, MASKED: gl.constexpr,
                CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):  # fmt: skip
    """Takes tiles begin … end - 1 into m, l and acc, except for the last one's weights, which are in the state."""
    T: gl.constexpr = P.tile
    dtype: gl.constexpr = arrays.query_ptr.dtype.element_ty
    for i in range(begin, end):
        m, l, acc, weights = state
        stage = i % T.stages
        before = (i - 1) % T.stages
        mbarrier.wait(full_k(shared, stage, P), (i // T.stages) & 1)
        scores = start_scores(shared, i, stage, CONSUMER, P, H)
        mbarrier.wait(full_v(shared, before, P), ((i - 1) // T.stages) & 1)
        acc = warpgroup_mma(weights, shared.v_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(empty_k(shared, stage, P), count=1)

        m, l, new_weights, shrink = weigh(scores, m, l, arrays, work, holes, work.first_tile + i, position, MASKED, P)
        new_weights = as_operand(new_weights, dtype, P)
        # ptxas would compute most weights after the product, which is to run beside them, but for a branch between
        # them. Here that is the branch of a barrier that was waited for above.
        mbarrier.wait(full_v(shared, before, P), ((i - 1) // T.stages) & 1)
        # The old weights' registers are read until then.
        acc, _, new_weights, l = warpgroup_mma_wait(0, deps=(acc, weights, new_weights, l))
        mbarrier.arrive(empty_v(shared, before, P), count=1)
        state = (m, l, shrunk(acc, shrink, P), new_weights)
    return state
