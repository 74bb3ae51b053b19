"""The write as a primitive. Results: caches and scale caches, as they are then."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxkv._call import CacheOperands, WriteOperands, WriteOptions
from jaxkv._mesh import (
    cache_specs,
    check_views,
    head_factor,
    head_mesh_axes,
    head_specs,
    heads_share_regions,
    replicated,
)
from jaxkv._primitive.base import batch_by, bind, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._triton import interpret
from jaxkv._views import sliced
from jaxkv._xla import write as xla
from kvcore.contract.write import Write


def write(options: WriteOptions, operands: WriteOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return list(bind_sharded(write_p, _specs, options, operands))


def _result_types(options: WriteOptions, operands: WriteOperands) -> list[Any]:
    return list(operands.cache.memory)


def _compute(
    call: Write, options: WriteOptions, operands: WriteOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        return xla.write(call, options, sliced(operands))
    if backend == "interpret":
        return interpret.write(call, options, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.write(call, options, operands, launch.target_of(platform, options.compute_capability))


def _specs(options: WriteOptions, specs: WriteOperands, operands: WriteOperands) -> tuple[WriteOperands, list[P]]:
    mesh_axes = head_mesh_axes(options.cache, specs.cache.memory)
    check_views(operands, specs, mesh_axes)
    new = _split(options, operands, mesh_axes)
    return new, list(new.cache.memory)


def _split(options: WriteOptions, operands: WriteOperands, mesh_axes: Any) -> WriteOperands:
    """Specs of operands with heads split over mesh axes, and nothing else."""
    return replicated(operands)._replace(
        key=head_specs(operands.key, mesh_axes),
        value=head_specs(operands.value, mesh_axes),
        cache=cache_specs(options.cache, operands.cache, mesh_axes),
    )


def _rule(options: WriteOptions, operands: WriteOperands) -> Rule:
    """Heads are shared by all operands with that axis; every other axis is on its own."""
    caches = options.cache.layout.arrays
    heads = None if heads_share_regions(options.cache) else "h"
    # An axis (head kv) has twice as many entries as there are heads: nothing else can share it.
    joined = any(len(axis) > 1 and "head" in axis for axes in caches for axis in axes)
    rows_heads = None if joined else heads
    specs = _split(options, operands, rows_heads)
    specs = specs._replace(key=head_factor(operands.key, rows_heads), value=head_factor(operands.value, rows_heads))
    cache = specs.cache._replace(caches=cache_specs(options.cache, operands.cache, heads).caches)
    return Rule(specs._replace(cache=cache), results=None, sizes={})


# ---- vmap


def _batched(options: WriteOptions, operands: WriteOperands, is_batched: WriteOperands, batch: int) -> list[jax.Array]:
    """One write where the batch can be folded into blocks, else a loop over it; in place either way."""
    operands = jax.tree.map(
        lambda array, has_batch: array if has_batch else jnp.broadcast_to(array, (batch, *array.shape)),
        operands,
        is_batched,
    )
    item = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), operands)
    extents = options.describe(item).cache.extents
    first_axes = {axes[0] for axes in options.cache.arrays}
    one_cache = not (is_batched.cache.k_scale or is_batched.cache.v_scale or is_batched.cache.layer)
    slots_fit = batch * extents.num_slots <= jnp.iinfo(operands.slot_mapping.dtype).max
    if first_axes == {("block",)} and one_cache and slots_fit:
        new = bind(write_p, options, _fold_into_blocks(operands, extents.num_slots))
    elif first_axes == {("layer",)} or not options.cache.layout.has_layer:
        new = _loop_over_layers(options, operands, batch, extents.num_layers)
    else:  # an axis layer that is not in front: the batch cannot be one axis with it
        new = lax.map(lambda item: bind(write_p, options, item), operands)
    return [array.reshape(old.shape) for array, old in zip(new, operands.cache.memory, strict=True)]


def _fold_into_blocks(operands: WriteOperands, num_slots: int) -> WriteOperands:
    """One write that does what a batch of them does: the blocks of all of them follow each other."""
    slots, cache = operands.slot_mapping, operands.cache
    batch, num_tokens = slots.shape
    start = jnp.arange(batch, dtype=slots.dtype)[:, None] * num_slots
    slots = jnp.where((slots >= 0) & (slots < num_slots), slots + start, -1)
    # Of views, the arrays that they are of: their heads stay where they are.
    rows = jax.tree.map(lambda array: _merge_front(array[:, :num_tokens]), (operands.key, operands.value))
    return WriteOperands(
        *rows,
        cache=CacheOperands(
            caches=tuple(map(_merge_front, cache.caches)),
            scale_caches=tuple(map(_merge_front, cache.scale_caches)),
            k_scale=None if cache.k_scale is None else cache.k_scale[0],
            v_scale=None if cache.v_scale is None else cache.v_scale[0],
            layer=None if cache.layer is None else cache.layer[0],
        ),
        slot_mapping=slots.reshape(-1),
    )


def _loop_over_layers(
    options: WriteOptions, operands: WriteOperands, batch: int, num_layers: int | None
) -> list[jax.Array]:
    """Makes the batch an axis of layers, or one axis with the layers that there are, and writes item by item."""
    layers, cache = num_layers or 1, operands.cache
    layer = jnp.full(batch, options.cache.layer or 0, jnp.int32) if cache.layer is None else cache.layer[:, 0]
    exists = (layer >= 0) & (layer < layers)
    layer = jnp.where(exists, jnp.arange(batch, dtype=layer.dtype) * layers + layer, -1).astype(jnp.int32)
    options = options._replace(cache=options.cache.with_layer_axis())
    inputs = operands._replace(cache=cache._replace(caches=(), scale_caches=(), layer=layer[:, None]))
    num_caches = len(cache.caches)

    def step(i: Any, memory: list[jax.Array]) -> list[jax.Array]:
        item = jax.tree.map(lambda array: array[i], inputs)
        item_cache = item.cache._replace(caches=tuple(memory[:num_caches]), scale_caches=tuple(memory[num_caches:]))
        return bind(write_p, options, item._replace(cache=item_cache))

    memory = [array if num_layers is None else _merge_front(array) for array in cache.memory]
    return lax.fori_loop(0, batch, step, memory)


def _merge_front(array: jax.Array) -> jax.Array:
    """The first two axes as one."""
    return array.reshape(-1, *array.shape[2:])


def _derivatives(_: WriteOptions) -> str:
    return "jaxkv.reshape_and_cache_flash is not differentiable: apply jax.lax.stop_gradient to key and value"


write_p, local_p = make_primitives("reshape_and_cache", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(write_p, local_p, _specs, _rule)
batch_by(write_p, _batched)
refuse_derivatives(write_p, _derivatives)
