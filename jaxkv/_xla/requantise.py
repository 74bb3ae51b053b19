"""`relayout` where formats differ, as XLA's gathers and scatters: a chunk of slots is read, then written."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._call import CacheOperands, CacheOptions, ReadOperands, ReadOptions, WriteOperands, WriteOptions
from jaxkv._relayout import RelayoutOperands, RelayoutOptions
from jaxkv._xla.gather import gather
from jaxkv._xla.write import write
from kvcore.contract.read import Gather
from kvcore.contract.relayout import Relayout


def requantise(call: Relayout, options: RelayoutOptions, operands: RelayoutOperands) -> list[jax.Array]:
    """The new arrays, in place where donated: a loop over layers and chunks."""
    memory = list(operands.cache.memory)
    slots, targets = operands.slots(call.num_pairs)
    targets = jnp.where((slots >= 0) & (slots < call.source.extents.num_slots), targets, -1)
    chunks = 1
    if isinstance(call.num_pairs, int):  # else jax.export leaves it open, and all are read at once
        chunks = -(-call.num_pairs // call.chunk)
        padding = (0, chunks * call.chunk - call.num_pairs)
        slots, targets = (jnp.pad(array, padding, constant_values=-1) for array in (slots, targets))
    slots, targets = slots.reshape(chunks, -1), targets.reshape(chunks, -1)
    reading = ReadOptions(
        _of_any_layer(options.source), options.head_size, options.head_size_v, None, max_len=None, dtype=call.between
    )
    writing = WriteOptions(_of_any_layer(options.cache), None)

    def step(memory: list[jax.Array], at: jax.Array) -> tuple[list[jax.Array], None]:
        layer, chunk = at // chunks, at % chunks
        source = _in_layer(options.source, operands.source, layer)
        target = _in_layer(options.cache, operands.cache.with_memory(memory), layer)
        read = ReadOperands(None, source, slots[chunk], None, None, None)
        gathered = reading.describe(read)
        assert isinstance(gathered, Gather)
        written = WriteOperands(*gather(gathered, reading, read), target, targets[chunk])
        return write(writing.describe(written), writing, written), None

    return lax.scan(step, memory, jnp.arange(call.num_layers * chunks, dtype=jnp.int32))[0]


def _of_any_layer(options: CacheOptions) -> CacheOptions:
    """The options of a cache, one of whose layers an operand picks."""
    return options._replace(layer=None)


def _in_layer(options: CacheOptions, operands: CacheOperands, layer: jax.Array) -> CacheOperands:
    return operands._replace(layer=layer[None]) if options.layout.has_layer else operands
