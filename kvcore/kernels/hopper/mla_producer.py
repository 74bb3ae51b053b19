"""The warp that copies blocks of K into shared memory, ahead of the warpgroups that use them.

A block is given back by halves, each when the one warpgroup that sums its columns of V has multiplied them; the rotary
chunk holds the block's weights, and is given back with the half of the warpgroup that they were made for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .mla_shared import BLOCK, CHUNKS, chunk, empty, expect_chunks, full, landed, load_chunk


@gluon.jit
def produce(arrays, work, desc, shared, P: gl.constexpr, H: gl.constexpr):
    """Fills both blocks of a pair, pair by pair."""
    mended = 0
    for i in range(work.num_tiles):
        for S in gl.static_range(2):
            mended = _fill(arrays, work, desc, shared, i, S, mended, P, H)


@gluon.jit
def _fill(arrays, work, desc, shared, i, S: gl.constexpr, mended, P: gl.constexpr, H: gl.constexpr):
    """Fills block S of pair i, chunk by chunk, in the order in which they are given back and used."""
    begin = (2 * (work.first_tile + i) + S) * BLOCK
    phase = (i & 1) ^ 1
    if _cuts_a_box(work, begin, P, H):
        mbarrier.wait(empty(shared, S, 0), phase)
        mbarrier.wait(empty(shared, S, 1), phase)
        expect_chunks(landed(shared), CHUNKS)
        for C in gl.static_range(CHUNKS):
            load_chunk(desc, shared, S, C, landed(shared), arrays, work, begin, P, H)
        mbarrier.wait(landed(shared), mended & 1)
        mended += 1
        for C in gl.static_range(CHUNKS - 1):
            _clear_hidden(chunk(shared.keys, S, C), work, begin, P, H)
        fence_async_shared()
        gl.barrier()
        for C in gl.static_range(CHUNKS):
            mbarrier.arrive(full(shared, S, C), count=1)
    else:
        for k in gl.static_range(CHUNKS):
            if k == 0:
                mbarrier.wait(empty(shared, S, S), phase)
            elif k == CHUNKS // 2:
                mbarrier.wait(empty(shared, S, 1 - S), phase)
            _load(desc, shared, S, nth_chunk(S, k), arrays, work, begin, P, H)
    return mended


@gluon.jit
def _load(desc, shared, S: gl.constexpr, C: gl.constexpr, arrays, work, begin, P: gl.constexpr, H: gl.constexpr):
    expect_chunks(full(shared, S, C), 1)
    load_chunk(desc, shared, S, C, full(shared, S, C), arrays, work, begin, P, H)


@gluon.constexpr_function
def nth_chunk(s, k):
    """The order of chunks of block s: first the half of the warpgroup that makes its weights, the rotary one last."""
    return k if s == 0 or k == 8 else (k + 4) % 8


@gluon.jit
def _cuts_a_box(work, begin, P: gl.constexpr, H: gl.constexpr):
    """Whether a box of the block has positions that exist and others that do not."""
    OPTIONS: gl.constexpr = P.options
    cuts = (work.limit < begin + BLOCK) & (work.limit > begin) & (work.limit % H.box != 0)
    if OPTIONS.sliding_window is not None:
        cuts = cuts | ((work.first > begin) & (work.first < begin + BLOCK) & (work.first % H.box != 0))
    return cuts


@gluon.jit
def _clear_hidden(values, work, begin, P: gl.constexpr, H: gl.constexpr):
    """Zeros where no position is, or none that a row sees: what lies there may be NaN, and 0 times NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    GROUP: gl.constexpr = 8  # rows: what shared memory permutes
    for group in gl.static_range(BLOCK // GROUP):
        n = begin + group * GROUP + gl.arange(0, GROUP, layout=gl.SliceLayout(1, layout))
        seen = (n < work.limit) & (n >= work.first)
        first = begin + group * GROUP
        if (first + GROUP > work.limit) | (first < work.first):
            part = values.slice(group * GROUP, GROUP, 0)
            v = part.load(layout)
            part.store(gl.where(seen[:, None], v, gl.zeros_like(v)))
