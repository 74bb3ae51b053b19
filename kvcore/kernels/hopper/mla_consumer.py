"""The two warpgroups of `hopper_mla_kernel`: scores, weights, sums of 64 query rows.

What each does with a pair of blocks, 0 and 1; the running maximum goes from left to right to left:

    left                                                  right
    scores of block 0                                     scores of block 1
    weights of block 0, and their maximum        ──────►  sums shrink; + weights of block 0 · V of block 0,
    sums shrink; + weights of block 0 · V of block 0      meanwhile weights of block 1
                                                 ◄──────  … and their maximum
    sums shrink; + weights of block 1 · V of block 1      sums shrink; + weights of block 1 · V of block 1

Each half of a block is given back as soon as it was multiplied: the pipeline waits for the copy of the next block.
A warpgroup multiplies its own weights from registers, and the other's from shared memory.
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
from ..softmax import origin_of
from .mla_careful import attend_carefully
from .mla_shared import BLOCK, HALF, ROWS, STRIPE, empty, query_loaded, summed, weighed
from .mla_tiles import shrunk, start_scores, weigh
from .result import store_result
from .tiles import has_holes, load_rows, operands, products, rows_of


@gluon.jit
def attend(arrays, rows, work, desc, shared, SIDE: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Attends, and stores a side's half of the columns; left (0) loads query, and stores logarithms of normalizers."""
    if SIDE == 0:
        _load_query(arrays, rows, shared, P)
    m, l, acc, position = _begin(rows, work, P)
    holes = has_holes(arrays, work, P)
    if work.num_tiles > 0:
        mbarrier.wait(query_loaded(shared), 0)
        for i in range(work.num_tiles):
            if SIDE == 0:
                m, l, acc = _fold_left(m, l, acc, arrays, work, holes, i, position, shared, P)
            else:
                m, l, acc = _fold_right(m, l, acc, arrays, work, holes, i, position, shared, P)
    _end(m, l, acc, arrays, rows, work, holes, position, desc, shared, SIDE, P, H)


@gluon.jit
def _begin(rows, work, P: gl.constexpr):
    """m, l and acc of nothing, and the positions of the rows' tokens."""
    Q: gl.constexpr = P.query
    m = gl.full([ROWS], float("-inf"), gl.float32, rows_of(BLOCK))
    l = gl.full([ROWS], 0.0, gl.float32, rows_of(BLOCK))
    acc = gl.zeros([ROWS, HALF], gl.float32, products(HALF))
    row = rows.first + gl.arange(0, ROWS, layout=rows_of(BLOCK))
    return m, l, acc, work.first_token + row // Q.q_per_kv


@gluon.jit
def _load_query(arrays, rows, shared, P: gl.constexpr):
    """Copies query into shared memory, and says so."""
    halves: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    stripes: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    left = load_rows(arrays, rows, rows.first, 0, HALF, halves, P)
    right = load_rows(arrays, rows, rows.first, HALF, HALF, halves, P)
    rotary = load_rows(arrays, rows, rows.first, 2 * HALF, STRIPE, stripes, P)
    shared.query.left.index(0).store(left)
    shared.query.right.index(0).store(right)
    shared.query.rotary.index(0).store(rotary)
    fence_async_shared()
    mbarrier.arrive(query_loaded(shared), count=1)


@gluon.jit
def _fold_left(m, l, acc, arrays, work, holes, i, position, shared, P: gl.constexpr):
    """Takes a pair into m, l and acc."""
    scores = start_scores(shared, i, 0, True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    m0, l, weights, shrink = weigh(scores, m, l, arrays, work, holes, 2 * i, position, P)
    weights = _hand_over(weights, m0, shared, 0)
    acc = warpgroup_mma(weights, shared.keys.left.index(0), shrunk(acc, shrink), is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(empty(shared, 0, 0), count=1)

    mbarrier.wait(weighed(shared, 1), i & 1)
    m = shared.maxima.index(1).load(rows_of(BLOCK))
    shrink = gl.exp2(m0 - origin_of(m))
    acc = warpgroup_mma(shared.keys.rotary.index(1), shared.keys.left.index(1), shrunk(acc, shrink), is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty(shared, 1, 0), count=1)
    return m, l * shrink, acc


@gluon.jit
def _fold_right(m, l, acc, arrays, work, holes, i, position, shared, P: gl.constexpr):
    """Takes a pair into m, l and acc."""
    scores = start_scores(shared, i, 1, True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.wait(weighed(shared, 0), i & 1)
    m0 = shared.maxima.index(0).load(rows_of(BLOCK))
    shrink = gl.exp2(m - origin_of(m0))
    acc = warpgroup_mma(shared.keys.rotary.index(0), shared.keys.right.index(0), shrunk(acc, shrink), is_async=True)

    m, l, weights, shrink = weigh(scores, m0, l * shrink, arrays, work, holes, 2 * i + 1, position, P)
    weights = _hand_over(weights, m, shared, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty(shared, 0, 1), count=1)
    acc = warpgroup_mma(weights, shared.keys.right.index(1), shrunk(acc, shrink), is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(empty(shared, 1, 1), count=1)
    return m, l, acc


@gluon.jit
def _hand_over(weights, m, shared, S: gl.constexpr):
    """Puts weights of block S, and the maximum they are for, into shared memory. Returns them to be multiplied."""
    weights = weights.to(shared.keys.rotary.dtype)
    shared.maxima.index(S).store(m)
    shared.keys.rotary.index(S).store(weights)
    fence_async_shared()
    mbarrier.arrive(weighed(shared, S), count=1)
    return gl.convert_layout(weights, operands(HALF))


@gluon.jit
def _end(
    m, l, acc, arrays, rows, work, holes, position, desc, shared, SIDE: gl.constexpr, P: gl.constexpr, H: gl.constexpr
):
    """Adds the other warpgroup's normalizers, and stores a half of the result."""
    shared.sums.index(SIDE).store(l)
    mbarrier.arrive(summed(shared, SIDE), count=1)
    mbarrier.wait(summed(shared, 1 - SIDE), 0)
    l += shared.sums.index(1 - SIDE).load(rows_of(BLOCK))
    if P.by_row:
        spoilt = total(total(acc * 0.0, 1), 0)
        if spoilt != 0.0:
            m, l, acc = attend_carefully(arrays, work, holes, position, desc, shared, SIDE, P, H)
    store_result(m, l, acc, arrays, rows, rows.first, SIDE * HALF, SIDE == 0, P)
