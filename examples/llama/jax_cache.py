"""Writing and reading the paged cache in JAX."""

import jax.numpy as jnp
from jax import Array, lax

import jaxkv

from .cache import FP8_FORMATS, CacheSpec, Reading

Cache = tuple[Array, ...]
"""Key and value cache, or one array for both."""


def new_cache(spec: CacheSpec) -> Cache:
    return tuple(jnp.zeros(shape, spec.dtype) for shape in spec.shapes)


def write(spec: CacheSpec, cache: Cache, key: Array, value: Array, slots: Array, layer: int) -> Cache:
    """Writes a layer's keys and values [num_tokens, heads, dim] to `slots` [num_tokens]; -1 is skipped."""
    kind, layout = spec.kv_cache_dtype, spec.layout
    if layout.single_array:
        (kv_cache,) = cache
        new = jaxkv.reshape_and_cache_flash_diffkv(key, value, kv_cache, slots, kind, layout=layout, layer=layer)
        assert new is not None  # None is the answer for a jax.Ref
        return (new,)
    key_cache, value_cache = cache
    pair = jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, kind, layout=layout, layer=layer)
    assert pair is not None
    return pair


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
