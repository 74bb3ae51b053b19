"""Arithmetic of float32 as IEEE 754 has it, though XLA's CPU code reads subnormal numbers as zero, and writes none.

On GPUs, XLA's divisions are approximate, and products may be contracted with sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcore.formats import SMALLEST_SCALE

INFINITY = 0x7F800000
_SIGN, _MANTISSA, _HIDDEN = 0x80000000, 0x7FFFFF, 0x800000

# ---- whatever the operands: every result is rounded to the nearest number, or the even one of two


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x + y`. The barriers keep products apart, which XLA would contract with the sum."""
    x, y = lax.optimization_barrier((x, y))
    # Of numbers below 2^-100, the sum times 2^48: there it is exact unless it is normal, and has no subnormal number.
    # Beside a number that is not, a subnormal one is less than half of the last place.
    small = jnp.maximum(bits_of(x) & ~_sign(), bits_of(y) & ~_sign()) < np.float32(2.0**-100).view(np.uint32)
    scaled = _times_2_48(x) + _times_2_48(y)
    bits = bits_of(scaled)
    multiple = (jnp.abs(scaled) * jnp.float32(2.0**101)).astype(jnp.uint32)
    tiny = (bits & ~_sign()) < np.float32(2.0**-78).view(np.uint32)
    in_small = jnp.where(tiny, float_of(multiple | bits & _sign()), scaled * jnp.float32(2.0**-48))
    return jnp.where(small, in_small, x + y)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x * y`; operands are broadcast."""
    x, y = lax.optimization_barrier(tuple(jnp.broadcast_arrays(x, y)))
    (x_whole, x_exponent), (y_whole, y_exponent) = _parts(x), _parts(y)
    # In units of 2^22, of which the last is odd if anything is below it.
    above, below = _product(x_whole, y_whole)
    units = (above << 2 | below >> 22) << 1 | ((below & 0x3FFFFF) != 0).astype(jnp.uint32)
    result = _tiny(units, -149 - 21 - x_exponent - y_exponent, x, y)
    (x, x_factor), (y, y_factor) = normal(x), normal(y)
    return _unless_tiny(result, x * y * (x_factor * y_factor))


def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`; operands are broadcast."""
    x, y = lax.optimization_barrier(tuple(jnp.broadcast_arrays(x, y)))
    (x_whole, x_exponent), (y_whole, y_exponent) = _parts(x), _parts(y)
    # The quotient of the significands, to 24 bits; and whether it is that, or more, or less.
    whole, exponent = _parts(x_whole.astype(jnp.float32) / y_whole.astype(jnp.float32))
    above, below = _product(whole, y_whole)
    up = (-exponent).astype(jnp.uint32) - 23  # 0 or 1: whole = x / y · 2^(23 + up)
    x_above, x_below = x_whole >> 1 << up | (x_whole & up), jnp.where(up == 1, 0, (x_whole & 1) << 23)
    more = (x_above > above) | ((x_above == above) & (x_below > below))
    less = (x_above < above) | ((x_above == above) & (x_below < below))
    units = (whole << 2) + more.astype(jnp.uint32) - less.astype(jnp.uint32)
    result = _tiny(units, -149 - (x_exponent - y_exponent + exponent - 2), x, y)
    return _unless_tiny(result, divide(x, y))


def root(x: jax.Array) -> jax.Array:
    """The square root."""
    y, factor = normal(x)
    return jnp.sqrt(y) * jnp.where(factor == 1, factor, jnp.float32(2.0**-12))


def _sign() -> jax.Array:
    return jnp.uint32(_SIGN)


def _times_2_48(x: jax.Array) -> jax.Array:
    """Numbers below 2^-100, times 2^48."""
    y, factor = normal(x)
    return y * (factor * jnp.float32(2.0**48))


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whole, exponent) with `|x| = whole · 2^exponent`, and whole from 2^23 on and below 2^24, or 0."""
    y, factor = normal(x)
    bits = bits_of(y)
    exponent = ((bits >> 23) & 0xFF).astype(jnp.int32)
    whole = jnp.where(exponent > 0, bits & _MANTISSA | _HIDDEN, 0)
    return whole, exponent - 150 - jnp.where(factor == 1, 0, 24)


def _product(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(above, below) with `x · y = above · 2^24 + below`, of integers below 2^24."""
    (x1, x0), (y1, y0) = ((n >> 12, n & 0xFFF) for n in (x, y))
    middle = x1 * y0 + x0 * y1 + (x0 * y0 >> 12)
    return x1 * y1 + (middle >> 12), (middle & 0xFFF) << 12 | (x0 * y0 & 0xFFF)


def _tiny(units: jax.Array, down: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`units · 2^-down`, rounded, as a multiple of 2^-149, with the sign of x · y; and whether that is the result."""
    down = jnp.clip(down, 0, 30).astype(jnp.uint32)
    last = jnp.uint32(1) << down
    multiple = round_up(units >> down, 2 * (units & (last - 1)), last)
    signs = (bits_of(x) ^ bits_of(y)) & _sign()
    return float_of(multiple | signs), (multiple <= _HIDDEN) & jnp.isfinite(x) & jnp.isfinite(y)


def _unless_tiny(result: tuple[jax.Array, jax.Array], usual: jax.Array) -> jax.Array:
    number, tiny = result
    return jnp.where(tiny, number, usual)


# ---- where some things are known of the operands


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, for y in which XLA would take shortcuts. A subnormal quotient becomes zero.

    It multiplies by the reciprocal of a broadcast scalar, hence the barrier. And XLA's CPU code reads subnormal
    numbers as zero: they are brought into the normal range, and the quotient back.
    """
    x, x_factor = normal(x)
    y, y_factor = normal(lax.optimization_barrier(jnp.broadcast_to(y, x.shape)))
    return x / y * x_factor / y_factor


def times(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x * y`, where y or the product is subnormal too. x is zero or has 8 significant bits and at least 2^-24."""
    x, y = jnp.broadcast_arrays(x, y)
    x_bits, y_bits = bits_of(x), bits_of(y)
    x_exponent, y_exponent = (((b >> 23) & 0xFF).astype(jnp.int32) for b in (x_bits, y_bits))
    # Significands as integers: their product fits 32 bits, and counts multiples of 2^(shift - 149).
    x_whole = jnp.where(x_exponent > 0, (x_bits & 0x7FFFFF | 0x800000) >> 16, 0)
    y_whole = y_bits & 0x7FFFFF | jnp.where(y_exponent > 0, jnp.uint32(0x800000), 0)
    product = x_whole * y_whole
    shift = x_exponent - 134 + jnp.maximum(y_exponent, 1) - 1
    down, up = (jnp.clip(s, 0, 31).astype(jnp.uint32) for s in (-shift, shift))
    last = jnp.uint32(1) << down
    multiple = round_up(product >> down, 2 * (product & (last - 1)), last)
    tiny = (multiple <= (jnp.uint32(0x800000) >> up)) & jnp.isfinite(x) & jnp.isfinite(y)
    y, factor = normal(y)
    return jnp.where(tiny, float_of(multiple << up | (x_bits ^ y_bits) & jnp.uint32(1 << 31)), x * y * factor)


def sixth(x: jax.Array) -> jax.Array:
    """`x / 6`, where x or the quotient is subnormal too. x is not negative."""
    bits = bits_of(x)
    # Below 6 · 2^-126, a number is a small multiple of 2^-149, and so is the quotient.
    shift = jnp.clip(bits >> 23, 1, 3) - 1
    multiple = jnp.where(bits >= 0x800000, (bits & 0x7FFFFF | 0x800000) << shift, bits)
    tiny = float_of(round_up(multiple // 6, 2 * (multiple % 6), jnp.uint32(6)))
    return jnp.where(bits < np.float32(6 * SMALLEST_SCALE).view(np.uint32), tiny, divide(x, unfolded(6, bits)))


def unfolded(number: float, bits: jax.Array) -> jax.Array:
    """A number that XLA cannot know: on GPUs it drops barriers and multiplies by the reciprocal of a constant.

    `bits` are of numbers without a sign, so never all ones.
    """
    return jnp.where(bits == np.uint32(0xFFFFFFFF), jnp.float32(1), jnp.float32(number))


def round_up(whole: jax.Array, twice_rest: jax.Array, divisor: jax.Array) -> jax.Array:
    """`whole + rest / divisor` as an integer, the nearest, or the even one of two."""
    up = (twice_rest > divisor) | ((twice_rest == divisor) & (whole & 1 == 1))
    return whole + up.astype(jnp.uint32)


def normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y, f) with x = y·f and y normal, or zero, infinite or NaN."""
    bits = bits_of(x)
    subnormal = (bits & INFINITY) == 0
    # A subnormal is mantissa · 2^-149; times 2^24 it is normal.
    scaled = (bits & 0x7FFFFF).astype(jnp.float32) * jnp.float32(2.0**-125)
    y = jnp.where(subnormal, jnp.copysign(scaled, x), x)
    return y, jnp.where(subnormal, jnp.float32(2.0**-24), jnp.float32(1))


def is_nan(bits: jax.Array) -> jax.Array:
    return (bits & 0x7FFFFFFF) > INFINITY


def bits_of(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def float_of(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
