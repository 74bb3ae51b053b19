"""The write as XLA scatters: for CPU, TPU, and wherever there is no Triton. Bits as the oracle's."""

import jax
import jax.numpy as jnp

from jaxkv._call import CacheOptions, WriteOperands, WriteOptions
from jaxkv._xla.access import parts_of, put, static_scales
from jaxkv._xla.arithmetic import divide
from jaxkv._xla.formats import encode, pack, quantise, quantise_ds_mla, quantise_nvfp4, to_bytes
from kvcore.contract.write import Write
from kvcore.formats import DS_MLA_GROUP, FP8_DS_MLA, NVFP4


def write(call: Write, options: WriteOptions, operands: WriteOperands) -> list[jax.Array]:
    """The new arrays. A scatter for each of K, V and their scales, over blocks and slots: in place where donated."""
    written = operands.slot_mapping.shape[0]
    rows = operands.key[:written], operands.value[:written]
    return write_rows(call, options.cache, operands, rows, computed=(False, False))


def write_rows(
    call: Write,
    options: CacheOptions,
    operands: WriteOperands,
    rows: tuple[jax.Array, jax.Array],
    computed: tuple[bool, bool],
) -> list[jax.Array]:
    """The new arrays after a write of rows that may have been computed of key and value.

    Args:
        call: What is written.
        options: Of the cache.
        operands: The cache and the slots.
        rows: Of K and V, as many as there are slots.
        computed: Whether those of K, and of V, have been computed; then they are float32.
    """
    extents, cache = call.cache.extents, operands.cache
    slots = operands.slot_mapping
    written = (slots >= 0) & (slots < extents.num_slots)
    indices = {
        # What is skipped goes to a block that does not exist, and is dropped.
        "block": jnp.where(written, slots // extents.block_size, extents.num_blocks).astype(jnp.int32),
        "slot": (slots % extents.block_size).astype(jnp.int32),
        "layer": jnp.int32(options.layer or 0) if cache.layer is None else cache.layer[0].astype(jnp.int32),
    }
    memory = list(cache.memory)
    if 0 in (slots.size, memory[0].size):
        return memory
    shapes = [array.shape for array in memory]
    if call.cache.format == FP8_DS_MLA:
        part, _ = parts_of(call.cache, shapes, None, 0)
        return [put(memory[0], part, indices, _rows_of_mla(*rows, call))]
    for kv, (array, scale) in enumerate(zip(rows, static_scales(options, cache), strict=True)):
        copies = call.copies and not computed[kv]
        parts = parts_of(call.cache, shapes, options.scale_layout, kv)
        for part, units in zip(parts, _encode(array, call, scale, copies), strict=True):
            if part is not None and units is not None:
                memory[part.array] = put(memory[part.array], part, indices, units)
    return memory


def _encode(rows: jax.Array, call: Write, scale: jax.Array | None, copies: bool) -> tuple[jax.Array, jax.Array | None]:
    """Bits of elements, and of scales that are computed; rows as they are if it `copies`."""
    stored = call.cache.format
    if copies:
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
