"""Gathers out of the cache as XLA programs: for CPU, TPU, and wherever there is no Triton."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._call import ReadOperands, ReadOptions
from jaxkv._xla.access import Source, static_scales
from jaxkv._xla.arithmetic import times
from jaxkv._xla.formats import encode
from jaxkv._xla.read import layer_index, with_int32
from kvcore.contract.read import Gather


def gather(call: Gather, options: ReadOptions, operands: ReadOperands) -> tuple[jax.Array, jax.Array]:
    """Keys and values, `[num_seqs, max_len, num_heads, dim]`, or `[n, num_heads, dim]`. Bits as the oracle's."""
    operands, extents = with_int32(operands), call.cache.extents
    if 0 in (*call.shapes[0], extents.num_blocks, call.block_tables.shape[1]):
        key, value = (jnp.zeros(shape, call.format.name) for shape in call.shapes)
        return key, value
    layer = layer_index(options.cache, operands.cache)
    if operands.seq_lens is None:
        slots = operands.block_tables
        block, place = jnp.where(slots < 0, -1, slots // extents.block_size), slots % extents.block_size
        exists = (block >= 0) & (block < extents.num_blocks)
    else:
        position = jnp.arange(call.max_len, dtype=jnp.int32)
        block = operands.block_tables.at[:, position // extents.block_size].get(mode="fill", fill_value=-1)
        exists = (block >= 0) & (block < extents.num_blocks) & (position[None] < operands.seq_lens[:, None])
        place = position % extents.block_size
    exists = exists & (layer >= 0) & (layer < (extents.num_layers or 1))
    indices = {
        "layer": layer,
        # A block that does not exist becomes one outside, and gives zeros.
        "block": jnp.where(exists, block, extents.num_blocks),
        "slot": place,
    }
    source = Source.of(call.cache, options.cache, operands.cache)

    def rows(kv: int, scale: jax.Array | None) -> jax.Array:
        if call.cache.format == call.format:
            elements = source.take(kv, indices, "head")
        else:
            elements = source.decode(kv, indices, "head", times)
            if scale is not None:
                elements = times(elements, scale.reshape(-1, 1))  # of heads, or of all
            elements = lax.bitcast_convert_type(encode(elements, call.format), jnp.dtype(call.format.name))
        # A scale may be negative, or NaN.
        return jnp.where(exists[..., None, None], elements.reshape(call.shapes[kv]), 0)

    k_scale, v_scale = static_scales(options.cache, operands.cache)
    return rows(0, k_scale), rows(1, v_scale)
