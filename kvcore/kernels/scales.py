"""Scales that kernels compute: one for each group of elements that lie side by side in a head.

A row is a head of a token, in float32, `[ROWS, COLUMNS]`; GROUP of its elements share a scale, `[ROWS, COLUMNS //
GROUP]`. Where a head has one scale, GROUP is COLUMNS. Columns that are not `inside` the head count as zeros.

LARGEST is the largest number of the elements' format: quantised, the largest magnitude of a group becomes that.
"""

import triton
import triton.language as tl

from .decode import decode, widen
from .encode import encode
from .reduce import maximum

# float32 bit patterns. As integers, those of numbers that are not negative are in the numbers' order.
_ONE = tl.constexpr(0x3F800000)
_INFINITY = tl.constexpr(0x7F800000)  # all bits of the exponent; NaN is above
_NAN = tl.constexpr(0x7FC00000)
_MANTISSA = tl.constexpr(0x007FFFFF)


@triton.jit
def float_scales(x, inside, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 GROUP: tl.constexpr):  # fmt: skip
    """Scales in float32: the largest magnitude of each group / LARGEST.

    1 where that magnitude's bits are below LEAST, which is as good as 0; NaN where the group has one.
    """
    top = _largest_magnitudes(x, inside, ROWS, COLUMNS, GROUP)
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, LARGEST, tl.float32))
    bits = tl.where(top < LEAST, _ONE, scale.to(tl.int32, bitcast=True))
    return tl.where(top > _INFINITY, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def power_scales(x, inside, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 GROUP: tl.constexpr):  # fmt: skip
    """Scales in float32 that are powers of two: the largest magnitude / LARGEST, rounded up, LEAST's bits at least.

    NaN counts as 0. An infinite magnitude makes an infinite scale.
    """
    top = _largest_magnitudes(tl.where(x == x, x, 0.0), inside, ROWS, COLUMNS, GROUP)
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, LARGEST, tl.float32))
    # A float whose mantissa is 0 is a power of two. Any other mantissa plus the largest one carries into the exponent.
    bits = (scale.to(tl.int32, bitcast=True) + _MANTISSA) & _INFINITY
    return tl.maximum(bits, LEAST).to(tl.float32, bitcast=True)


@triton.jit
def encoded_scales(x, inside, row_scale, FORMAT: tl.constexpr, HARDWARE: tl.constexpr, LARGEST: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Scales of nvfp4, as bytes of FORMAT, and the factors that elements are multiplied by to be quantised.

    `row_scale`, `[ROWS, 1]`, is the static scale, and a scale in FORMAT is a multiple of it. Where that multiple rounds
    to 0, the factor is 0, too.
    """
    top = _largest_magnitudes(x, inside, ROWS, COLUMNS, GROUP).to(tl.float32, bitcast=True)
    top = tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32))
    bits = encode(top, tl.broadcast_to(row_scale, top.shape), FORMAT, HARDWARE)
    multiple = widen(decode(bits, FORMAT, HARDWARE))
    factor = tl.div_rn(tl.full(multiple.shape, 1.0, tl.float32), multiple * row_scale)
    return bits, tl.where(multiple == 0, 0.0, factor)


@triton.jit
def _largest_magnitudes(x, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """float32 bits of the largest magnitude of each group, `[ROWS, COLUMNS // GROUP]`.

    Magnitudes are compared as integers, so that on every target NaN is larger than all numbers.
    """
    magnitude = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    if GROUP == COLUMNS:
        top = maximum(magnitude, 1)[:, None]
    else:
        top = maximum(tl.reshape(magnitude, [ROWS, COLUMNS // GROUP, GROUP]), 2)
    return top


@triton.jit
def spread(scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Scales of groups, `[ROWS, COLUMNS // GROUP]`, for columns: `[ROWS, COLUMNS]`, or `[ROWS, 1]` of one group."""
    if GROUP != COLUMNS:
        scale = tl.broadcast_to(scale[:, :, None], [ROWS, COLUMNS // GROUP, GROUP])
        scale = tl.reshape(scale, [ROWS, COLUMNS])
    return scale
