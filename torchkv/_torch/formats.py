"""Stored formats and scales in torch's own operations: bits as the oracle's."""

import torch
from torch import Tensor

from kvcore.formats import DS_MLA_SMALLEST_SCALE, E4M3, FLOAT32, FLOATS, FP8_DS_MLA, NVFP4, SMALLEST_SCALE, FloatFormat
from kvcore.scales import Scales

BITS = {4: torch.uint8, 8: torch.uint8, 16: torch.int16, 32: torch.int32}
"""Integers that hold elements of a width in bits: floats may lose the payload of a NaN on their way."""

_MANTISSA, _EXPONENT = 0x007FFFFF, 0x7F800000
"""The bits of a float32 below and in its exponent."""


def bits_of(x: Tensor, stored: FloatFormat) -> Tensor:
    """Bits of floats in another format of floats, or their own where it is the same."""
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
    """Codes of e2m1: 0 to 7 for 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and 8 more for the negative of each."""
    magnitude = x.abs()
    # Steps are 0.5 below 2, 1 below 4, and 2 above. Even codes are even multiples of the step, so that round, which
    # rounds halves to even multiples, rounds them to even codes.
    above_2 = torch.where(magnitude < 4, magnitude.round() + 2, (magnitude / 2).round() + 4)
    code = torch.where(magnitude < 2, (magnitude * 2).round(), above_2)
    return code.nan_to_num(0).to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def pack(codes: Tensor, stored: FloatFormat) -> Tensor:
    """Codes as stored units: those of 4 bits two in a byte, the first in its low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4 if stored.bits == 4 else codes


def decode(units: Tensor, stored: FloatFormat) -> Tensor:
    """The float32 elements `[…, dim]` of stored units `[…, units]`, which are integers: exact, before any scale."""
    if stored.bits != 4:
        return units.view(_dtype(stored)).float()
    if stored.integer:
        low, high = (half.view(torch.int8) >> 4 for half in (units << 4, units))  # shifts in copies of the sign
        return torch.stack([low, high], dim=-1).flatten(-2).float()
    codes = torch.stack([units & 15, units >> 4], dim=-1).flatten(-2).to(torch.int16)
    # e2m1's exponent and mantissa become the lowest bit pair of float16's exponent and the highest bit of its mantissa,
    # and its sign float16's. Exponent biases are 1 and 15: such a float16 is 2^14 times as small as the number.
    shifted = (codes & 7) << 9 | (codes & 8) << 12
    return shifted.view(torch.float16).float() * 2.0**14


def _dtype(stored: FloatFormat) -> torch.dtype:
    """The dtype of a format's elements; those of fp8_ds_mla are e4m3."""
    return getattr(torch, E4M3.name if stored == FP8_DS_MLA else stored.name)


# ---- scales


def quantise(
    x: Tensor, stored: FloatFormat, scales: Scales | None, static: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Stored units of heads, and the bits of the scales that are computed for them.

    Divisors are tensors on x's device: where a divisor is a number, CUDA multiplies by its reciprocal.

    Args:
        x: `[…, num_heads, dim]` of floats.
        stored: What is stored.
        scales: Which scales are computed, or None.
        static: The static scale, which broadcasts over x; None for 1.

    Returns:
        Units `[…, num_heads, units]`, and scales `[…, num_heads, groups]` or None; both as integers.
    """
    x = x.float()
    if scales is None:
        return pack(encode(x if static is None else x / static, stored), stored), None
    groups = x.unflatten(-1, (-1, scales.group or x.shape[-1]))  # each has a scale
    magnitudes = groups.abs()
    if stored == FP8_DS_MLA:  # vLLM's maximum takes no NaN
        magnitudes = magnitudes.masked_fill(groups.isnan(), 0)
    absmax = magnitudes.amax(-1)
    if stored == NVFP4:
        static = x.new_ones(()) if static is None else static
        bits = encode(absmax / x.new_full((), NVFP4.largest) / static, E4M3)
        scale = decode(bits, E4M3)
        factor = (torch.ones_like(scale) / (scale * static)).masked_fill(scale == 0, 0)
        groups = groups * factor.unsqueeze(-1)
    else:
        scale = power_of_two_scale_of(absmax) if stored == FP8_DS_MLA else scale_of(absmax, stored.largest)
        bits = encode(scale, FLOAT32)
        groups = groups / scale.unsqueeze(-1)
    return pack(encode(groups, stored).flatten(-2), stored), bits


def scale_of(absmax: Tensor, largest: float) -> Tensor:
    """What numbers up to `absmax` are divided by to be at most `largest`; 1 if it would be subnormal."""
    scale = absmax / absmax.new_full((), largest)
    return scale.masked_fill(absmax < largest * SMALLEST_SCALE, 1).masked_fill(absmax.isnan(), torch.nan)


def power_of_two_scale_of(absmax: Tensor) -> Tensor:
    """fp8_ds_mla's scale: the first power of two by which `absmax` is divided to be at most e4m3's largest number."""
    bits = (absmax / absmax.new_full((), E4M3.largest)).view(torch.int32)
    # A float without mantissa bits is a power of two. Any mantissa bit carries one into the exponent, which rounds up.
    return ((bits + _MANTISSA) & _EXPONENT).view(torch.float32).clamp_min(DS_MLA_SMALLEST_SCALE)
