"""What the attention kernel for Hopper is told beyond `AttentionConstants`: boxes of TMA, pieces of a head."""

from typing import NamedTuple

from kvcore.contract.read import Attention
from kvcore.formats import BFLOAT16, FLOAT16, FLOATS
from kvcore.placement import Address
from kvcore.plan.attention_constants import Tile
from kvcore.plan.kernel import Descriptor, Target

_HEADS = {  # head sizes of K and V: the tile, columns of a piece of K
    (64, 64): (Tile(128, 128, 2), 64),
    (128, 128): (Tile(128, 128, 2), 128),
    (192, 128): (Tile(128, 128, 2), 64),
    (256, 256): (Tile(128, 64, 2), 64),
}

_MLA_HEADS, _MLA_TILE = (576, 512), Tile(64, 128, 2)
"""Of a latent cache: head sizes of K and of V, and the tile."""

SHORT = 1024
"""Positions. Where no sequence is longer, programs have so few tiles that what comes before the first one weighs more
than what they gain: 32 sequences of 512 queries on 1,024 positions ran at 178 TFLOP/s, with the other kernel at 241.
"""

_LONGEST_AXIS = 2**31 - 1
"""Coordinates are 32-bit integers."""

_LONGEST_STRIDE = 2**40
"""Bytes that a stride of a descriptor stays below."""


class HopperConstants(NamedTuple):
    """Constants of `hopper_attention_kernel`, beside `AttentionConstants`."""

    box: int  # positions that one copy takes: of one block, and a power of two
    piece: int  # columns of K that are multiplied at once
    pieces: int  # of a head of K
    layered: bool  # whether descriptors have an axis of layers
    k_origin: tuple[int, int, int, int, int]  # coordinates of K's first element: layer, block, head, slot, dim
    v_origin: tuple[int, int, int, int, int]


class LatentConstants(NamedTuple):
    """Constants of `hopper_mla_kernel`, beside `AttentionConstants`."""

    box: int  # as in HopperConstants
    layered: bool
    origin: tuple[int, int, int, int, int]


class HopperPlan(NamedTuple):
    """How a kernel for Hopper differs from `paged_attention_kernel` in its launch."""

    module: str
    name: str
    tile: Tile
    constants: HopperConstants | LatentConstants
    descriptors: dict[str, Descriptor]


def plan_hopper(call: Attention, target: Target, many_rows: bool) -> HopperPlan | None:
    """The plan for Hopper; None where no kernel there has a way to do what the call asks.

    They take caches as they are, of query's dtype, whose rows TMA can copy. One is for latent caches (MLA), one for
    others and many query rows.
    """
    cache, query, extents = call.cache, FLOATS[call.query.dtype], call.cache.extents
    if target.backend != "cuda" or target.arch != 90 or query not in (BFLOAT16, FLOAT16) or cache.format != query:
        return None
    if extents.block_size % 8 or extents.block_size > 256 or extents.num_blocks == 0:
        return None
    heads = call.query.shape[2], cache.head_size_v
    if cache.layout.latent:
        return _plan_mla(call) if heads == _MLA_HEADS else None
    return _plan_many_rows(call) if many_rows and call.query_start_loc is not None and heads in _HEADS else None


def _plan_mla(call: Attention) -> HopperPlan | None:
    extents, key, _ = call.cache.placement
    box = min(extents.block_size & -extents.block_size, _MLA_TILE.positions // 2)
    side = _describe(call, key, call.query.shape[2], box)
    if side is None:
        return None
    origin, descriptor = side
    constants = LatentConstants(box, extents.num_layers is not None, origin)
    return HopperPlan("hopper.mla", "hopper_mla_kernel", _MLA_TILE, constants, {"key_cache_ptr": descriptor})


def _plan_many_rows(call: Attention) -> HopperPlan | None:
    cache = call.cache
    if call.block_tables.shape[1] * cache.extents.block_size <= SHORT:
        return None
    tile, piece = _HEADS[call.query.shape[2], cache.head_size_v]
    extents, key, value = cache.placement
    box = min(extents.block_size & -extents.block_size, tile.positions)
    sides = []
    for address, size in ((key, call.query.shape[2]), (value, cache.head_size_v)):
        side = _describe(call, address, size, box)
        if side is None:
            return None
        sides.append(side)
    (k_origin, key_box), (v_origin, value_box) = sides
    constants = HopperConstants(
        box=box,
        piece=piece,
        pieces=call.query.shape[2] // piece,
        layered=extents.num_layers is not None,
        k_origin=k_origin,
        v_origin=v_origin,
    )
    descriptors = {"key_cache_ptr": key_box, "value_cache_ptr": value_box}
    return HopperPlan("hopper.attention", "hopper_attention_kernel", tile, constants, descriptors)


def _describe(call: Attention, address: Address, size: int, box: int) -> tuple[tuple, Descriptor] | None:
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
    block = (1, 1, 1, box, 64)
    return tuple(origin), Descriptor(shape[axes], strides[axes], block[axes])
