"""Exact rounding of floats to narrower numbers, the same on every target and in the interpreter."""

import triton
import triton.language as tl

from .decode import widen

# Between 2^23 and 2^24 the floats are the integers. So 2^23 + x is x rounded to an integer, to nearest even, and the
# low bits of the sum are that integer. A negative x needs 1.5 * 2^23, so that the sum is not below 2^23; its own low
# bits are zeros, too, and those of the sum are x in two's complement.
_TO_INTEGER = tl.constexpr(1.5 * 2**23)
_TO_UNSIGNED = tl.constexpr(2.0**23)

_INFINITY = tl.constexpr(0x7F800000)  # float32 bits; those of a NaN, without its sign, are larger
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all float32 bits but the sign


@triton.jit
def encode(x, scale, FORMAT: tl.constexpr, HARDWARE_CAST: tl.constexpr):
    """Bits of `x / scale` in FORMAT (a kvcore.formats.FloatFormat), rounded once, to nearest even."""
    x = widen(x)
    if scale is not None:
        x = tl.div_rn(x, scale)  # IEEE division; `/` is not
    if HARDWARE_CAST and FORMAT.bits == 16:
        if FORMAT.mantissa_bits == 7:
            bits = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        else:
            bits = x.to(tl.float16).to(tl.uint16, bitcast=True)
        bits = tl.where(x == x, bits, FORMAT.nan).to(tl.uint16)
    elif HARDWARE_CAST:
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
        bits = tl.where((b & _MAGNITUDE) > _INFINITY, FORMAT.nan, b)
    else:
        bits = _round(x, FORMAT)
    return bits


@triton.jit
def _round(x, FORMAT: tl.constexpr):
    """Round float32 with integer arithmetic: no instruction, compiler or interpreter can round otherwise."""
    DROPPED: tl.constexpr = 23 - FORMAT.mantissa_bits
    b = x.to(tl.uint32, bitcast=True)
    magnitude = b & _MAGNITUDE
    sign = (b >> (32 - FORMAT.bits)) & (1 << (FORMAT.bits - 1))
    nan = magnitude > _INFINITY
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
    bits = (x + _TO_INTEGER).to(tl.uint32, bitcast=True) & ((1 << FORMAT.bits) - 1)
    return bits.to(tl.uint8)


@triton.jit
def _round_to_e2m1(x, FORMAT: tl.constexpr):
    """Round float32 to 0, 0.5, 1, 1.5, 2, 3, 4 or 6, which have the codes 0 to 7; the sign adds 8."""
    m = tl.minimum(tl.abs(x), 6.0)
    # The code of a magnitude m is 2m up to 2, m + 2 up to 4, m/2 + 4 up to 6, rounded: the least of the three. A tie
    # goes to the even code, as nearest even wants it: even codes are those whose mantissa bit is 0.
    code = tl.fma(m, 2.0, _TO_UNSIGNED)
    code = tl.minimum(code, m + (_TO_UNSIGNED + 2.0))
    code = tl.minimum(code, tl.fma(m, 0.5, _TO_UNSIGNED + 4.0))
    sign = (x.to(tl.uint32, bitcast=True) >> 28) & 8
    code = (code.to(tl.uint32, bitcast=True) & 7) | sign
    return tl.where(x == x, code, FORMAT.nan).to(tl.uint8)


@triton.jit
def pack(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Stored units of elements `[ROWS, COLUMNS]`.

    Those of 4 bits are packed two in a byte, the first in its low half: `[ROWS, COLUMNS // 2]`. All others are units
    already, as are elements that were not encoded, for which FORMAT is None.
    """
    if FORMAT is not None:
        if FORMAT.bits == 4:  # `and` would have the compiler look at both of its sides
            low, high = tl.split(tl.reshape(bits, [ROWS, COLUMNS // 2, 2]))
            bits = low | (high << 4)
    return bits


@triton.jit
def store_rounded(ptr, x, mask, FORMAT: tl.constexpr):
    """Stores float32 as what ptr points to: rounded to FORMAT with integers, or, where that is None, by the target."""
    if FORMAT is None:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        bits = encode(x, None, FORMAT, False)
        tl.store(ptr.to(tl.pointer_type(bits.dtype)), bits, mask=mask)
