"""The warps that copy blocks of K into shared memory, ahead of the warpgroups that use them: one for each side.

A half of a block is given back when the one warpgroup that sums its columns of V has multiplied them. The rotary stripe
holds the block's weights then, and is given back by the warpgroup that they were made for: the other one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .mla_shared import (
    BLOCK,
    STRIPE,
    STRIPES,
    empty,
    expect_stripes,
    find_blocks,
    full,
    landed,
    load_stripe,
    stripes_of,
)

_SIDE_STRIPES = gl.constexpr(STRIPES // 2)


@gluon.jit
def produce(arrays, work, desc, shared, SIDE: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Fills a side of both blocks of a pair, pair by pair."""
    half = shared.keys.left
    if SIDE == 1:
        half = shared.keys.right
    mended = 0
    for j in range(2 * work.num_tiles):
        begin = (2 * work.first_tile + j) * BLOCK
        S = j & 1
        blocks = find_blocks(arrays, work, begin, P, H)
        mbarrier.wait(empty(shared, S, SIDE), (j >> 1) & 1 ^ 1)
        if _cuts_a_box(work, begin, P, H):
            _fill_and_mend(desc, half, blocks, arrays, work, begin, S, landed(shared, SIDE), mended & 1, SIDE, P, H)
            mended += 1
            for k in range(_SIDE_STRIPES):
                mbarrier.arrive(full(shared, S, _SIDE_STRIPES * SIDE + k), count=1)
        else:
            for k in range(_SIDE_STRIPES):
                C = _SIDE_STRIPES * SIDE + k
                expect_stripes(full(shared, S, C), 1)
                target = stripes_of(half).index(_SIDE_STRIPES * S + k)
                load_stripe(desc, target, full(shared, S, C), blocks, C, arrays, begin, P, H)
        if S != SIDE:
            arrived = full(shared, S, STRIPES - 1)
            expect_stripes(arrived, 1)
            load_stripe(desc, shared.keys.rotary.index(S), arrived, blocks, STRIPES - 1, arrays, begin, P, H)


@gluon.jit
def _fill_and_mend(desc, half, blocks, arrays, work, begin, S, arrived, phase, SIDE: gl.constexpr, P: gl.constexpr,
                   H: gl.constexpr):  # fmt: skip
    """Fills a side of a block, and clears what no row may see."""
    expect_stripes(arrived, _SIDE_STRIPES)
    for k in range(_SIDE_STRIPES):
        target = stripes_of(half).index(_SIDE_STRIPES * S + k)
        load_stripe(desc, target, arrived, blocks, _SIDE_STRIPES * SIDE + k, arrays, begin, P, H)
    mbarrier.wait(arrived, phase)
    _clear_hidden(half, S, work, begin)
    fence_async_shared()
    gl.barrier()


@gluon.jit
def _cuts_a_box(work, begin, P: gl.constexpr, H: gl.constexpr):
    """Whether a box of the block has positions that exist and others that do not."""
    OPTIONS: gl.constexpr = P.options
    cuts = (work.limit < begin + BLOCK) & (work.limit > begin) & (work.limit % H.box != 0)
    if OPTIONS.sliding_window is not None:
        cuts = cuts | ((work.first > begin) & (work.first < begin + BLOCK) & (work.first % H.box != 0))
    return cuts


@gluon.jit
def _clear_hidden(half, S, work, begin):
    """Zeros where no position is, or none that a row sees: what lies there may be NaN, and 0 times NaN is NaN."""
    ROWS: gl.constexpr = 8  # whose elements shared memory permutes among themselves
    COUNT: gl.constexpr = BLOCK // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    groups = half.reinterpret(half.dtype, [half.shape[0] * _SIDE_STRIPES * COUNT, ROWS, STRIPE], half.layout)
    for group in range(COUNT):
        first = begin + group * ROWS
        if (first + ROWS > work.limit) | (first < work.first):
            n = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            seen = (n < work.limit) & (n >= work.first)
            for k in range(_SIDE_STRIPES):
                part = groups.index((_SIDE_STRIPES * S + k) * COUNT + group)
                v = part.load(layout)
                part.store(gl.where(seen[:, None], v, gl.zeros_like(v)))
