"""`relayout` as a primitive. Results: caches and scale caches of the destination, as they are then."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkv._mesh import cache_specs, check_regions, head_mesh_axes, replicated
from jaxkv._primitive.base import batch_by, bind, loop_over, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._primitive.write import merge_front, rows_factor, spread
from jaxkv._relayout import RelayoutOperands, RelayoutOptions
from jaxkv._triton import interpret
from jaxkv._xla import relayout as xla
from jaxkv._xla import requantise as xla_requantise
from kvcore.contract.devices import source_split_error
from kvcore.contract.relayout import Relayout


def relayout(options: RelayoutOptions, operands: RelayoutOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return list(bind_sharded(relayout_p, _specs, options, operands))


def _result_types(options: RelayoutOptions, operands: RelayoutOperands) -> list[Any]:
    return list(operands.cache.memory)


def _compute(
    call: Relayout, options: RelayoutOptions, operands: RelayoutOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        arrays = *operands.cache.memory, *operands.source.memory
        if 0 in (call.num_pairs, call.num_layers, *(array.size for array in arrays)):
            return list(operands.cache.memory)
        compute = xla_requantise.requantise if call.requantise else xla.relayout
        return compute(call, options, operands)
    if backend == "interpret":
        return interpret.relayout(call, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.relayout(call, operands, launch.target_of(platform, options.compute_capability))


def _specs(
    options: RelayoutOptions, specs: RelayoutOperands, operands: RelayoutOperands
) -> tuple[RelayoutOperands, list[P]]:
    """Heads of both caches split alike; a device has them all of what is not split."""
    mesh_axes = head_mesh_axes(options.cache, specs.cache.memory)
    of_source = head_mesh_axes(options.source, specs.source.memory)
    if of_source is not None and str(of_source) != str(mesh_axes):
        raise source_split_error(mesh_axes, of_source)
    if mesh_axes is not None:  # of a source that every device has whole, each takes its own heads
        check_regions(options.source, mesh_axes)
    new = _split(options, operands, mesh_axes)
    return new, list(new.cache.memory)


def _rule(options: RelayoutOptions, operands: RelayoutOperands) -> Rule:
    """KV heads are shared by both caches; every other axis is on its own."""
    splits = [rows_factor(options._replace(cache=cache)) for cache in (options.cache, options.source)]
    heads = None if None in splits else "h"
    return Rule(_split(options, operands, heads), results=[], updates=True)


def _split(options: RelayoutOptions, operands: RelayoutOperands, heads: Any) -> RelayoutOperands:
    """Specs of operands, or factors, with heads of both caches split alike."""
    return replicated(operands)._replace(
        cache=cache_specs(options.cache, operands.cache, heads),
        source=cache_specs(options.source, operands.source, heads),
    )


# ---- vmap


def _batched(options: RelayoutOptions, operands: RelayoutOperands, is_batched: Any, batch: int) -> list[jax.Array]:
    """One call for the whole batch where blocks are in front: those of all items follow each other. Else a loop.

    It is a loop, too, where items have static scales of their own. The call is in place. The loop copies each item of
    the destination: an op that moves all layers has no way to move those of one item, where the batch is one axis with
    them.
    """
    of_source = any(is_batched.source.memory)
    own_scales = any(cache.k_scale or cache.v_scale for cache in (is_batched.cache, is_batched.source))
    item = jax.tree.map(
        lambda array, has_batch: jax.ShapeDtypeStruct(array.shape[1:] if has_batch else array.shape, array.dtype),
        operands,
        is_batched,
    )
    call = options.describe(item)
    here, there = call.source.extents.num_slots, call.destination.extents.num_slots
    axes = [*options.cache.arrays, *(options.source.arrays if of_source else ())]
    slots, targets = operands.slots(call.num_pairs)
    fits = batch * max(here, there) <= jnp.iinfo(slots.dtype).max
    if {array[0] for array in axes} != {("block",)} or own_scales or not fits:
        return loop_over(relayout_p)(options, operands, is_batched, batch)
    exists = (slots >= 0) & (slots < here) & (targets >= 0) & (targets < there)
    shape, of_item = (batch, slots.shape[-1]), jnp.arange(batch, dtype=slots.dtype)[:, None]
    slots, targets = (
        jnp.where(
            jnp.broadcast_to(exists, shape),
            jnp.broadcast_to(array, shape) + jnp.broadcast_to(of_item * step, shape),
            -1,
        )
        for array, step in ((slots, here if of_source else 0), (targets, there))
    )
    memory, source = spread(operands.cache.memory, is_batched.cache.memory, batch), operands.source
    if of_source:
        of_items = spread(source.memory, is_batched.source.memory, batch)
        source = source.with_memory([merge_front(array) for array in of_items])
    cache = operands.cache.with_memory([merge_front(array) for array in memory])
    every = RelayoutOperands(cache, source, merge_front(jnp.stack([slots, targets], axis=-1)))
    new = bind(relayout_p, options, every)
    return [array.reshape(like.shape) for array, like in zip(new, memory, strict=True)]


relayout_p, local_p = make_primitives("relayout", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(relayout_p, local_p, _specs, _rule)
batch_by(relayout_p, _batched)
refuse_derivatives(
    relayout_p, lambda _: "jaxkv.relayout is not differentiable: apply jax.lax.stop_gradient to the caches"
)
