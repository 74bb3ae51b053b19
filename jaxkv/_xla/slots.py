"""The slot mapping in XLA's operations, for any platform."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._slots import SlotOperands
from kvcore.contract.slots import SlotMapping

_LONGEST = 2**31 - 1


def slot_mapping(call: SlotMapping, operands: SlotOperands) -> jax.Array:
    """The slot of each token."""
    tables, starts, lens = operands
    num_seqs, max_blocks = call.block_tables.shape
    if 0 in call.block_tables.shape:
        return jnp.full(call.num_tokens, -1, jnp.int32)
    token = jnp.arange(call.num_tokens, dtype=jnp.int32)
    if starts is None:
        after = token + 1
        end = after
    else:
        # Starts that descend are passed over: each sequence begins where the ones before it do, or later.
        begin = lax.cummax(starts)
        after = jnp.sum(begin[None] <= token.astype(starts.dtype)[:, None], axis=1, dtype=jnp.int32)
        end = jnp.minimum(starts.at[after].get(mode="fill", fill_value=0), _LONGEST).astype(jnp.int32)
    mapped = (after > 0) & (after <= num_seqs)
    seq = jnp.where(mapped, after - 1, 0)
    position = jnp.where(mapped, jnp.clip(lens[seq], 0, _LONGEST).astype(jnp.int32) - end + token, -1)
    column = position // call.block_size
    mapped = (position >= 0) & (column < max_blocks)
    block = tables[seq, jnp.where(mapped, column, 0)]
    mapped &= (block >= 0) & (block <= _LONGEST // call.block_size)
    # A slot past _LONGEST, of the last block of these, wraps to a negative one.
    slot = jnp.where(mapped, block, 0).astype(jnp.int32) * call.block_size + (position % call.block_size).astype(
        "int32"
    )
    return jnp.where(mapped & (slot >= 0), slot, -1)
