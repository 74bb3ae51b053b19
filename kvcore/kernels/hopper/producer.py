"""The warps that copy K and V into shared memory, ahead of those that use them: one for K, one for V."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..sequences import cdiv
from .shared import (
    empty_k,
    empty_v,
    expect_tile,
    find_blocks,
    full_k,
    full_v,
    full_v_or_landed,
    load_keys,
    load_values,
)


@gluon.jit
def produce_keys(arrays, head, work, desc, shared, P: gl.constexpr, H: gl.constexpr):
    """Fills stages with tiles of K, each as soon as all consumers have used what was there."""
    T: gl.constexpr = P.tile
    for i in range(work.num_tiles):
        tile = work.first_tile + i
        stage = i % T.stages
        blocks = find_blocks(arrays, work, tile, H.k_origin, P, H)
        mbarrier.wait(empty_k(shared, stage, P), (i // T.stages) & 1 ^ 1)
        full = full_k(shared, stage, P)
        expect_tile(full, H.pieces * H.piece, P)
        load_keys(desc, shared, stage, full, blocks, arrays, head, tile, P, H)


@gluon.jit
def produce_values(arrays, head, work, desc, shared, P: gl.constexpr, H: gl.constexpr):
    """Fills stages with tiles of V, and clears what no row may see."""
    T: gl.constexpr = P.tile
    V: gl.constexpr = P.v
    mended = 0
    for i in range(work.num_tiles):
        tile = work.first_tile + i
        stage = i % T.stages
        blocks = find_blocks(arrays, work, tile, H.v_origin, P, H)
        mbarrier.wait(empty_v(shared, stage, P), (i // T.stages) & 1 ^ 1)
        cut = _cuts_a_box(work, tile, P, H)
        arrived = full_v_or_landed(shared, stage, cut, P)
        expect_tile(arrived, V.main, P)
        load_values(desc, shared, stage, arrived, blocks, arrays, head, tile, P, H)
        if cut:
            mbarrier.wait(arrived, mended & 1)
            mended += 1
            _clear_hidden(shared.v_tiles.index(stage), work, tile, P, H)
            fence_async_shared()
            gl.barrier()
            mbarrier.arrive(full_v(shared, stage, P), count=1)


@gluon.jit
def _cuts_a_box(work, tile, P: gl.constexpr, H: gl.constexpr):
    """Whether a box of the tile has positions that exist and others that do not."""
    T: gl.constexpr = P.tile
    OPTIONS: gl.constexpr = P.options
    begin = tile * T.positions
    cuts = (work.limit < begin + T.positions) & (work.limit % H.box != 0)
    if OPTIONS.sliding_window is not None:
        cuts = cuts | ((work.first > begin) & (work.first % H.box != 0))
    return cuts


@gluon.jit
def _clear_hidden(values, work, tile, P: gl.constexpr, H: gl.constexpr):
    """Zeros for what a box has where no position is, or none that a row sees: it may be NaN, and 0 times NaN is NaN."""
    T: gl.constexpr = P.tile
    OPTIONS: gl.constexpr = P.options
    begin = tile * T.positions
    end = gl.minimum(cdiv(work.limit, H.box) * H.box - begin, T.positions)
    _clear(values, work.limit - begin, end, P)
    if OPTIONS.sliding_window is not None:
        start = gl.maximum(work.first // H.box * H.box - begin, 0)
        _clear(values, start, gl.minimum(work.first - begin, T.positions), P)


@gluon.jit
def _clear(values, begin, end, P: gl.constexpr):
    """Zeros for rows begin … end - 1."""
    V: gl.constexpr = P.v
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, gl.num_warps()], [1, 0])
    for place in range(begin, end):
        index = gl.full([1, V.main], place, gl.int32, layout)
        values.scatter(gl.zeros([1, V.main], values.dtype, layout), index, axis=0)
