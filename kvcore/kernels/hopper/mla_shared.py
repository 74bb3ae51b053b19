"""Shared memory of a program of `hopper_mla_kernel`, and copies into it."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .shared import ROWS, STRIPE

CONSUMER_REGISTERS = gl.constexpr(232)  # of a thread
PRODUCER_REGISTERS = gl.constexpr(40)

BLOCK = gl.constexpr(64)  # positions; a tile is a pair of blocks
HALF = gl.constexpr(256)  # columns of V that a warpgroup sums
STRIPES = gl.constexpr(9)  # of a head of K; the last is the rotary one


class Heads(NamedTuple):
    """Heads of query or K, in three parts. Each has a leading axis: blocks of a pair, or 1 for query."""

    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rotary: gl.shared_memory_descriptor


class Shared(NamedTuple):
    """See `mla.py`."""

    query: Heads
    keys: Heads
    maxima: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    barriers: gl.shared_memory_descriptor  # one array, as each would take a register


_FULL = gl.constexpr(0)
_EMPTY = gl.constexpr(18)
_WEIGHED = gl.constexpr(22)
_SUMMED = gl.constexpr(24)
_QUERY = gl.constexpr(26)
_LANDED = gl.constexpr(27)
_COPIED = gl.constexpr(29)
_NUMBER = gl.constexpr(31)


@gluon.jit
def full(shared, S, C):
    """Ends a phase when a stripe of block S of a pair has arrived."""
    return shared.barriers.index(_FULL + S * STRIPES + C)


@gluon.jit
def empty(shared, S, SIDE: gl.constexpr):
    """Ends a phase when the warpgroup of a side has multiplied weights of block S with its half of V."""
    return shared.barriers.index(_EMPTY + 2 * S + SIDE)


@gluon.jit
def weighed(shared, S: gl.constexpr):
    """Ends a phase when the weights of block S and the maximum they are for are in shared memory."""
    return shared.barriers.index(_WEIGHED + S)


@gluon.jit
def summed(shared, SIDE: gl.constexpr):
    """Ends its phase when the sums of a side's weights are in shared memory."""
    return shared.barriers.index(_SUMMED + SIDE)


@gluon.jit
def query_loaded(shared):
    """Ends its phase when query is in shared memory."""
    return shared.barriers.index(_QUERY)


@gluon.jit
def landed(shared, SIDE: gl.constexpr):
    """Ends a phase when a side of a block has arrived that its producer mends."""
    return shared.barriers.index(_LANDED + SIDE)


@gluon.jit
def copied(shared, SIDE: gl.constexpr):
    """Ends a phase when a warpgroup's own copies have arrived."""
    return shared.barriers.index(_COPIED + SIDE)


@gluon.jit
def allocate(dtype: gl.constexpr):
    """Shared memory, with barriers that nothing has arrived at."""
    barriers = gl.allocate_shared_memory(gl.int64, [_NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_NUMBER):
        mbarrier.init(barriers.index(i), count=1)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    maxima = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    return Shared(_allocate_heads(dtype, 1, ROWS), _allocate_heads(dtype, 2, BLOCK), maxima, sums, barriers)


@gluon.jit
def _allocate_heads(dtype: gl.constexpr, COUNT: gl.constexpr, SIZE: gl.constexpr):
    """Rows in stripes of 64 columns, as TMA writes them and wgmma reads them."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    left = gl.allocate_shared_memory(dtype, [COUNT, SIZE, HALF], layout)
    right = gl.allocate_shared_memory(dtype, [COUNT, SIZE, HALF], layout)
    return Heads(left, right, gl.allocate_shared_memory(dtype, [COUNT, SIZE, STRIPE], layout))


@gluon.jit
def stripes_of(half):
    """Halves of heads, `[COUNT, 64, 256]`, as stripes, `[COUNT * 4, 64, 64]`: so they lie in shared memory."""
    COUNT: gl.constexpr = half.shape[0] * (HALF // STRIPE)
    return half.reinterpret(half.dtype, [COUNT, half.shape[1], STRIPE], half.layout)


@gluon.jit
def stripe(heads, S, C: gl.constexpr):
    """Columns C * 64 … C * 64 + 63 of heads S, `[64, 64]`."""
    SIDE_STRIPES: gl.constexpr = HALF // STRIPE
    if C == STRIPES - 1:
        part = heads.rotary.index(S)
    elif C < SIDE_STRIPES:
        part = stripes_of(heads.left).index(S * SIDE_STRIPES + C)
    else:
        part = stripes_of(heads.right).index(S * SIDE_STRIPES + C - SIDE_STRIPES)
    return part


@gluon.jit
def find_blocks(arrays, work, begin, P: gl.constexpr, H: gl.constexpr):
    """The coordinates of the blocks of 64 positions' boxes; -1, which no cache has, where nothing in a box exists."""
    Q: gl.constexpr = P.query
    blocks = ()
    for box in gl.static_range(BLOCK // H.box):
        n = begin + box * H.box
        exists = (n < work.limit) & (n + H.box > work.first)
        block = gl.load(arrays.table_ptr + n // P.block_size * Q.table_step, mask=exists, other=-1)
        exists = (block >= 0) & (block < arrays.num_blocks)
        blocks = blocks + (gl.where(exists, block + H.origin[1], -1).to(gl.int32),)
    return blocks


@gluon.jit
def load_stripe(desc, target, barrier, blocks, C, arrays, begin, P: gl.constexpr, H: gl.constexpr):
    """Copies stripe C of 64 positions from begin on to a target."""
    dim = C * STRIPE + H.origin[4]
    for box in gl.static_range(BLOCK // H.box):
        place = (begin + box * H.box) % P.block_size + H.origin[3]
        if H.layered:
            coordinates = [arrays.layer + H.origin[0], blocks[box], H.origin[2], place, dim]
        else:
            coordinates = [blocks[box], H.origin[2], place, dim]
        tma.async_load(desc, coordinates, barrier, target.slice(box * H.box, H.box, 0))


@gluon.jit
def expect_stripes(barrier, NUMBER: gl.constexpr):
    """Has a barrier wait for stripes of 16-bit elements. Boxes outside the cache arrive, too."""
    mbarrier.expect(barrier, NUMBER * BLOCK * STRIPE * 2)
