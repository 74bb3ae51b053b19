"""Arithmetic of float32 as IEEE 754 has it, though XLA's CPU code reads subnormal numbers as zero, and writes none.

On GPUs, XLA's divisions are approximate, and products may be contracted with sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcore.formats import SMALLEST_SCALE

INFINITY = 0x7F800000


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
