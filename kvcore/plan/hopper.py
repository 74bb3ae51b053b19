"""What the attention kernel for Hopper is told beyond `AttentionConstants`: boxes of TMA, pieces of a head."""

from typing import NamedTuple

from kvcore.contract.read import Attention
from kvcore.formats import BFLOAT16, FLOAT16, FLOATS
from kvcore.placement import Address
from kvcore.plan.attention_constants import Tile
from kvcore.plan.kernel import Descriptor, Target

_HEADS = {  # head sizes of K and V: the tile, columns of a piece of K, whether query lies in shared memory
    (64, 64): (Tile(192, 128, 3), 64, True),
    (128, 128): (Tile(128, 128, 2), 128, True),
    (192, 128): (Tile(128, 128, 2), 64, True),
    (256, 256): (Tile(128, 64, 2), 64, True),
}

_LONGEST_AXIS = 2**31 - 1
"""Coordinates are 32-bit integers."""

_LONGEST_STRIDE = 2**40
"""Bytes that a stride of a descriptor stays below."""


class HopperConstants(NamedTuple):
    """Constants of `hopper_attention_kernel`, beside `AttentionConstants`."""

    consumers: int  # warp groups that attend, with 64 rows each
    box: int  # positions that one copy takes: of one block, and a power of two
    piece: int  # columns of K that are multiplied at once
    pieces: int  # of a head of K
    query_in_shared: bool  # whether query lies in shared memory, not in registers
    weights_first: bool  # whether a tile's weights must be there before the last one's product with V is waited for
    turns: bool  # whether consumers issue products by turns
    layered: bool  # whether descriptors have an axis of layers
    k_origin: tuple[int, int, int, int, int]  # coordinates of K's first element: layer, block, head, slot, dim
    v_origin: tuple[int, int, int, int, int]


class HopperPlan(NamedTuple):
    """How `hopper_attention_kernel` differs from `paged_attention_kernel` in its launch."""

    tile: Tile
    constants: HopperConstants
    key: Descriptor
    value: Descriptor


def plan_hopper(call: Attention, target: Target) -> HopperPlan | None:
    """The plan for Hopper; None where the kernel has no way to do what the call asks.

    It is for many query rows: caches as they are, of query's dtype, whose rows TMA can copy.
    """
    cache, query = call.cache, FLOATS[call.query.dtype]
    heads = _HEADS.get((call.query.shape[2], cache.head_size_v))
    if target.backend != "cuda" or target.arch != 90 or heads is None or call.query_start_loc is None:
        return None
    if query not in (BFLOAT16, FLOAT16) or cache.format != query or cache.layout.latent:
        return None
    tile, piece, query_in_shared = heads
    extents, key, value = cache.placement
    box = min(extents.block_size & -extents.block_size, tile.positions)
    if box < 8 or extents.block_size > 256 or extents.num_blocks == 0:
        return None
    sides = []
    for address, size, columns in ((key, call.query.shape[2], piece), (value, cache.head_size_v, cache.head_size_v)):
        side = _describe(call, address, size, box, columns)
        if side is None:
            return None
        sides.append(side)
    (k_origin, key_box), (v_origin, value_box) = sides
    constants = HopperConstants(
        consumers=tile.rows // 64,
        box=box,
        piece=piece,
        pieces=call.query.shape[2] // piece,
        query_in_shared=query_in_shared,
        weights_first=True,
        turns=False,
        layered=extents.num_layers is not None,
        k_origin=k_origin,
        v_origin=v_origin,
    )
    return HopperPlan(tile, constants, key_box, value_box)


def _describe(call: Attention, address: Address, size: int, box: int, columns: int) -> tuple[tuple, Descriptor] | None:
    """The origin of K or V in an array, and the descriptor; None where TMA cannot copy it.

    A descriptor begins where the array does, as JAX has no other address. What comes before K or V, or between their
    first elements, is expressed in coordinates: as far as whole strides go, the longest first.
    """
    extents = call.cache.extents
    if address.x > 1 or address.dim != 1:
        return None
    strides = (address.layer, address.block, address.head, address.slot, 1)
    sizes = (extents.num_layers or 1, extents.num_blocks, extents.num_heads, extents.block_size, size)
    origin, rest = [0] * 5, address.offset
    for axis in sorted(range(5), key=lambda axis: -strides[axis]):
        if sizes[axis] > 1 or axis == 4:
            origin[axis], rest = divmod(rest, strides[axis])
    # An axis of one element has a stride of no meaning, which may be 0 or odd.
    strides = (*(s if n > 1 else 8 for s, n in zip(strides[:4], sizes[:4], strict=True)), 1)
    shape = tuple(first + n for first, n in zip(origin, sizes, strict=True))
    if any(s % 8 or 2 * s >= _LONGEST_STRIDE for s in strides[:4]) or origin[4] % 8 or max(shape) > _LONGEST_AXIS:
        return None
    axes = slice(0 if extents.num_layers is not None else 1, None)
    block = (1, 1, 1, box, columns)
    return tuple(origin), Descriptor(shape[axes], strides[axes], block[axes])
