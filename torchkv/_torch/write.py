"""The write as vectorised torch: for devices without Triton, and to compare with. Also the formats, for both ways."""

import torch
from torch import Tensor

from kvcore.contract.write import Write
from kvcore.formats import DS_MLA_SMALLEST_SCALE, E4M3, FLOAT32, FLOATS, FP8_DS_MLA, NVFP4, SMALLEST_SCALE, FloatFormat
from kvcore.placement import Address, Extents
from kvcore.scales import Scales
from torchkv._call import Call
from torchkv._memory import span

BITS = {4: torch.uint8, 8: torch.uint8, 16: torch.int16, 32: torch.int32}
"""Integers that hold elements of a width in bits: floats may lose the payload of a NaN on their way."""


def write(write: Write, call: Call) -> None:
    """Writes with advanced indexing. Bits as the oracle's."""
    extents, scales = write.cache.extents, write.cache.scales
    layer = call.layer or 0 if call.layer_index is None else int(call.layer_index)
    if not 0 <= layer < (extents.num_layers or 1):
        return
    slots = call.slot_mapping.long()
    token = ((slots >= 0) & (slots < extents.num_slots)).nonzero().squeeze(1)
    block, place = slots[token] // extents.block_size, slots[token] % extents.block_size

    def store(array: Tensor, units: Tensor, at: Address) -> None:
        size = units.shape[-1]
        view = view_of(array, units.dtype, at, extents, size)
        view[layer, block, place] = units.unflatten(-1, (size // at.x, at.x))

    scale_arrays = call.scale_caches or call.caches
    for side, rows, stored, static in (
        (0, call.key, write.cache.format, call.k_scale),
        (-1, call.value, write.format_v, call.v_scale),
    ):
        x = rows[token].unsqueeze(-2) if call.rows else rows[token]
        static = None if static is None or not write.scaled else static.reshape(-1, 1)  # one, or one a head
        if stored.name in (write.key.dtype, *FLOATS):
            units, computed = _encode(x, stored), None
        else:
            units, computed = quantise(x, stored, scales, static)
        store(call.caches[side], units, write.placement[1:][side])
        if scales is not None and computed is not None:
            store(scale_arrays[side], computed, scales.placement[1:][side])


def view_of(array: Tensor, dtype: torch.dtype, at: Address, extents: Extents, head_size: int) -> Tensor:
    """K's or V's elements as `[layer, block, slot, head, dim // x, x]` of dtype, whatever their order in memory."""
    if array.element_size() == dtype.itemsize:
        memory = array.view(dtype)
    else:  # the bytes of the array, whatever its axes
        memory = array.as_strided((span(array),), (1,)).view(dtype)
    layers, blocks, slots, heads, *_ = extents
    return memory.as_strided(
        (layers or 1, blocks, slots, heads, head_size // at.x, at.x),
        (at.layer, at.block, at.slot, at.head, at.dim, at.x_stride),
        memory.storage_offset() + at.offset,
    )


# ---- scales


def quantise(
    x: Tensor, stored: FloatFormat, scales: Scales | None, static: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Stored units of heads `[…, num_heads, dim]`, and the bits of the scales that are computed.

    Divisors are tensors on x's device: by a number, CUDA multiplies with its reciprocal.
    """
    x = x.float()
    if scales is None:
        return pack(encode(x if static is None else x / static, stored), stored), None
    rows = x.unflatten(-1, (-1, scales.group or x.shape[-1]))
    magnitudes = rows.abs()
    absmax = (magnitudes.masked_fill(rows.isnan(), 0) if stored == FP8_DS_MLA else magnitudes).amax(-1)
    if stored == NVFP4:
        whole = x.new_ones(()) if static is None else static
        bits = encode(absmax / x.new_full((), NVFP4.largest) / whole, E4M3)
        scale = decode(bits, E4M3)
        factor = (torch.ones_like(scale) / (scale * whole)).masked_fill(scale == 0, 0)
        rows = rows * factor.unsqueeze(-1)
    else:
        scale = (power_of if stored == FP8_DS_MLA else scale_of)(absmax, stored.largest)
        bits = encode(scale, FLOAT32)
        rows = rows / scale.unsqueeze(-1)
    return pack(encode(rows, stored).flatten(-2), stored), bits


def scale_of(absmax: Tensor, largest: float) -> Tensor:
    """What numbers up to `absmax` are divided by to be at most `largest`; 1 if it would be subnormal."""
    scale = absmax / absmax.new_full((), largest)
    return scale.masked_fill(absmax < largest * SMALLEST_SCALE, 1).masked_fill(absmax.isnan(), torch.nan)


def power_of(absmax: Tensor, largest: float) -> Tensor:
    """The same, rounded up to a power of two, and at least that of fp8_ds_mla."""
    bits = (absmax / absmax.new_full((), largest)).view(torch.int32)
    # A float without mantissa is a power of two; what the mantissa carries into the exponent rounds up to one.
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32).clamp_min(DS_MLA_SMALLEST_SCALE)


# ---- formats


def _encode(x: Tensor, stored: FloatFormat) -> Tensor:
    """Bits of floats in another format, or their own where it is the same."""
    if getattr(torch, stored.name) == x.dtype:
        return x.view(BITS[stored.bits])
    return encode(x.float(), stored)


def encode(x: Tensor, stored: FloatFormat) -> Tensor:
    """Bits of float32 numbers in another format, as integers; one a byte where they have 4."""
    nan = x.isnan()
    if stored.name not in FLOATS:  # casts overflow to NaN or infinity, or wrap: saturate first
        x = x.clamp(-stored.largest, stored.largest)
    if stored.integer:
        return x.masked_fill(nan, 0).round().to(torch.int8).view(torch.uint8) & ((1 << stored.bits) - 1)
    code = _encode_e2m1(x) if stored == NVFP4 else x.to(_dtype(stored)).view(BITS[stored.bits])
    return code.masked_fill(nan, stored.nan)


def _encode_e2m1(x: Tensor) -> Tensor:
    """Numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6, whose places are their codes, and their negatives."""
    m = x.abs()
    high = torch.where(m < 4, m.round() + 2, (m / 2).round() + 4)
    code = torch.where(m < 2, (m * 2).round(), high)  # multiples of 0.5, 1 or 2: even codes are even multiples
    return code.nan_to_num(0).to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def pack(codes: Tensor, stored: FloatFormat) -> Tensor:
    """Codes as they are stored: those of 4 bits two in a byte, the first in its low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4 if stored.bits == 4 else codes


def decode(units: Tensor, stored: FloatFormat) -> Tensor:
    """Stored elements `[…, units]` as float32 `[…, dim]`, before any scale: exact. Units are integers."""
    if stored.bits != 4:
        return units.view(_dtype(stored)).float()
    if stored.integer:
        low, high = (u.view(torch.int8) >> 4 for u in (units << 4, units))
        return torch.stack([low, high], dim=-1).flatten(-2).float()
    codes = torch.stack([units & 15, units >> 4], dim=-1).flatten(-2).to(torch.int16)
    # The lowest bits of float16's exponent and the highest of its mantissa: the number is 2^14 times as small.
    half = (codes & 7) << 9 | (codes & 8) << 12
    return half.view(torch.float16).float() * 2.0**14


def _dtype(stored: FloatFormat) -> torch.dtype:
    return getattr(torch, E4M3.name if stored == FP8_DS_MLA else stored.name)
