"""Exact rounding of floats to narrower ones, the same on every target and in the interpreter."""

import triton
import triton.language as tl

from .decode import widen


@triton.jit
def encode(x, scale, FORMAT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """Bits of `x / scale` in FORMAT (a kvcore.quantization.FloatFormat), rounded once, to nearest even."""
    x = widen(x)
    if scale is not None:
        x = tl.div_rn(x, scale)  # IEEE division; `/` is not
    if HARDWARE_FP8:
        if FORMAT.mantissa_bits == 3:
            bits = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            bits = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif FORMAT.bits == 32:
        b = x.to(tl.uint32, bitcast=True)
        bits = tl.where((b & 0x7FFFFFFF) > 0x7F800000, FORMAT.nan, b)
    else:
        bits = _round(x, FORMAT)
    return bits


@triton.jit
def _round(x, FORMAT: tl.constexpr):
    """Round float32 with integer arithmetic: no instruction, compiler or interpreter can round otherwise."""
    DROPPED: tl.constexpr = 23 - FORMAT.mantissa_bits
    b = x.to(tl.uint32, bitcast=True)
    magnitude = b & 0x7FFFFFFF
    sign = (b >> (32 - FORMAT.bits)) & (1 << (FORMAT.bits - 1))
    nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, FORMAT.clamp)
    # Normal numbers: add half of the last place that stays, less one where that place is even; rebias.
    half = (1 << (DROPPED - 1)) - 1 + ((magnitude >> DROPPED) & 1)
    bits = ((magnitude + half) >> DROPPED) - ((127 - FORMAT.bias) << FORMAT.mantissa_bits)
    if FORMAT.bias != 127:
        # Subnormal numbers: adding 2^23 quanta lets the float adder round to a multiple of the quantum
        # 2^(1 - bias - mantissa_bits); the sum's low bits are the result.
        QUANTA: tl.constexpr = (127 + 24 - FORMAT.bias - FORMAT.mantissa_bits) << 23
        quanta = tl.full(x.shape, QUANTA, tl.uint32).to(tl.float32, bitcast=True)
        subnormal = (magnitude.to(tl.float32, bitcast=True) + quanta).to(tl.uint32, bitcast=True) - QUANTA
        bits = tl.where(magnitude < ((128 - FORMAT.bias) << 23), subnormal, bits)
    bits = tl.where(nan, FORMAT.nan, bits | sign)
    return bits.to(tl.uint8) if FORMAT.bits == 8 else bits.to(tl.uint16)
