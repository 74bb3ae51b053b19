"""`relayout` where bits move, as XLA's gathers and scatters."""

import jax
import jax.numpy as jnp

from jaxkv._relayout import RelayoutOperands, RelayoutOptions
from jaxkv._xla.access import parts_of, put, take
from kvcore.contract.cache import Cache
from kvcore.contract.relayout import Relayout


def relayout(call: Relayout, options: RelayoutOptions, operands: RelayoutOperands) -> list[jax.Array]:
    """The new arrays. A scatter for each run of units, of what was gathered before: in place where donated."""
    memory = list(operands.cache.memory)
    slots, targets = operands.slots(call.num_pairs)
    here, there = call.source.extents.num_slots, call.destination.extents.num_slots
    exists = (slots >= 0) & (slots < here) & (targets >= 0) & (targets < there)
    layers = jnp.repeat(jnp.arange(call.num_layers, dtype=jnp.int32), call.num_pairs)
    source = _places(call.source, layers, jnp.where(exists, slots, 0), None)
    target = _places(call.destination, layers, jnp.where(exists, targets, 0), exists)
    for side in (0,) if call.source.layout.latent else (0, 1):
        ours, theirs = (
            parts_of(cache, [a.shape for a in arrays.memory], cache_options.scale_layout, side)
            for cache, arrays, cache_options in (
                (call.source, operands.source, options.source),
                (call.destination, operands.cache, options.cache),
            )
        )
        for part, other in zip(ours, theirs, strict=True):
            if part is not None and other is not None:
                units = take(operands.source.memory, part, source, "head")
                memory[other.array] = put(memory[other.array], other, target, units)
    return memory


def _places(cache: Cache, layers: jax.Array, slots: jax.Array, exists: jax.Array | None) -> dict[str, jax.Array]:
    """Indices of slots in all layers; those of slots that do not exist point outside."""
    extents = cache.extents
    block = slots // extents.block_size
    block = block if exists is None else jnp.where(exists, block, extents.num_blocks)
    repeats = layers.shape[0] // slots.shape[0]
    return {
        "layer": layers,
        "block": jnp.tile(block.astype(jnp.int32), repeats),
        "slot": jnp.tile((slots % extents.block_size).astype(jnp.int32), repeats),
    }
