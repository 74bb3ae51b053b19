"""Shared memory of a program of `hopper_attention_kernel`, and copies into it."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


class Shared(NamedTuple):
    """See `attention.py`."""

    k_tiles: gl.shared_memory_descriptor
    v_tiles: gl.shared_memory_descriptor
    q_rows: gl.shared_memory_descriptor  # or None
    barriers: gl.shared_memory_descriptor  # one array, as each would take a register


@gluon.jit
def make_barriers(P: gl.constexpr, H: gl.constexpr):
    """Barriers that nothing has arrived at yet."""
    STAGES: gl.constexpr = P.tile.stages
    NUMBER: gl.constexpr = 4 * STAGES + 1 + H.consumers
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        if i >= 2 * STAGES and i < 4 * STAGES:
            mbarrier.init(barriers.index(i), count=H.consumers)
        else:
            mbarrier.init(barriers.index(i), count=1)
    return barriers


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
def landed(shared, P: gl.constexpr):
    """Ends a phase when V has arrived of a tile that the producer mends."""
    return shared.barriers.index(4 * P.tile.stages)


@gluon.jit
def copied(shared, CONSUMER: gl.constexpr, P: gl.constexpr):
    """Ends a phase when a consumer's own copies have arrived."""
    return shared.barriers.index(4 * P.tile.stages + 1 + CONSUMER)


@gluon.constexpr_function
def shared_layout(columns):
    """The layout of rows of 16-bit elements, as TMA writes them and wgmma reads them: in stripes of up to 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.jit
def load_keys(desc, shared, stage, barrier, arrays, work, head, tile, P: gl.constexpr, H: gl.constexpr):
    """Copies K of a tile into a stage."""
    T: gl.constexpr = P.tile
    for box in gl.static_range(T.positions // H.box):
        block = _find_block(arrays, work, tile, box, H.k_origin, P, H)
        for piece in gl.static_range(H.pieces):
            target = shared.k_tiles.index(stage * H.pieces + piece)
            _load_box(desc, target, barrier, block, arrays, head, tile, box, piece * H.piece, H.k_origin, P, H)


@gluon.jit
def load_values(desc, shared, stage, barrier, arrays, work, head, tile, P: gl.constexpr, H: gl.constexpr):
    """Copies V of a tile into a stage."""
    T: gl.constexpr = P.tile
    for box in gl.static_range(T.positions // H.box):
        block = _find_block(arrays, work, tile, box, H.v_origin, P, H)
        _load_box(desc, shared.v_tiles.index(stage), barrier, block, arrays, head, tile, box, 0, H.v_origin, P, H)


@gluon.jit
def _find_block(arrays, work, tile, BOX: gl.constexpr, ORIGIN: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """The coordinate of a box's block; -1, which no cache has, where nothing in the box exists."""
    Q: gl.constexpr = P.query
    T: gl.constexpr = P.tile
    n = tile * T.positions + BOX * H.box
    exists = (n < work.limit) & (n + H.box > work.first)
    block = gl.load(arrays.table_ptr + n // P.block_size * Q.table_step, mask=exists, other=-1)
    exists = (block >= 0) & (block < arrays.num_blocks)
    return gl.where(exists, block + ORIGIN[1], -1).to(gl.int32)


@gluon.jit
def _load_box(desc, target, barrier, block, arrays, head, tile, BOX: gl.constexpr, DIM: gl.constexpr,
              ORIGIN: gl.constexpr, P: gl.constexpr, H: gl.constexpr):  # fmt: skip
    T: gl.constexpr = P.tile
    place = (tile * T.positions + BOX * H.box) % P.block_size + ORIGIN[3]
    if H.layered:
        coordinates = [arrays.layer + ORIGIN[0], block, head + ORIGIN[2], place, DIM + ORIGIN[4]]
    else:
        coordinates = [block, head + ORIGIN[2], place, DIM + ORIGIN[4]]
    tma.async_load(desc, coordinates, barrier, target.slice(BOX * H.box, H.box, 0))


@gluon.jit
def expect_tile(barrier, COLUMNS: gl.constexpr, P: gl.constexpr):
    """Has a barrier wait for a tile of 16-bit elements. Boxes outside the cache arrive, too."""
    T: gl.constexpr = P.tile
    mbarrier.expect(barrier, T.positions * COLUMNS * 2)


@gluon.jit
def take_turn(CONSUMER: gl.constexpr, H: gl.constexpr):
    """Waits until the consumer before this one has issued its products."""
    if H.turns:
        _barrier("bar.sync", CONSUMER, H)


@gluon.jit
def give_turn(CONSUMER: gl.constexpr, H: gl.constexpr):
    """Lets the next consumer issue its products."""
    if H.turns:
        _barrier("bar.arrive", (CONSUMER + 1) % H.consumers, H)


@gluon.jit
def _barrier(INSTRUCTION: gl.constexpr, TURN: gl.constexpr, H: gl.constexpr):
    """At a barrier in hardware that Triton uses none of: it counts from 0. The instruction's result is of no use."""
    gl.inline_asm_elementwise(_at_barrier(INSTRUCTION, TURN), "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _at_barrier(instruction, turn):
    return f"{instruction} {15 - turn}, 256; mov.u32 $0, $1;"
