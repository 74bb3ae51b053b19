"""Warps that attend: scores, weights and sums of 64 query rows.

The product of weights with V of a tile runs while the weights of the next one are computed:

    scores of tile i          are issued, then the product of weights of i - 1 with V
    scores arrive             K's stage is free
    weights of tile i         while that product runs
    sums of tile i - 1        arrive; V's stage is free; they shrink to the new running maximum

With H.turns, consumers issue products by turns, so that one's run while the others compute weights.

The first tile is taken with masks, whether it needs them or not; of the others, only those that do.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..reduce import total
from ..softmax import LN2, finish
from .careful import attend_carefully
from .shared import empty_k, empty_v, full_k, full_v, give_turn, take_turn
from .tiles import as_operand, has_holes, load_query, products, rows_of, shrunk, start_scores, weigh


@gluon.jit
def consume(arrays, rows, work, k_desc, v_desc, shared, CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Attends with a half of the program's rows, and stores the result."""
    T: gl.constexpr = P.tile
    Q: gl.constexpr = P.query
    V: gl.constexpr = P.v
    ROWS: gl.constexpr = T.rows // H.consumers
    first_row = rows.first + CONSUMER * ROWS
    if first_row < rows.length * Q.q_per_kv:
        m = gl.full([ROWS], float("-inf"), gl.float32, rows_of(T.positions))
        l = gl.full([ROWS], 0.0, gl.float32, rows_of(T.positions))
        acc = gl.zeros([ROWS, V.main], gl.float32, products(V.main))
        if work.num_tiles > 0:
            query = load_query(arrays, rows, first_row, shared, CONSUMER, P, H)
            row = first_row + gl.arange(0, ROWS, layout=rows_of(T.positions))
            position = work.first_token + row // Q.q_per_kv
            holes = has_holes(arrays, work, P)
            m, l, acc = _attend(query, arrays, work, holes, position, m, l, acc, shared, CONSUMER, P, H)
            if P.by_row:
                spoilt = total(total(acc * 0.0, 1), 0)
                if spoilt != 0.0:
                    m, l, acc = attend_carefully(
                        query, arrays, rows.head, work, holes, position, k_desc, v_desc, shared, CONSUMER, P, H
                    )
        _store_result(arrays, rows, first_row, m, l, acc, P)
    else:
        _use_nothing(work, shared, CONSUMER, P, H)


@gluon.jit
def _use_nothing(work, shared, CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Leaves all stages to the other consumers."""
    T: gl.constexpr = P.tile
    for i in range(work.num_tiles):
        take_turn(CONSUMER, H)
        give_turn(CONSUMER, H)
        stage = i % T.stages
        mbarrier.wait(full_k(shared, stage, P, H), (i // T.stages) & 1)
        mbarrier.arrive(empty_k(shared, stage, P, H), count=1)
        stage = i % H.v_stages
        mbarrier.wait(full_v(shared, stage, P, H), (i // H.v_stages) & 1)
        mbarrier.arrive(empty_v(shared, stage, P, H), count=1)


@gluon.jit
def _attend(query, arrays, work, holes, position, m, l, acc, shared, CONSUMER: gl.constexpr, P: gl.constexpr,
            H: gl.constexpr):  # fmt: skip
    """Takes all tiles into m, l and acc."""
    OPTIONS: gl.constexpr = P.options
    dtype: gl.constexpr = arrays.query_ptr.dtype.element_ty
    mbarrier.wait(full_k(shared, 0, P, H), 0)
    if CONSUMER > 0:
        take_turn(CONSUMER, H)
    scores = start_scores(query, shared, work.num_tiles, 0, CONSUMER, P, H)
    give_turn(CONSUMER, H)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(empty_k(shared, 0, P, H), count=1)
    m, l, weights, _ = weigh(scores, m, l, arrays, work, holes, work.first_tile, position, True, P)
    state = (m, l, acc, as_operand(weights, dtype, P))

    begin = gl.maximum(work.begin_whole, 1)
    end = gl.where(holes, begin, work.end_whole)
    if OPTIONS.sliding_window is not None:
        state = _fold_tiles(state, 1, begin, query, arrays, work, holes, position, shared, True, CONSUMER, P, H)
    state = _fold_tiles(state, begin, end, query, arrays, work, holes, position, shared, False, CONSUMER, P, H)
    begin = gl.maximum(end, begin)
    state = _fold_tiles(
        state, begin, work.num_tiles, query, arrays, work, holes, position, shared, True, CONSUMER, P, H
    )

    m, l, acc, weights = state
    last = work.num_tiles - 1
    if CONSUMER == 0:  # so that there are as many turns as were given
        take_turn(CONSUMER, H)
    mbarrier.wait(full_v(shared, last % H.v_stages, P, H), (last // H.v_stages) & 1)
    acc = warpgroup_mma(weights, shared.v_tiles.index(last % H.v_stages), acc, is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(empty_v(shared, last % H.v_stages, P, H), count=1)
    return m, l, acc


@gluon.jit
def _fold_tiles(state, begin, end, query, arrays, work, holes, position, shared, MASKED: gl.constexpr,
                CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):  # fmt: skip
    """Takes tiles begin … end - 1 into m, l and acc, except for the last one's weights, which are in the state."""
    T: gl.constexpr = P.tile
    dtype: gl.constexpr = arrays.query_ptr.dtype.element_ty
    for i in range(begin, end):
        m, l, acc, weights = state
        stage = i % T.stages
        before = (i - 1) % H.v_stages
        mbarrier.wait(full_k(shared, stage, P, H), (i // T.stages) & 1)
        take_turn(CONSUMER, H)
        scores = start_scores(query, shared, i, stage, CONSUMER, P, H)
        mbarrier.wait(full_v(shared, before, P, H), ((i - 1) // H.v_stages) & 1)
        acc = warpgroup_mma(weights, shared.v_tiles.index(before), acc, is_async=True)
        give_turn(CONSUMER, H)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(empty_k(shared, stage, P, H), count=1)

        m, l, new_weights, shrink = weigh(scores, m, l, arrays, work, holes, work.first_tile + i, position, MASKED, P)
        if H.consumers == 2:  # three have no registers for new weights beside the old ones
            new_weights = as_operand(new_weights, dtype, P)
        if H.weights_first:
            # ptxas would compute most weights after the product, which is to run beside them, but for a branch between
            # them. Here that is the branch of a barrier that was waited for above.
            mbarrier.wait(full_v(shared, before, P, H), ((i - 1) // H.v_stages) & 1)
        # The old weights' registers are read until then.
        acc, _, new_weights, l = warpgroup_mma_wait(0, deps=(acc, weights, new_weights, l))
        mbarrier.arrive(empty_v(shared, before, P, H), count=1)
        if H.consumers > 2:
            new_weights = as_operand(new_weights, dtype, P)
        state = (m, l, shrunk(acc, shrink, P), new_weights)
    return state


@gluon.jit
def _store_result(arrays, rows, first_row, m, l, acc, P: gl.constexpr):
    """Stores the result of rows, or their partial result, and the logarithm of their normalizers."""
    Q: gl.constexpr = P.query
    V: gl.constexpr = P.v
    m = gl.convert_layout(m, rows_of(V.main))
    l = gl.convert_layout(l, rows_of(V.main))
    row = first_row + gl.arange(0, m.shape[0], layout=rows_of(V.main))
    inside = row < rows.length * Q.q_per_kv
    token = row // Q.q_per_kv
    q_head = rows.head * Q.q_per_kv + row % Q.q_per_kv
    sink = None
    if arrays.sinks_ptr is not None and not P.split:
        sink = gl.load(arrays.sinks_ptr + q_head * Q.sink_stride, mask=inside, other=0)
    WEIGHT: gl.constexpr = 2.0**-P.weight_bits
    factor, log = finish(m, l * WEIGHT, sink)
    factor = gl.where(l == 0, 0.0, factor * WEIGHT)

    result = (rows.start + token).to(gl.int64) * Q.num_heads + q_head
    if P.split:
        result = result * gl.num_programs(1) + gl.program_id(1)
    else:
        log = log * LN2
    gl.store(arrays.lse_ptr + result, log, mask=inside)
    dim = gl.arange(0, V.main, layout=gl.SliceLayout(0, products(V.main)))
    out = arrays.out_ptr + (result * V.words)[:, None] + dim[None, :]
    gl.store(out, (acc * factor[:, None]).to(arrays.out_ptr.dtype.element_ty), mask=inside[:, None])
