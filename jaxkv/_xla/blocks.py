"""Copies and zeros of whole blocks as XLA's gathers and scatters."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._blocks import BlocksOperands
from kvcore.contract.blocks import BlockArray, Blocks
from kvcore.formats import FP8


def move_blocks(call: Blocks, operands: BlocksOperands) -> list[jax.Array]:
    """The new arrays. A scatter for each, of what was gathered before: in place where donated."""
    return [
        _move(array, described, operands.indices, call)
        for array, described in zip(operands.cache.memory, call.arrays, strict=True)
    ]


def _move(array: jax.Array, described: BlockArray, indices: jax.Array, call: Blocks) -> jax.Array:
    if 0 in (array.size, indices.size):
        return array
    if array.dtype.name in FP8:  # XLA gathers and scatters fp8 as wider floats, and NaN comes back with other bits
        new = _move(lax.bitcast_convert_type(array, jnp.uint8), described, indices, call)
        return lax.bitcast_convert_type(new, array.dtype)

    def one(array: jax.Array, indices: jax.Array) -> jax.Array:
        before = (slice(None),) * (described.axis - call.batched)
        exists = (indices >= 0) & (indices < call.num_blocks)
        if not call.copies:
            return array.at[*before, jnp.where(exists, indices, call.num_blocks)].set(0, mode="drop")
        source, destination = indices[:, 0], indices[:, 1]
        exists = exists[:, 0] & exists[:, 1]
        # What is skipped goes to a block that does not exist, and is dropped.
        destination = jnp.where(exists, destination, call.num_blocks)
        copied = array.at[*before, jnp.where(exists, source, 0)].get(mode="clip")
        return array.at[*before, destination].set(copied, mode="drop")

    whole = array.reshape(described.shape)
    new = jax.vmap(one)(whole, indices) if call.batched else one(whole, indices)
    return new.reshape(array.shape)
