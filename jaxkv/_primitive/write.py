"""The write as a primitive. Results: caches and scale caches, as they are then."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
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
    new = split_heads(options, operands, mesh_axes)
    return new, list(new.cache.memory)


def split_heads(options: Any, operands: Any, mesh_axes: Any) -> Any:
    """Specs of operands with KV heads split over mesh axes, and nothing else."""
    return replicated(operands)._replace(
        key=head_specs(operands.key, mesh_axes),
        value=head_specs(operands.value, mesh_axes),
        cache=cache_specs(options.cache, operands.cache, mesh_axes),
    )


def rule_of_heads(options: Any, operands: Any) -> Rule:
    """KV heads are shared by all operands with that axis; every other axis is on its own."""
    heads = rows_factor(options)
    specs = split_heads(options, operands, heads)
    specs = specs._replace(key=head_factor(operands.key, heads), value=head_factor(operands.value, heads))
    of_caches = cache_specs(options.cache, operands.cache, None if heads_share_regions(options.cache) else "h").caches
    return Rule(specs._replace(cache=specs.cache._replace(caches=of_caches)), results=[], updates=True)


def rows_factor(options: Any) -> str | None:
    """The factor of the KV heads of key and value; None where they are split like nothing else."""
    # An axis (head kv) has twice as many entries as there are heads: nothing else can share it.
    axes = [axis for axes in options.cache.layout.arrays for axis in axes]
    joined = any(len(axis) > 1 and "head" in axis for axis in axes)
    return None if joined or heads_share_regions(options.cache) else "h"


# ---- vmap


def batch_writes(
    primitive: Primitive, fold: Callable[[Any, int], Any], shared: Sequence[str] = ()
) -> Callable[[Any, Any, Any, int], list[jax.Array]]:
    """A rule for vmap, of an op whose last results are caches and scale caches.

    One call does what the batch of them does where it can be folded into blocks, else a loop; in place either way.

    Args:
        primitive: The one that users bind.
        fold: Makes the one call's operands of those of the batch, and the slots of an item's cache.
        shared: Names of operands that the one call has for all: it needs them to be no batch, and so they stay for
            `fold`. All others it gets as batches.
    """

    def batched(options: Any, operands: Any, is_batched: Any, batch: int) -> list[jax.Array]:
        memory = spread(operands.cache.memory, is_batched.cache.memory, batch)
        operands = operands._replace(cache=operands.cache.with_memory(memory))
        is_batched = is_batched._replace(cache=is_batched.cache.with_memory([True] * len(memory)))
        item = jax.tree.map(
            lambda array, has_batch: jax.ShapeDtypeStruct(array.shape[1:] if has_batch else array.shape, array.dtype),
            operands,
            is_batched,
        )
        write = WriteOptions(options.cache, options.backend).describe(
            WriteOperands(item.key, item.value, item.cache, item.slot_mapping)
        )
        extents = write.cache.extents
        first_axes = {axes[0] for axes in options.cache.arrays}
        cache = is_batched.cache
        shares = not (cache.k_scale or cache.v_scale or cache.layer or any(getattr(is_batched, n) for n in shared))
        slots_fit = batch * extents.num_slots <= jnp.iinfo(operands.slot_mapping.dtype).max
        if first_axes == {("block",)} and shares and slots_fit:
            every = spread(operands, is_batched, batch)
            every = every._replace(**{name: getattr(operands, name) for name in shared})
            new = bind(primitive, options, fold(every, extents.num_slots))
        elif first_axes == {("layer",)} or not options.cache.layout.has_layer:
            new = _loop_over_layers(primitive, options, operands, is_batched, batch, extents.num_layers)
        else:  # an axis layer that is not in front: the batch cannot be one axis with it
            batches, item_of = _items(operands, is_batched)
            new = lax.map(lambda arrays: bind(primitive, options, item_of(arrays)), batches)
        return [array.reshape(batch, *like.shape) for array, like in zip(new, item.updated, strict=True)]

    return batched


def fold_into_blocks(operands: Any, num_slots: int) -> WriteOperands:
    """One write that does what a batch of them does: the blocks of all of them follow each other."""
    slots, cache = operands.slot_mapping, operands.cache
    batch, num_tokens = slots.shape
    start = jnp.arange(batch, dtype=slots.dtype)[:, None] * num_slots
    slots = jnp.where((slots >= 0) & (slots < num_slots), slots + start, -1)
    # Of views, the arrays that they are of: their heads stay where they are.
    rows = jax.tree.map(lambda array: merge_front(array[:, :num_tokens]), (operands.key, operands.value))
    return WriteOperands(
        *rows,
        cache=CacheOperands(
            caches=tuple(map(merge_front, cache.caches)),
            scale_caches=tuple(map(merge_front, cache.scale_caches)),
            k_scale=None if cache.k_scale is None else cache.k_scale[0],
            v_scale=None if cache.v_scale is None else cache.v_scale[0],
            layer=None if cache.layer is None else cache.layer[0],
        ),
        slot_mapping=slots.reshape(-1),
    )


def merge_front(array: jax.Array) -> jax.Array:
    """The first two axes as one."""
    return array.reshape(-1, *array.shape[2:])


def spread(arrays: Any, is_batched: Any, batch: int) -> Any:
    """The arrays, with copies in a batch of those that are none."""
    return jax.tree.map(
        lambda array, has_batch: array if has_batch else jnp.broadcast_to(array, (batch, *array.shape)),
        arrays,
        is_batched,
    )


def _items(operands: Any, is_batched: Any) -> tuple[dict[int, jax.Array], Callable[[dict[int, jax.Array]], Any]]:
    """The operands that are batches, and what makes of one item of each all operands."""
    leaves, tree = jax.tree.flatten(operands)
    batches = {i: leaves[i] for i, has_batch in enumerate(jax.tree.leaves(is_batched)) if has_batch}

    def item_of(arrays: dict[int, jax.Array]) -> Any:
        return tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])

    return batches, item_of


def _loop_over_layers(
    primitive: Primitive, options: Any, operands: Any, is_batched: Any, batch: int, num_layers: int | None
) -> list[jax.Array]:
    """Makes the batch an axis of layers, or one axis with the layers that there are, and calls item by item."""
    layers, cache = num_layers or 1, operands.cache
    if cache.layer is None:
        layer = jnp.full(batch, options.cache.layer or 0, jnp.int32)
    else:
        layer = spread(cache.layer, is_batched.cache.layer, batch)[:, 0]
    exists = (layer >= 0) & (layer < layers)
    rows, rows_batched = _scales_of_layers(cache, is_batched.cache, layer)
    layer = jnp.where(exists, jnp.arange(batch, dtype=layer.dtype) * layers + layer, -1).astype(jnp.int32)
    options = options._replace(cache=options.cache.with_layer_axis())
    inputs = operands._replace(cache=cache._replace(caches=(), scale_caches=(), layer=layer[:, None], **rows))
    cache_batched = is_batched.cache._replace(caches=(), scale_caches=(), layer=True, **rows_batched)
    batches, item_of = _items(inputs, is_batched._replace(cache=cache_batched))
    memory = [array if num_layers is None else merge_front(array) for array in cache.memory]

    def step(memory: list[jax.Array], arrays: dict[int, jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        item = item_of(arrays)
        num_caches = len(cache.caches)
        item_cache = item.cache._replace(caches=tuple(memory[:num_caches]), scale_caches=tuple(memory[num_caches:]))
        results = bind(primitive, options, item._replace(cache=item_cache))
        others = len(results) - len(memory)
        return list(results[others:]), list(results[:others])

    memory, others = lax.scan(step, memory, batches)
    return [*others, *memory]


def _scales_of_layers(
    cache: CacheOperands, is_batched: CacheOperands, layer: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, bool]]:
    """Those of k_scale and v_scale that are of all layers, as a batch of what they are for each item's own layer.

    Of a layer that an item does not have, that is any one's. Also, by the same names, that they are batches.
    """
    rows = {}
    for name in ("k_scale", "v_scale"):
        scale, has_batch = getattr(cache, name), getattr(is_batched, name)
        if scale is not None and scale.ndim - has_batch == 2:
            index = (jnp.arange(layer.shape[0]), layer) if has_batch else layer
            rows[name] = scale.at[index].get(mode="clip")
    return rows, dict.fromkeys(rows, True)


def _derivatives(_: WriteOptions) -> str:
    return "jaxkv.reshape_and_cache_flash is not differentiable: apply jax.lax.stop_gradient to key and value"


write_p, local_p = make_primitives("reshape_and_cache", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(write_p, local_p, _specs, rule_of_heads)
batch_by(write_p, batch_writes(write_p, fold_into_blocks))
refuse_derivatives(write_p, _derivatives)
