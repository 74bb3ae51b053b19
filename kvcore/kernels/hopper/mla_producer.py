"""The warps that copy blocks of K into shared memory, ahead of the warpgroups that use them: one for each side.

A half of a block is given back when the one warpgroup that sums its columns of V has multiplied them. The rotary chunk
holds the block's weights then, and is given back by the warpgroup that they were made for: the other one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .mla_shared import BLOCK, CHUNKS, chunk, empty, expect_chunks, full, landed, load_chunk


@gluon.jit
def produce(arrays, work, desc, shared, SIDE: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Fills a side of both blocks of a pair, pair by pair."""
    mended = 0
    for i in range(work.num_tiles):
        for S in gl.static_range(2):
            mended = _fill(arrays, work, desc, shared, i, S, SIDE, mended, P, H)


@gluon.jit
def _fill(arrays, work, desc, shared, i, S: gl.constexpr, SIDE: gl.constexpr, mended, P: gl.constexpr,
          H: gl.constexpr):  # fmt: skip
    """Fills a side of block S of pair i."""
    COUNT: gl.constexpr = CHUNKS // 2 + (S != SIDE)
    begin = (2 * (work.first_tile + i) + S) * BLOCK
    mbarrier.wait(empty(shared, S, SIDE), (i & 1) ^ 1)
    if _cuts_a_box(work, begin, P, H):
        arrived = landed(shared, SIDE)
        expect_chunks(arrived, COUNT)
        for k in gl.static_range(COUNT):
            load_chunk(desc, shared, S, chunk_of(SIDE, k), arrived, arrays, work, begin, P, H)
        mbarrier.wait(arrived, mended & 1)
        mended += 1
        for k in gl.static_range(CHUNKS // 2):
            _clear_hidden(chunk(shared.keys, S, chunk_of(SIDE, k)), work, begin)
        fence_async_shared()
        gl.barrier()
        for k in gl.static_range(COUNT):
            mbarrier.arrive(full(shared, S, chunk_of(SIDE, k)), count=1)
    else:
        for k in gl.static_range(COUNT):
            _load(desc, shared, S, chunk_of(SIDE, k), arrays, work, begin, P, H)
    return mended


@gluon.jit
def _load(desc, shared, S: gl.constexpr, C: gl.constexpr, arrays, work, begin, P: gl.constexpr, H: gl.constexpr):
    expect_chunks(full(shared, S, C), 1)
    load_chunk(desc, shared, S, C, full(shared, S, C), arrays, work, begin, P, H)


@gluon.constexpr_function
def chunk_of(side, k):
    """Chunk k of a side: of its half of V's columns, and then the rotary one."""
    return 8 if k == 4 else 4 * side + k


@gluon.jit
def _cuts_a_box(work, begin, P: gl.constexpr, H: gl.constexpr):
    """Whether a box of the block has positions that exist and others that do not."""
    OPTIONS: gl.constexpr = P.options
    cuts = (work.limit < begin + BLOCK) & (work.limit > begin) & (work.limit % H.box != 0)
    if OPTIONS.sliding_window is not None:
        cuts = cuts | ((work.first > begin) & (work.first < begin + BLOCK) & (work.first % H.box != 0))
    return cuts


@gluon.jit
def _clear_hidden(values, work, begin):
    """Zeros where no position is, or none that a row sees: what lies there may be NaN, and 0 times NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    GROUP: gl.constexpr = 8  # rows: what shared memory permutes
    for group in gl.static_range(BLOCK // GROUP):
        first = begin + group * GROUP
        if (first + GROUP > work.limit) | (first < work.first):
            n = first + gl.arange(0, GROUP, layout=gl.SliceLayout(1, layout))
            seen = (n < work.limit) & (n >= work.first)
            part = values.slice(group * GROUP, GROUP, 0)
            v = part.load(layout)
            part.store(gl.where(seen[:, None], v, gl.zeros_like(v)))
