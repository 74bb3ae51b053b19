"""Where K, V and their scales are in tensors: views of integers, for any layout, and what they hold as float32."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.contract.cache import Cache
from kvcore.formats import BFLOAT16, DS_MLA_ROPE, FloatFormat
from kvcore.placement import Address, Extents, Placement
from torchkv._call import Call, layer_of
from torchkv._memory import span
from torchkv._torch.formats import BITS, decode


def layer_number(call: Call) -> int:
    """The layer's index, 0 where there is one layer. On a GPU this waits for an index in memory."""
    layer = layer_of(call)
    return 0 if layer is None else int(layer)


class Side(NamedTuple):
    """K or V of a layer: views `[block, slot, head, dim // x, x]` of integers, whatever their order in memory.

    Attributes:
        units: Stored units.
        format: Of their elements.
        scales: Scales of groups of elements, in their order; None: elements are multiplied by none of these.
        scale_format: Of the scales.
        rope: The rotary part, which follows the elements, in bfloat16 and without scales; None: there is none.
    """

    units: Tensor
    format: FloatFormat
    scales: Tensor | None
    scale_format: FloatFormat
    rope: Tensor | None


def sides_of(
    cache: Cache, caches: Sequence[Tensor], k_scale: Tensor | None, v_scale: Tensor | None, layer: int
) -> tuple[Side, Side]:
    """K and V of a layer. Where the cache has scale caches, they are k_scale and v_scale; static ones are not read."""
    key = _side(cache, caches[0], k_scale, layer, is_value=False)
    return key, _side(cache, caches[-1], v_scale, layer, is_value=True)


def _side(cache: Cache, array: Tensor, scale_cache: Tensor | None, layer: int, is_value: bool) -> Side:
    def view(array: Tensor, stored: FloatFormat, placement: Placement) -> Tensor:
        extents, key, value = placement
        address, units = (value, extents.head_units_v) if is_value else (key, extents.head_units)
        return view_of(array, BITS[stored.bits], address, extents, units)[layer]

    units, rope = view(array, cache.format, cache.placement), None
    if cache.rope is not None and not is_value:
        rope = view_of(array, BITS[BFLOAT16.bits], cache.rope, cache.extents, DS_MLA_ROPE)[layer]
    scales = cache.scales
    if scales is None:
        return Side(units, cache.format, None, cache.format, rope)
    scale_array = array if scales.inside else scale_cache
    assert scale_array is not None  # the contract has seen to it
    return Side(units, cache.format, view(scale_array, scales.format, scales.placement), scales.format, rope)


def view_of(array: Tensor, dtype: torch.dtype, address: Address, extents: Extents, head_units: int) -> Tensor:
    """K or V as `[layer, block, slot, head, dim // x, x]` of dtype, whatever their order in memory.

    Args:
        array: What holds them.
        dtype: Of a stored unit, or of a scale.
        address: Where they are, in elements of dtype.
        extents: Of the cache.
        head_units: Elements of dtype that a head takes.
    """
    if array.element_size() == dtype.itemsize:
        memory = array.view(dtype)
    else:  # scales among bytes: all of the array's memory, whatever its axes
        memory = array.as_strided((span(array),), (1,)).view(dtype)
    x = address.x
    return memory.as_strided(
        (extents.num_layers or 1, extents.num_blocks, extents.block_size, extents.num_heads, head_units // x, x),
        (address.layer, address.block, address.slot, address.head, address.dim, address.x_stride),
        memory.storage_offset() + address.offset,
    )


def elements_of(side: Side, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Elements as float32 `[…, dim]`, multiplied by their scales, but not by static ones.

    Args:
        side: K or V.
        pick: Gives `[…, dim // x, x]` of each of the side's views.
    """
    elements = decode(pick(side.units).flatten(-2), side.format)
    if side.scales is not None:
        scales = decode(pick(side.scales).flatten(-2), side.scale_format)
        elements.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1))
    if side.rope is not None:
        elements = torch.cat([elements, decode(pick(side.rope).flatten(-2), BFLOAT16)], dim=-1)
    return elements


def static_scale(scale: Tensor | None, cache: Cache, layer: int) -> Tensor | None:
    """What elements of a layer are multiplied by, `[1]` or `[num_heads]`; None for 1, and for a scale cache.

    Of a layer that the cache does not have, it is the nearest one's.
    """
    if scale is None or not cache.scaled or not (cache.scales is None or cache.scales.inside):
        return None
    if scale.dim() == 2:
        scale = scale[min(max(layer, 0), scale.shape[0] - 1)]
    return scale.reshape(-1)
