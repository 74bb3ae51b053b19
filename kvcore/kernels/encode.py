"""Exact rounding of floats to narrower numbers, the same on every target and in the interpreter."""

import triton
import triton.language as tl

from .decode import decode, widen
from .reduce import maximum


@triton.jit
def encode(x, scale, FORMAT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """Bits of `x / scale` in FORMAT (a kvcore.formats.FloatFormat), rounded once, to nearest even."""
    x = widen(x)
    if scale is not None:
        x = tl.div_rn(x, scale)  # IEEE division; `/` is not
    if HARDWARE_FP8:
        if FORMAT.mantissa_bits == 3:
            bits = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            bits = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif FORMAT.integer:
        bits = _round_to_integer(x, FORMAT)
    elif FORMAT.bits == 4:
        bits = _round_to_e2m1(x, FORMAT)
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
    if FORMAT.unsigned_zero:
        sign = tl.where(bits == 0, 0, sign)
    bits = tl.where(nan, FORMAT.nan, bits | sign)
    return bits.to(tl.uint16) if FORMAT.bits == 16 else bits.to(tl.uint8)


@triton.jit
def _round_to_integer(x, FORMAT: tl.constexpr):
    """Round float32 to two's complement of FORMAT.bits: what is too large saturates, NaN becomes 0."""
    LARGEST: tl.constexpr = 2 ** (FORMAT.bits - 1) - 1
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -1.0 * LARGEST), 1.0 * LARGEST)
    # Between 2^23 and 2^24 floats are the integers: the adder rounds. The low bits of 1.5 * 2^23 are zeros.
    bits = (x + 12582912.0).to(tl.uint32, bitcast=True) & ((1 << FORMAT.bits) - 1)
    return bits.to(tl.uint8)


@triton.jit
def _round_to_e2m1(x, FORMAT: tl.constexpr):
    """Round float32 to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 and a sign: codes 0 to 7, and 8."""
    m = tl.minimum(tl.abs(x), 6.0)
    # The code is 2m up to 2, m + 2 up to 4, m/2 + 4 up to 6: the least of the three. Added to 2^23, each is rounded to
    # an integer, to an even one of two as near, which are the even codes.
    code = tl.minimum(tl.minimum(tl.fma(m, 2.0, 8388608.0), m + 8388610.0), tl.fma(m, 0.5, 8388612.0))
    sign = (x.to(tl.uint32, bitcast=True) >> 28) & 8
    code = (code.to(tl.uint32, bitcast=True) & 7) | sign
    return tl.where(x == x, code, FORMAT.nan).to(tl.uint8)


@triton.jit
def pack(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Encoded elements `[ROWS, COLUMNS]` as stored: those of 4 bits two in a byte, the first in its low half."""
    if FORMAT is not None:
        if FORMAT.bits == 4:  # compiled, `and` would look at both sides
            low, high = tl.split(tl.reshape(bits, [ROWS, COLUMNS // 2, 2]))
            bits = low | (high << 4)
    return bits


@triton.jit
def row_scales(x, inside, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """Scales of groups of GROUP elements of float32 rows, `[ROWS, COLUMNS // GROUP]`: the largest magnitude / LARGEST.

    1 where that magnitude's bits are below LEAST, NaN where the group has one. Columns not `inside` have no part in it.
    """
    top = _absmax(x, inside, ROWS, COLUMNS, GROUP)
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, LARGEST, tl.float32))
    bits = tl.where(top < LEAST, 0x3F800000, scale.to(tl.int32, bitcast=True))
    return tl.where(top > 0x7F800000, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def power_scales(x, inside, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 GROUP: tl.constexpr):  # fmt: skip
    """Scales as `row_scales`, but rounded up to powers of two, the least of them with the bits LEAST.

    NaN has no part in the largest magnitude. That may be infinite, and so is the scale then.
    """
    top = _absmax(tl.where(x == x, x, 0.0), inside, ROWS, COLUMNS, GROUP)
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, LARGEST, tl.float32))
    # A float without mantissa is a power of two; what the mantissa carries into the exponent rounds up to one.
    bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return tl.maximum(bits, LEAST).to(tl.float32, bitcast=True)


@triton.jit
def block_scales(x, inside, whole, FORMAT: tl.constexpr, HARDWARE: tl.constexpr, LARGEST: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Scales of nvfp4's blocks `[ROWS, COLUMNS // GROUP]`: bytes of FORMAT, and what elements are multiplied by.

    `whole` is the scale of the rows, `[ROWS, 1]`.
    """
    top = _absmax(x, inside, ROWS, COLUMNS, GROUP).to(tl.float32, bitcast=True)
    top = tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32))
    bits = encode(top, tl.broadcast_to(whole, top.shape), FORMAT, HARDWARE)
    number = widen(decode(bits, FORMAT, HARDWARE))
    reciprocal = tl.div_rn(tl.full(number.shape, 1.0, tl.float32), number * whole)
    return bits, tl.where(number == 0, 0.0, reciprocal)


@triton.jit
def _absmax(x, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Bits of the largest magnitudes of groups; as integers, so that NaN is the largest everywhere."""
    magnitude = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    if GROUP == COLUMNS:
        top = maximum(magnitude, 1)[:, None]
    else:
        top = maximum(tl.reshape(magnitude, [ROWS, COLUMNS // GROUP, GROUP]), 2)
    return top


@triton.jit
def spread(scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Scales of groups `[ROWS, COLUMNS // GROUP]` for each column: `[ROWS, COLUMNS]`, or `[ROWS, 1]` of one group."""
    if GROUP != COLUMNS:
        scale = tl.broadcast_to(scale[:, :, None], [ROWS, COLUMNS // GROUP, GROUP])
        scale = tl.reshape(scale, [ROWS, COLUMNS])
    return scale
