"""Stored formats and scales in XLA: bits as the oracle's, though XLA's CPU code reads subnormal numbers as zero.

Rounding is integer arithmetic throughout. XLA has casts for some of the formats, on some platforms.

On GPUs XLA's divisions are approximate: a computed scale may be off in its last bit. Caches are written by the Triton
kernels there, whose divisions are exact.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv._xla.arithmetic import INFINITY, bits_of, divide, float_of, is_nan, normal, sixth, times, unfolded
from kvcore.formats import DS_MLA_SMALLEST_SCALE, E4M3, FP8_DS_MLA, NVFP4, NVFP4_GROUP, SMALLEST_SCALE, FloatFormat

_NAN = 0x7FC00000


def encode(x: jax.Array, stored: FloatFormat) -> jax.Array:
    """Bits of float32 numbers in another format, the nearest, or the even one of two: uint8, uint16 or uint32."""
    bits = bits_of(x)
    magnitude, nan = bits & 0x7FFFFFFF, is_nan(bits)
    if stored.bits == 32:
        return jnp.where(nan, jnp.uint32(stored.nan), bits)
    if stored.integer:
        whole = lax.round(jnp.clip(x, -stored.largest, stored.largest), lax.RoundingMethod.TO_NEAREST_EVEN)
        code = lax.bitcast_convert_type(jnp.where(nan, 0, whole).astype(jnp.int8), jnp.uint8)
        return code & jnp.uint8((1 << stored.bits) - 1)
    dropped = 23 - stored.mantissa_bits
    magnitude = jnp.minimum(magnitude, jnp.uint32(stored.clamp))
    # Normal numbers: add half of the last place that stays, less one where that place is even; rebias.
    half = jnp.uint32((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1)
    code = ((magnitude + half) >> dropped) - jnp.uint32((127 - stored.bias) << stored.mantissa_bits)
    if stored.bias != 127:
        # Subnormal numbers: next to 2^23 quanta, a float addition rounds to a multiple of the quantum, and leaves the
        # multiple in the sum's low bits.
        quanta = jnp.uint32((127 + 24 - stored.bias - stored.mantissa_bits) << 23)
        subnormal = bits_of(float_of(magnitude) + float_of(quanta)) - quanta
        code = jnp.where(magnitude < ((128 - stored.bias) << 23), subnormal, code)
    sign = (bits >> (32 - stored.bits)) & (1 << (stored.bits - 1))
    if stored.unsigned_zero:
        sign = jnp.where(code == 0, jnp.uint32(0), sign)
    return jnp.where(nan, jnp.uint32(stored.nan), code | sign).astype(f"uint{max(stored.bits, 8)}")


def pack(codes: jax.Array, stored: FloatFormat) -> jax.Array:
    """Codes as they are stored: those of 4 bits two in a byte, the first in its low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4 if stored.bits == 4 else codes


def decode(units: jax.Array, stored: FloatFormat) -> jax.Array:
    """Stored elements as float32, before any scale: exact."""
    if stored.bits == 4:
        codes = jnp.stack([units & 15, units >> 4], axis=-1).reshape(*units.shape[:-1], -1)
        if stored.integer:
            return (codes ^ 8).astype(jnp.float32) - 8
        whole = codes.astype(jnp.uint32)
        # The same fields in float32. Its exponents reach further, so that of a subnormal number has to be found.
        normal = ((whole & 7) << (23 - NVFP4.mantissa_bits)) + ((127 - NVFP4.bias) << 23)
        magnitude = jnp.where((whole & 7) < 2, bits_of((whole & 7).astype(jnp.float32) * 0.5), normal)
        return float_of(magnitude | (whole & 8) << 28)
    dtype = jnp.dtype(E4M3.name if stored == FP8_DS_MLA else stored.name)
    return (units if units.dtype == dtype else lax.bitcast_convert_type(units, dtype)).astype(jnp.float32)


# Not as bitcasts that add or take an axis: of those XLA could not tell the shape in a program with sizes left open.


def to_bytes(x: jax.Array) -> jax.Array:
    """Numbers `[…, n]` as their bytes `[…, n · size]`, the lowest first."""
    size = x.dtype.itemsize
    whole = lax.bitcast_convert_type(x, f"uint{8 * size}")
    units = jnp.stack([(whole >> 8 * i).astype(jnp.uint8) for i in range(size)], axis=-1)
    return units.reshape(*x.shape[:-1], -1)


def from_bytes(units: jax.Array, dtype: Any) -> jax.Array:
    """The numbers that `to_bytes` had."""
    size = jnp.dtype(dtype).itemsize
    units = units.reshape(*units.shape[:-1], -1, size).astype(f"uint{8 * size}")
    whole = functools.reduce(operator.or_, (units[..., i] << 8 * i for i in range(size)))
    return lax.bitcast_convert_type(whole, dtype)


# ---- scales


def largest_of(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """The largest magnitude; a NaN, if there is one, is above all. As integers: floats' maxima lose subnormals."""
    return float_of(jnp.max(bits_of(x) & 0x7FFFFFFF, axis, initial=0))


def scale_of(largest: jax.Array, stored_largest: float) -> jax.Array:
    """The scale of numbers with this largest magnitude: `largest / stored_largest`.

    1 where that is below float32's normal numbers.
    """
    bits = bits_of(largest)
    zero = bits < np.float32(stored_largest * SMALLEST_SCALE).view(np.uint32)
    scale = jnp.where(zero, jnp.float32(1), divide(largest, unfolded(stored_largest, bits)))
    return jnp.where(is_nan(bits), float_of(jnp.uint32(_NAN)), scale)


def quantise(x: jax.Array, stored: FloatFormat) -> tuple[jax.Array, jax.Array]:
    """Rows `[…, n]` of float32 with a scale each: stored units, and scales `[…, 1]`."""
    scale = scale_of(largest_of(x, (-1,)), stored.largest)[..., None]
    return pack(encode(divide(x, scale), stored), stored), scale


def quantise_ds_mla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tiles `[…, n]` of float32 as fp8_ds_mla has them: e4m3, and scales `[…, 1]` that are powers of two."""
    largest = largest_of(jnp.where(is_nan(bits_of(x)), jnp.float32(0), x), (-1,))
    # The first power of two not below largest / 448. Exponents count in steps of 2^23, so the difference of the bits,
    # rounded up to such a step, is the difference of the exponents: exact, also where divisions are not.
    bits = bits_of(largest).astype(jnp.int32)
    steps = (bits - bits_of(jnp.float32(FP8_DS_MLA.largest)).astype(jnp.int32) + 0x7FFFFF) & ~0x7FFFFF
    power = jnp.maximum(steps + 0x3F800000, bits_of(jnp.float32(DS_MLA_SMALLEST_SCALE)).astype(jnp.int32))
    scale = float_of(jnp.where(bits == INFINITY, INFINITY, power).astype(jnp.uint32))[..., None]
    return encode(divide(x, scale), FP8_DS_MLA), scale


def quantise_nvfp4(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of float32 as bytes of two elements, and the e4m3 scales of their groups, which a static scale divides."""
    x, scale = x.reshape(*x.shape[:-1], -1, NVFP4_GROUP), scale[..., None]
    group_scales = encode(divide(sixth(largest_of(x, (-1,)))[..., None], scale), E4M3)
    numbers = decode(group_scales, E4M3)
    # Elements of a group whose scale is zero become zero.
    product = times(numbers, scale)
    factor = jnp.where(numbers == 0, jnp.float32(0), divide(jnp.ones_like(product), product))
    x, x_factor = normal(x)
    codes = encode(x * (factor * x_factor), NVFP4)
    return pack(codes.reshape(*x.shape[:-2], -1), NVFP4), group_scales[..., 0]
