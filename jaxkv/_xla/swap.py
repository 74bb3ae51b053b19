"""Swaps of whole blocks as XLA's slices and updates, one block after the other.

XLA has no gather from the host's memory and no scatter to it: it would do these on the host, or move all of a cache to
the device first. A slice of what is on one side, as an update of what is on the other, it does where both are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._swap import SwapOperands
from kvcore.contract.blocks import BlockArray
from kvcore.contract.swap import Swap
from kvcore.formats import FP8


def swap_blocks(call: Swap, operands: SwapOperands) -> list[jax.Array]:
    """The new arrays of the destination: in place where donated."""
    memory = operands.cache.memory
    if 0 in operands.pairs.shape or 0 in (call.num_source, call.num_destination):
        return list(memory)
    moves, count = _moves(operands.pairs, call)
    every = zip(operands.source.memory, memory, call.source, call.destination, strict=True)
    return [_swap(old, new, read, written, call.batched, moves, count) for old, new, read, written in every]


def _moves(pairs: jax.Array, call: Swap) -> tuple[jax.Array, jax.Array]:
    """Item of the batch, source and destination of each pair, those that exist first; and how many these are."""
    source, destination = pairs[..., 0].ravel(), pairs[..., 1].ravel()
    exists = (source >= 0) & (source < call.num_source) & (destination >= 0) & (destination < call.num_destination)
    item = jnp.arange(source.size, dtype=pairs.dtype) // pairs.shape[-2]
    moves = jnp.stack([item, source, destination], axis=1)
    return moves[jnp.argsort(~exists, stable=True)], exists.sum()


def _swap(
    old: jax.Array, new: jax.Array, read: BlockArray, written: BlockArray, batched: bool, moves: Any, count: Any
) -> jax.Array:
    if old.size == 0 or new.size == 0:
        return new
    if new.dtype.name in FP8:  # XLA's code for CPUs updates fp8 as wider floats, and copies all of it
        old, bits = (lax.bitcast_convert_type(array, jnp.uint8) for array in (old, new))
        return lax.bitcast_convert_type(_swap(old, bits, read, written, batched, moves, count), new.dtype)
    place = jax.typeof(new).memory_space
    sizes = [1 if i == read.axis or (batched and i == 0) else size for i, size in enumerate(read.shape)]
    whole = old.reshape(read.shape)

    def start(item: jax.Array, block: jax.Array) -> list[Any]:
        zero = jnp.zeros_like(block)
        return [block if i == read.axis else item if batched and i == 0 else zero for i in range(len(sizes))]

    def step(i: Any, updated: jax.Array) -> jax.Array:
        item, source, destination = moves[i]
        block = lax.dynamic_slice(whole, start(item, source), sizes)
        if place != jax.typeof(whole).memory_space:
            block = jax.device_put(block, place)
        return lax.dynamic_update_slice(updated, block, start(item, destination))

    return lax.fori_loop(0, count, step, new.reshape(written.shape)).reshape(new.shape)
