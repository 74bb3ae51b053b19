"""Calls of the functions that read: their arguments as operands, checked."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv._arguments import ArrayLike, as_array, as_scale, is_ref, with_axis
from jaxkv._call import CacheOperands, CacheOptions, ReadOperands, ReadOptions
from jaxkv._primitive.read import read
from kvcore.scales import scale_layout_of

Caches = jax.Array | np.ndarray | jax.Ref | Sequence[ArrayLike | jax.Ref]


def cache_of(
    caches: Any, kv_cache_dtype: str, k_scale: Any, v_scale: Any, layout: Any, scale_layout: Any, layer: Any
) -> tuple[CacheOptions, CacheOperands]:
    """A cache as it was passed: arrays may be NumPy's, layouts None or patterns, and scales may be scale caches.

    Refs outside jit stay Refs, for `read_checked`.
    """
    arrays = caches if isinstance(caches, Sequence) else (caches,)
    in_memory = hasattr(layer, "shape")
    options = CacheOptions(kv_cache_dtype, layout, scale_layout, layer=None if in_memory else layer)
    return options, CacheOperands(
        caches=tuple(array if is_ref(array) else as_array(array) for array in arrays),
        scale_caches=(),
        k_scale=k_scale,
        v_scale=v_scale,
        layer=layer if in_memory else None,
    )


def as_read_scale(scale: Any) -> Any:
    """As `as_scale`, but Refs outside jit, which may be scale caches, stay Refs."""
    return scale if is_ref(scale) else as_scale(scale)


def read_checked(options: ReadOptions, operands: ReadOperands) -> list[jax.Array]:
    """Checks a call, and makes of its cache what the primitive asks for."""
    described = options.describe(operands).cache
    refs = [leaf for leaf in jax.tree.leaves(operands.cache) if is_ref(leaf)]
    if refs:
        if len(set(map(id, refs))) == len(refs):
            return _read_refs(options, jax.tree.map(lambda x: x if is_ref(x) else jnp.asarray(x), operands))
        operands = jax.tree.map(as_array, operands)  # jit takes no Ref twice
    operands = jax.tree.map(jnp.asarray, operands)
    cache, scale_layout = operands.cache, None
    if described.scales is not None and not described.scales.inside:
        scale_layout = scale_layout_of(options.cache.scale_layout, described.layout.has_layer)
        cache = cache._replace(scale_caches=(cache.k_scale, cache.v_scale), k_scale=None, v_scale=None)
    cache = cache._replace(
        k_scale=with_axis(cache.k_scale) if described.scaled else None,
        v_scale=with_axis(cache.v_scale) if described.scaled else None,
        layer=None if cache.layer is None else jnp.reshape(cache.layer, 1),
    )
    cache_options = options.cache._replace(layout=described.layout, scale_layout=scale_layout)
    return read(options._replace(cache=cache_options), operands._replace(cache=cache))


@functools.partial(jax.jit, static_argnums=0)
def _read_refs(options: ReadOptions, operands: ReadOperands) -> list[jax.Array]:
    # Under jit, XLA reads a Ref's buffer where it is; outside it, to read a Ref is to copy it, a whole cache.
    return read_checked(options, jax.tree.map(as_array, operands))
