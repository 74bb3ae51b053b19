"""What all writers do: check a call, bind the primitive, and give back new arrays or update Refs."""

import functools
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv._arguments import BACKENDS, as_array, as_indices, as_layer, as_rows, as_scale, with_axis
from jaxkv._call import CacheOperands, CacheOptions, WriteOperands, WriteOptions, spec_of
from jaxkv._primitive.write import write
from kvcore.arrays import array_names
from kvcore.contract.cache import CacheArguments
from kvcore.contract.checks import check_options, overlap_error
from kvcore.contract.write import Write, check_write
from kvcore.layout import CacheLayout
from kvcore.scales import scale_layout_of


def write_caches(
    key: Any,
    value: Any,
    caches: Sequence[Any],
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    layout: str | CacheLayout | None,
    layer: Any,
    backend: str | None,
    scale_caches: Sequence[Any] = (),
    scale_layout: str | CacheLayout | None = None,
    shape: tuple[int, ...] | None = None,
) -> Any:
    """Checks a call and carries it out.

    Args:
        key: As users pass it, like all the others.
        value: Values.
        caches: The key and the value cache, or the one array that holds both.
        slot_mapping: Slots.
        kv_cache_dtype: Name of the format.
        k_scale: Static scale of keys.
        v_scale: Static scale of values.
        layout: Of the caches.
        layer: Static index, or an array.
        backend: Name of the backend.
        scale_caches: Two, or none.
        scale_layout: Of these.
        shape: The shape in which the layout describes the one cache, where its own is another; None where it is not.

    Returns:
        New arrays for caches and scale caches; None where they are Refs.
    """
    k_scale, v_scale, layer = as_scale(k_scale), as_scale(v_scale), as_layer(layer)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    key, value, slot_mapping = as_rows(key), as_rows(value), as_indices(slot_mapping)
    memory = as_memories(caches, scale_caches)
    arguments = cache_arguments(
        memory, len(caches), kv_cache_dtype, k_scale, v_scale, layout, layer, scale_layout, shape
    )
    described = check_write(spec_of(key), spec_of(value), spec_of(slot_mapping), arguments)
    cache_options, cache = cache_of(described, arguments, k_scale, v_scale, layer)
    options = WriteOptions(cache_options, backend)
    operands = jax.tree.map(jnp.asarray, WriteOperands(key, value, cache, slot_mapping))
    _, new = update(write, options, memory, operands, shape)
    return new


def as_memories(caches: Sequence[Any], scale_caches: Sequence[Any]) -> tuple[Any, ...]:
    """Caches and scale caches as arrays; Refs stay.

    Raises:
        TypeError: some are Refs, some are not.
        ValueError: one Ref is passed twice.
    """
    memory = tuple(map(as_memory, (*caches, *scale_caches)))
    _check_refs(memory, array_names(len(caches), len(scale_caches)))
    return memory


def cache_arguments(
    memory: Sequence[Any],
    num_caches: int,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    layout: str | CacheLayout | None,
    layer: Any,
    scale_layout: str | CacheLayout | None,
    shape: tuple[int, ...] | None = None,
) -> CacheArguments:
    """What the contract is told of the caches and scale caches in `memory`, of which the first may have a `shape`."""
    specs = [spec_of(array) for array in memory]
    if shape is not None:
        specs[0] = specs[0]._replace(shape=shape)
    return CacheArguments(
        caches=specs[:num_caches],
        kv_cache_dtype=kv_cache_dtype,
        k_scale=None if k_scale is None else spec_of(k_scale),
        v_scale=None if v_scale is None else spec_of(v_scale),
        layout=layout,
        layer=spec_of(layer) if hasattr(layer, "shape") else layer,
        scale_caches=specs[num_caches:],
        scale_layout=scale_layout,
    )


def cache_of(
    described: Write, arguments: CacheArguments, k_scale: Any, v_scale: Any, layer: Any
) -> tuple[CacheOptions, CacheOperands]:
    """Options and operands of a cache that the contract let pass; caches and scale caches follow in `update`."""
    in_memory = hasattr(layer, "shape")  # the layer's index, maybe traced
    layout, scale_layout = described.cache.layout, None
    if arguments.scale_caches:
        scale_layout = scale_layout_of(arguments.scale_layout, layout.has_layer)
    options = CacheOptions(arguments.kv_cache_dtype, layout, scale_layout, layer=None if in_memory else layer)
    return options, CacheOperands(
        caches=(),
        scale_caches=(),
        k_scale=with_axis(k_scale) if described.scaled else None,
        v_scale=with_axis(v_scale) if described.scaled else None,
        layer=jnp.reshape(jnp.asarray(layer), 1) if in_memory else None,
    )


def as_memory(argument: Any) -> Any:
    """An array that is written to: Refs stay Refs, unlike those of other arguments."""
    return argument if isinstance(argument, jax.Ref) else as_array(argument)


def _check_refs(memory: Sequence[Any], names: Sequence[str]) -> None:
    """Checks that either all or none of caches and scale caches are Refs, and none is there twice.

    Raises:
        TypeError: some are, some are not.
        ValueError: one Ref is passed twice, so that one of its two updates would be lost. (One array passed twice is
            two arrays that are alike.)
    """
    refs = [isinstance(array, jax.Ref) for array in memory]
    if not any(refs):
        return
    if not all(refs):
        count, each = {2: ("two", "one"), 3: ("three", "some"), 4: ("four", "some")}[len(names)]
        every = f"{', '.join(names[:-1])} and {names[-1]}"
        raise TypeError(f"{every} must be {count} jax.Refs or {count} arrays, got {each} of each")
    for (name, ref), (other_name, other) in combinations(zip(names, memory, strict=True), 2):
        if ref is other:
            raise overlap_error(name, other_name)


def update(
    op: Callable[[Any, Any], list[jax.Array]],
    options: Any,
    memory: tuple[Any, ...],
    operands: Any,
    shape: tuple[int, ...] | None,
) -> tuple[list[jax.Array], tuple[jax.Array, ...] | None]:
    """Carries a call out.

    Args:
        op: Makes results of options and operands, of which the last are the new states of caches and scale caches.
        options: Of the call.
        memory: Caches and scale caches: arrays, or Refs.
        operands: Of the call, without these.
        shape: The shape in which the layout describes the one cache, where its own is another; None where it is not.

    Returns:
        The other results; and the new arrays, or None for Refs.
    """
    if isinstance(memory[0], jax.Ref):
        return _update_refs(op, options, memory, operands, shape), None
    others, new = _update_arrays(op, options, tuple(map(jnp.asarray, memory)), operands, shape)
    return others, tuple(new)


def _update_arrays(
    op: Any, options: Any, memory: tuple[jax.Array, ...], operands: Any, shape: tuple[int, ...] | None
) -> tuple[list[jax.Array], list[jax.Array]]:
    shaped = memory if shape is None else (jnp.reshape(memory[0], shape),)
    num_caches = len(options.cache.layout.arrays)
    cache = operands.cache._replace(caches=shaped[:num_caches], scale_caches=shaped[num_caches:])
    results = op(options, operands._replace(cache=cache))
    count = len(results) - len(memory)
    new = zip(results[count:], memory, strict=True)
    return results[:count], [array if shape is None else jnp.reshape(array, old.shape) for array, old in new]


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _update_refs(
    op: Any, options: Any, refs: tuple[jax.Ref, ...], operands: Any, shape: tuple[int, ...] | None
) -> list[jax.Array]:
    # Under jit, XLA makes of reading and assigning a whole Ref an update of its buffer; outside it is two copies.
    others, new = _update_arrays(op, options, tuple(ref[...] for ref in refs), operands, shape)
    for ref, array in zip(refs, new, strict=True):
        ref[...] = array
    return others
