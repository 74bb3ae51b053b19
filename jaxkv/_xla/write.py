"""The write as XLA scatters: for CPU, TPU, and wherever there is no Triton. Bits as the oracle's."""

import jax
import jax.numpy as jnp

from jaxkv._call import WriteOperands, WriteOptions
from jaxkv._xla.access import parts_of, put
from jaxkv._xla.formats import divide, encode, pack, quantise, quantise_ds_mla, quantise_nvfp4, to_bytes
from kvcore.contract.write import Write
from kvcore.formats import DS_MLA_GROUP, FP8_DS_MLA, NVFP4


def write(call: Write, options: WriteOptions, operands: WriteOperands) -> list[jax.Array]:
    """The new arrays. A scatter for each of K, V and their scales, over blocks and slots: in place where donated."""
    extents, cache = call.cache.extents, operands.cache
    slots = operands.slot_mapping
    written = (slots >= 0) & (slots < extents.num_slots)
    indices = {
        # What is skipped goes to a block that does not exist, and is dropped.
        "block": jnp.where(written, slots // extents.block_size, extents.num_blocks).astype(jnp.int32),
        "slot": (slots % extents.block_size).astype(jnp.int32),
        "layer": jnp.int32(options.cache.layer or 0) if cache.layer is None else cache.layer[0].astype(jnp.int32),
    }
    memory = list(cache.memory)
    if 0 in (slots.size, memory[0].size):
        return memory
    shapes = [array.shape for array in memory]
    key, value = operands.key[: slots.shape[0]], operands.value[: slots.shape[0]]
    if call.cache.format == FP8_DS_MLA:
        part, _ = parts_of(call.cache, shapes, None, 0)
        return [put(memory[0], part, indices, _rows_of_mla(key, value, call))]
    for kv, (rows, scale) in enumerate(((key, cache.k_scale), (value, cache.v_scale))):
        parts = parts_of(call.cache, shapes, options.cache.scale_layout, kv)
        for part, units in zip(parts, _encode(rows, call, scale), strict=True):
            if part is not None and units is not None:
                memory[part.array] = put(memory[part.array], part, indices, units)
    return memory


def _encode(rows: jax.Array, call: Write, scale: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Bits of elements, and of scales that are computed."""
    stored = call.cache.format
    if call.copies:
        return rows, None
    rows = rows.astype(jnp.float32)
    scale = None if scale is None else scale.reshape(-1, 1)  # of heads, or of all
    if stored == NVFP4:
        return quantise_nvfp4(rows, jnp.ones((1, 1), jnp.float32) if scale is None else scale)
    if call.cache.scales is not None:
        return quantise(rows, stored)
    return pack(encode(rows if scale is None else divide(rows, scale), stored), stored), None


def _rows_of_mla(kv_c: jax.Array, k_pe: jax.Array, call: Write) -> jax.Array:
    """Rows of fp8_ds_mla: bytes of elements, of scales, and of the part in bfloat16."""
    groups = kv_c.reshape(*kv_c.shape[:-1], -1, DS_MLA_GROUP).astype(jnp.float32)
    rope = k_pe if k_pe.dtype.name == call.format_v.name else encode(k_pe.astype(jnp.float32), call.format_v)
    parts = (*quantise_ds_mla(groups), rope)
    return jnp.concatenate([to_bytes(part.reshape(*kv_c.shape[:-1], -1)) for part in parts], axis=-1)
