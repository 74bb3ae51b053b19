"""Writing and reading the paged cache in JAX."""

import jax.numpy as jnp
from jax import Array, lax

from .cache import FP8_FORMATS, CacheSpec, Reading

Cache = tuple[Array, ...]
"""Key and value cache, or one array for both."""


def new_cache(spec: CacheSpec) -> Cache:
    return tuple(jnp.zeros(shape, spec.dtype) for shape in spec.shapes)


def write(spec: CacheSpec, cache: Cache, key: Array, value: Array, slots: Array, layer: int) -> Cache:
    """Writes one layer's keys and values [num_tokens, heads, dim] to `slots` [num_tokens]; below 0 is skipped."""
    # STAND-IN until jaxkv has its functions.
    if spec.kv_cache_dtype != "auto":
        f = jnp.dtype(FP8_FORMATS[spec.kv_cache_dtype])
        key, value = (
            lax.bitcast_convert_type(jnp.clip(a, -float(jnp.finfo(f).max), float(jnp.finfo(f).max)).astype(f), jnp.uint8)
            for a in (key, value)
        )
    slots = jnp.where(slots < 0, spec.num_blocks * spec.block_size, slots)
    block, slot = slots // spec.block_size, slots % spec.block_size
    if spec.layout.pattern == "layer block slot head dim":
        return tuple(c.at[layer, block, slot].set(a, mode="drop") for c, a in zip(cache, (key, value)))
    place = spec.layout.place(spec.shapes, head_size=spec.head_size)
    out = list(cache)
    for i, (a, addr) in enumerate(((key, place.key), (value, place.value))):
        i = min(i, len(out) - 1)
        h = jnp.arange(a.shape[1])[:, None]
        d = jnp.arange(a.shape[2])
        idx = (
            addr.offset + layer * addr.layer + (block * addr.block + slot * addr.slot)[:, None, None]
            + h * addr.head + d // addr.x * addr.dim + d % addr.x * addr.x_stride
        )
        idx = jnp.where(block[:, None, None] >= spec.num_blocks, out[i].size, idx)
        out[i] = out[i].reshape(-1).at[idx].set(a, mode="drop").reshape(out[i].shape)
    return tuple(out)


def read(spec: CacheSpec, cache: Cache, tables: Array, layer: int, dtype: str) -> tuple[Array, Array]:
    """Gathers one layer's keys and values of each sequence, [num_sequences, context, heads, dim] each."""
    key, value = spec.readings
    return (
        _gather(spec, cache[0], key, tables, layer, dtype),
        _gather(spec, cache[-1], value, tables, layer, dtype),
    )


def _gather(spec: CacheSpec, array: Array, how: Reading, tables: Array, layer: int, dtype: str) -> Array:
    index: list[Array | int | slice] = [slice(None)] * len(how.shape)
    index[how.layer_axis] = layer
    index[how.block_axis] = tables
    if how.kv_axis is not None:
        index[how.kv_axis] = how.kv
    # One gather with the layer among its indices: `array[layer]` alone would copy the layer.
    found = array.reshape(how.shape)[tuple(index)].transpose(how.order)
    sequences, blocks, slots, heads = found.shape[:4]
    found = found.reshape(sequences, blocks * slots, heads, -1)[..., how.start : how.stop]
    if spec.kv_cache_dtype in FP8_FORMATS:
        found = lax.bitcast_convert_type(found, jnp.dtype(FP8_FORMATS[spec.kv_cache_dtype]))
    return found.astype(dtype)
