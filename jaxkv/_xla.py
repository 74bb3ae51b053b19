"""The write as an XLA scatter: for CPU, TPU, and wherever there is no Triton. Bits as the oracle's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from kvcore.contract import Write
from kvcore.layout import Axis
from kvcore.quantization import BFLOAT16, FP8, FloatFormat

if TYPE_CHECKING:
    from jaxkv._primitive import Operands


def write(call: Write, operands: "Operands", layer: int | None) -> list[jax.Array]:
    """The new caches. One scatter each for K and V, over blocks and slots: in place on donated caches."""
    extents = call.placement.extents
    slots = operands.slot_mapping
    written = (slots >= 0) & (slots < extents.num_slots)
    indices = {
        # What is skipped goes to a block that does not exist, and is dropped.
        "block": jnp.where(written, slots // extents.block_size, extents.num_blocks).astype(jnp.int32),
        "slot": (slots % extents.block_size).astype(jnp.int32),
        "layer": jnp.int32(layer or 0) if operands.layer is None else operands.layer[0].astype(jnp.int32),
    }
    caches = list(operands.caches)
    arrays = call.layout.arrays
    sides = ((operands.key, operands.k_scale, 0), (operands.value, operands.v_scale, 1))
    for rows, scale, kv in sides:
        i = kv if len(caches) == 2 else 0
        first_dim = extents.head_size if call.layout.packed and kv else 0
        bits = _encode(rows[: slots.shape[0]], call, scale)
        at = indices | {"kv": jnp.int32(kv), "k+v": jnp.int32(first_dim)}
        caches[i] = _scatter(caches[i], arrays[i], bits, at)
    return caches


def _scatter(cache: jax.Array, axes: Sequence[Axis], rows: jax.Array, at: dict[str, jax.Array]) -> jax.Array:
    """Puts rows `[n, head, dim]` where `at` says, for any order of the cache's axes."""
    if cache.dtype.name in FP8:  # XLA scatters fp8 as wider floats, and NaN comes back with other bits
        as_bytes = _scatter(lax.bitcast_convert_type(cache, jnp.uint8), axes, rows, at)
        return lax.bitcast_convert_type(as_bytes, cache.dtype)
    shape, names = cache.shape, []
    split: list[int] = []  # joined axes are taken apart: a bitcast
    for axis, size in zip(axes, shape, strict=True):
        for name in axis:
            names.append(name)
            split.append(size if len(axis) == 1 else 2 if name == "kv" else size // 2)
    cache = cache.reshape(split)
    sizes = dict(zip(names, split, strict=True))
    if "x" in sizes:
        rows = rows.reshape(*rows.shape[:2], sizes["dim/x"], sizes["x"])
        window = ("head", "dim/x", "x")
    else:
        window = ("head", "k+v" if "k+v" in sizes else "dim")
    in_order = [name for name in names if name in window]
    rows = rows.transpose(0, *(1 + window.index(name) for name in in_order))

    indexed = [name for name in names if name in at]
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, rows.ndim)),
        inserted_window_dims=tuple(i for i, name in enumerate(names) if name not in window),
        scatter_dims_to_operand_dims=tuple(names.index(name) for name in indexed),
    )
    index = jnp.stack([jnp.broadcast_to(at[name], rows.shape[:1]) for name in indexed], axis=-1)
    return lax.scatter(cache, index, rows, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP).reshape(shape)


def _encode(x: jax.Array, call: Write, scale: jax.Array | None) -> jax.Array:
    """What the cache stores: fp8 as bytes, else in its dtype."""
    stored = call.format
    if call.copies:
        return lax.bitcast_convert_type(x, jnp.uint8) if stored.name in FP8 else x
    x = x.astype(jnp.float32)
    if scale is not None:
        x = _divide(x, scale[0])
    bits = bits_of(x, stored)
    return bits if stored.name in FP8 else lax.bitcast_convert_type(bits, jnp.dtype(stored.name))


def bits_of(x: jax.Array, stored: FloatFormat) -> jax.Array:
    """Bits of float32 numbers in another format, rounded to nearest even."""
    nan, dtype = jnp.isnan(x), jnp.dtype(stored.name)
    if stored.name in FP8:  # XLA's cast overflows to NaN: saturate first
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    if stored == BFLOAT16:  # in integers: instructions that round to it read subnormal numbers as zero
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(jnp.uint16)
    else:
        bits = lax.bitcast_convert_type(x.astype(dtype), f"uint{stored.bits}")
    return jnp.where(nan, jnp.array(stored.nan, bits.dtype), bits)


def _divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale` as IEEE 754 has it, for scales in which XLA would take shortcuts.

    It multiplies by the reciprocal of a broadcast scalar, hence the barrier. And XLA's CPU code reads subnormal
    numbers as zero: they are brought into the normal range, and the quotient back.
    """
    x, x_factor = _normal(x)
    scale, scale_factor = _normal(lax.optimization_barrier(jnp.broadcast_to(scale, x.shape)))
    return x / scale * x_factor / scale_factor


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y, f) with x = y·f and y normal, or zero, infinite or NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    subnormal = (bits & 0x7F800000) == 0
    # A subnormal is mantissa · 2^-149; times 2^24 it is normal.
    scaled = (bits & 0x7FFFFF).astype(jnp.float32) * jnp.float32(2.0**-125)
    y = jnp.where(subnormal, jnp.copysign(scaled, x), x)
    return y, jnp.where(subnormal, jnp.float32(2.0**-24), jnp.float32(1))
