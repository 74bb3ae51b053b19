"""The write as vectorised torch: for devices without Triton, and to compare with."""

import torch
from torch import Tensor

from kvcore.checks import overlap_error
from kvcore.contract import Write
from kvcore.layout import Address, Extents
from kvcore.quantization import FP8, FloatFormat
from torchkv._call import Call
from torchkv._memory import share_elements

BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
"""Integers of a width in bits: floats may lose the payload of a NaN on their way."""


def write(write: Write, call: Call) -> None:
    """Writes with advanced indexing. Bits as the oracle's."""
    if len(call.caches) == 2 and share_elements(*call.caches):
        raise overlap_error()
    key, value, extents = write.placement.key, write.placement.value, write.placement.extents
    layer = call.layer or 0 if call.layer_index is None else int(call.layer_index)
    if not 0 <= layer < (extents.num_layers or 1):
        return
    slots = call.slot_mapping.long()
    token = ((slots >= 0) & (slots < extents.num_slots)).nonzero().squeeze(1)
    block, place = slots[token] // extents.block_size, slots[token] % extents.block_size
    for rows, cache, at, size, scale in (
        (call.key, call.caches[0], key, extents.head_size, call.k_scale),
        (call.value, call.caches[-1], value, extents.head_size_v, call.v_scale),
    ):
        x = _encode(rows[token], write, scale)
        view = view_of(cache.view(x.dtype), at, extents, size)
        view[layer, block, place] = x.unflatten(-1, (size // at.x, at.x))


def view_of(cache: Tensor, at: Address, extents: Extents, head_size: int) -> Tensor:
    """K's or V's elements as `[layer, block, slot, head, dim // x, x]`, whatever their order in memory."""
    layers, blocks, slots, heads, *_ = extents
    return cache.as_strided(
        (layers or 1, blocks, slots, heads, head_size // at.x, at.x),
        (at.layer, at.block, at.slot, at.head, at.dim, at.x_stride),
        cache.storage_offset() + at.offset,
    )


def _encode(x: Tensor, write: Write, scale: Tensor | None) -> Tensor:
    """The stored bits, as integers."""
    if write.copies:
        return x.view(BITS[write.format.bits])
    x = x.float()
    return encode(x / scale.reshape(()) if write.scaled and scale is not None else x, write.format)


def encode(x: Tensor, stored: FloatFormat) -> Tensor:
    """Bits of float32 numbers in another format, as integers."""
    nan = x.isnan()
    if stored.name in FP8:  # the cast overflows to NaN on some versions of torch: saturate first
        largest = torch.finfo(getattr(torch, stored.name)).max
        x = x.clamp(-largest, largest)
    code = x.to(getattr(torch, stored.name)).view(BITS[stored.bits])
    return code.masked_fill(nan, stored.nan)
