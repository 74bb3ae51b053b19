"""Shared memory of a program of `hopper_attention_kernel`, and copies into it."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

STRIPE = gl.constexpr(64)  # columns that one copy takes: of 16 bits, as many as shared memory holds side by side


CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of query, of a consumer


class Shared(NamedTuple):
    """See `attention.py`."""

    k_tiles: gl.shared_memory_descriptor
    v_tiles: gl.shared_memory_descriptor
    q_rows: gl.shared_memory_descriptor
    barriers: gl.shared_memory_descriptor  # one array, as each would take a register


@gluon.jit
def allocate(dtype: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Shared memory, with barriers that nothing has arrived at."""
    T: gl.constexpr = P.tile
    V: gl.constexpr = P.v
    k_tiles = gl.allocate_shared_memory(dtype, [T.stages * H.pieces, T.positions, H.piece], _layout(H.piece))
    v_tiles = gl.allocate_shared_memory(dtype, [T.stages, T.positions, V.main], _layout(V.main))
    q_rows = gl.allocate_shared_memory(dtype, [CONSUMERS * H.pieces, ROWS, H.piece], _layout(H.piece))
    NUMBER: gl.constexpr = 4 * T.stages + 1 + CONSUMERS
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        if i >= 2 * T.stages and i < 4 * T.stages:
            mbarrier.init(barriers.index(i), count=CONSUMERS)
        else:
            mbarrier.init(barriers.index(i), count=1)
    return Shared(k_tiles, v_tiles, q_rows, barriers)


@gluon.constexpr_function
def _layout(columns):
    """The layout of rows of 16-bit elements, as TMA writes them and wgmma reads them: in stripes of up to 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.jit
def full_k(shared, stage, P: gl.constexpr):
    """Ends a phase when K of a stage has arrived."""
    return shared.barriers.index(stage)


@gluon.jit
def full_v(shared, stage, P: gl.constexpr):
    """Ends a phase when V of a stage has arrived."""
    return shared.barriers.index(P.tile.stages + stage)


@gluon.jit
def empty_k(shared, stage, P: gl.constexpr):
    """Ends a phase when all consumers have used K of a stage."""
    return shared.barriers.index(2 * P.tile.stages + stage)


@gluon.jit
def empty_v(shared, stage, P: gl.constexpr):
    """Ends a phase when all consumers have used V of a stage."""
    return shared.barriers.index(3 * P.tile.stages + stage)


@gluon.jit
def full_v_or_landed(shared, stage, cut, P: gl.constexpr):
    """Ends a phase when V has arrived: that of its stage or, of a tile that the producer mends, one of its own."""
    return shared.barriers.index(gl.where(cut, 4 * P.tile.stages, P.tile.stages + stage))


@gluon.jit
def copied(shared, CONSUMER: gl.constexpr, P: gl.constexpr):
    """Ends a phase when a consumer's own copies have arrived."""
    return shared.barriers.index(4 * P.tile.stages + 1 + CONSUMER)


@gluon.jit
def find_blocks(arrays, work, tile, ORIGIN: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """The coordinates of the blocks of a tile's boxes; -1, which no cache has, where nothing in a box exists.

    Entries are loaded all at once. Where blocks and tiles fit into each other, they lie at constant distances from the
    first one, and no box takes a division.
    """
    Q: gl.constexpr = P.query
    T: gl.constexpr = P.tile
    ALIGNED: gl.constexpr = T.positions % P.block_size == 0
    OPTIONS: gl.constexpr = P.options
    begin = tile * T.positions
    first_ptr = arrays.table_ptr + begin // P.block_size * Q.table_step
    blocks = ()
    for box in gl.static_range(T.positions // H.box):
        n = begin + box * H.box
        exists = n < work.limit
        if OPTIONS.sliding_window is not None:
            exists = exists & (n + H.box > work.first)
        entry_ptr = first_ptr
        if ALIGNED:
            entry_ptr = first_ptr + box * H.box // P.block_size * Q.table_step
        elif P.block_size % T.positions != 0:
            entry_ptr = arrays.table_ptr + n // P.block_size * Q.table_step
        blocks = blocks + (gl.load(entry_ptr, mask=exists, other=-1),)
    coordinates = ()
    for box in gl.static_range(T.positions // H.box):
        coordinates = coordinates + (_coordinate(blocks[box], arrays.num_blocks, ORIGIN[1]),)
    return coordinates


@gluon.jit
def _coordinate(block, num_blocks, ORIGIN: gl.constexpr):
    """A block's coordinate, or -1. The assembler's: LLVM would compute it after the wait that follows."""
    if block.dtype == gl.int64:
        block = gl.where((block >= 0) & (block < num_blocks), block, -1).to(gl.int32)
    block = gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lo.u32 p, $1, $2; selp.b32 $0, $1, -1, p; }", "=r,r,r", [block, num_blocks],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    if ORIGIN > 0:
        block = gl.where(block >= 0, block + ORIGIN, -1)
    return block


@gluon.jit
def load_keys(desc, shared, stage, barrier, blocks, arrays, head, tile, P: gl.constexpr, H: gl.constexpr):
    """Copies K of a tile, whose blocks were found, into a stage."""
    _load_tile(desc, shared.k_tiles, stage, H.pieces, barrier, blocks, arrays, head, tile, H.k_origin, P, H)


@gluon.jit
def load_values(desc, shared, stage, barrier, blocks, arrays, head, tile, P: gl.constexpr, H: gl.constexpr):
    """Copies V of a tile, whose blocks were found, into a stage."""
    _load_tile(desc, shared.v_tiles, stage, 1, barrier, blocks, arrays, head, tile, H.v_origin, P, H)


@gluon.jit
def _load_tile(desc, tiles, stage, PIECES: gl.constexpr, barrier, blocks, arrays, head, tile, ORIGIN: gl.constexpr,
               P: gl.constexpr, H: gl.constexpr):  # fmt: skip
    """Copies a tile, in stripes of 64 columns, as rows lie in shared memory."""
    T: gl.constexpr = P.tile
    COLUMNS: gl.constexpr = tiles.shape[2]
    STRIPES: gl.constexpr = PIECES * COLUMNS // STRIPE
    targets = tiles.reinterpret(tiles.dtype, [tiles.shape[0] * COLUMNS // STRIPE, T.positions, STRIPE], tiles.layout)
    # tile >> 30 is 0, but the compiler does not know: else it would make one row of copies of the loop, and ptxas would
    # prepare all of them at once, for which it has no registers.
    for stripe in range(STRIPES + (tile >> 30)):
        target = targets.index(stage * STRIPES + stripe)
        for box in gl.static_range(T.positions // H.box):
            if T.positions % P.block_size == 0:
                place = gl.to_tensor(box * H.box % P.block_size + ORIGIN[3])
            else:
                place = (tile * T.positions + box * H.box) % P.block_size + ORIGIN[3]
            dim = stripe * STRIPE + ORIGIN[4]
            if H.layered:
                coordinates = [arrays.layer + ORIGIN[0], blocks[box], head + ORIGIN[2], place, dim]
            else:
                coordinates = [blocks[box], head + ORIGIN[2], place, dim]
            tma.async_load(desc, coordinates, barrier, target.slice(box * H.box, H.box, 0))


@gluon.jit
def expect_tile(barrier, COLUMNS: gl.constexpr, P: gl.constexpr):
    """Has a barrier wait for a tile of 16-bit elements. Boxes outside the cache arrive, too."""
    T: gl.constexpr = P.tile
    mbarrier.expect(barrier, T.positions * COLUMNS * 2)
