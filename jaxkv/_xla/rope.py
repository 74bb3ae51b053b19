"""Norm and rotation in XLA, and the write of what comes of them: on a CPU bit for bit as the oracle's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._xla.arithmetic import bits_of, divide, unfolded
from jaxkv._xla.formats import encode
from jaxkv._xla.write import write_rows
from kvcore.contract.rope import Rope, RopeOptions
from kvcore.formats import FLOATS


class _Angles(NamedTuple):
    """Angles of tokens.

    Attributes:
        cosines: `[num_tokens, 1, pairs]` of float32.
        sines: The same of sines.
        exist: `[num_tokens, 1, 1]`: whether the table has the token's position.
    """

    cosines: jax.Array
    sines: jax.Array
    exist: jax.Array


def rope_and_cache(call: Rope, options: RotatedWriteOptions, operands: RotatedWriteOperands) -> list[jax.Array]:
    """The rotated query, and the new caches and scale caches."""
    numbers, written = call.options, operands.slot_mapping.shape[0]
    angles = _angles(operands.positions, operands.cos_sin, numbers)
    query = _rotated(_normed(operands.query, operands.q_norm, numbers.eps), angles, numbers)
    query = lax.bitcast_convert_type(encode(query, FLOATS[call.query.dtype]), operands.query.dtype)

    key, value = operands.key[:written], operands.value[:written]
    angles = _Angles(*(array[:written] for array in angles))
    computes_key, computes_value = call.computed
    if computes_key:
        key = _normed(key, operands.k_norm, numbers.eps)
    if computes_value:
        value = _rotated(value.astype(jnp.float32), angles, numbers)
    else:
        key = _rotated(key, angles, numbers)
    return [query, *write_rows(call.write, options.cache, operands.write, (key, value), call.computed)]


def _angles(positions: jax.Array, cos_sin: jax.Array, numbers: RopeOptions) -> _Angles:
    """Cosines and sines of each token's pairs."""
    positions = positions if positions.ndim == 2 else positions[None]  # rows: one for each section
    (max_position, rotary_dim), pairs = cos_sin.shape, cos_sin.shape[1] // 2
    exist = jnp.all((positions >= 0) & (positions < max_position), axis=0)
    if max_position == 0:
        cos_sin = jnp.zeros((1, rotary_dim), cos_sin.dtype)
    table = [jnp.take(cos_sin, row, axis=0, mode="clip") for row in positions]
    parts, start = [], 0
    for rows, size in zip(table, numbers.sections or (pairs,), strict=True):
        parts.append([rows[:, at + start : at + start + size] for at in (0, pairs)])
        start += size
    cosines, sines = (jnp.concatenate(x, axis=1).astype(jnp.float32)[:, None] for x in zip(*parts, strict=True))
    return _Angles(cosines, sines, exist[:, None, None])


def _normed(x: jax.Array, weights: jax.Array | None, eps: float) -> jax.Array:
    """Heads `[num_tokens, num_heads, n]` in float32, normed where there are weights."""
    x = x.astype(jnp.float32)
    if weights is None:
        return x
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    squares = jnp.pad(multiply(x, x), ((0, 0), (0, 0), (0, width - size)))

    def add_neighbours(_: Any, sums: jax.Array) -> jax.Array:
        added = sums[..., ::2] + sums[..., 1::2]
        return jnp.concatenate([added, jnp.zeros_like(added)], axis=-1)

    # A loop, whose body is compiled once.
    sums = lax.fori_loop(0, width.bit_length() - 1, add_neighbours, squares)[..., :1]
    mean = divide(sums, unfolded(size, bits_of(sums) & 0x7FFFFFFF))
    inverse = divide(jnp.ones_like(mean), jnp.sqrt(mean + eps))
    return multiply(multiply(x, inverse), weights.astype(jnp.float32)[None, None])


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x * y`, which XLA's CPU code would contract with a sum that follows, but for the barrier."""
    return lax.optimization_barrier(x * y)


def _rotated(x: jax.Array, angles: _Angles, numbers: RopeOptions) -> jax.Array:
    """Heads `[num_tokens, num_heads, head_size]` of float32, rotated; zeros where the table has no such position."""
    cosines, sines, exist = angles
    pairs = cosines.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if numbers.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    new = (
        multiply(a, cosines) - multiply(b, sines),
        multiply(b, cosines) + multiply(a, sines),
    )
    turned = jnp.stack(new, axis=-1).reshape(turned.shape) if numbers.interleaved else jnp.concatenate(new, axis=-1)
    return jnp.where(exist, jnp.concatenate([turned, rest], axis=-1), jnp.float32(0))
