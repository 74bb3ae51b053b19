"""jaxkv: a paged KV cache in JAX, written in place and read, with Triton kernels.

    key_cache, value_cache = jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping)
    out = jaxkv.paged_attention(query, (key_cache, value_cache), block_tables, seq_lens)

Under `jax.jit` with donated caches, in scans, loops and shardings, the caches are updated where they are. Docs:
README.md. Layouts: `jaxkv.CacheLayout`. Under Pallas's names: `jaxkv.integrations.pallas`.

Wherever a function takes an array, it takes one of JAX's or NumPy's, or a list; numbers in lists are float32, and what
JAX would round (NumPy's float64) is a TypeError. Slots, tables, lengths, starts and layers may be integers of any
width, never bools or floats. Where JAX has no 64-bit integers, those that do not fit stay outside: slots and blocks
that do not exist, lengths beyond any table. NumPy's scalars count as Python's numbers, and NumPy's arrays may change
once a function has returned.

`jax.export` may leave sizes of arrays open on CPU and TPU; on a GPU they are static, since launches depend on them.
"""

from typing import TYPE_CHECKING

from kvcore import installed

with installed.needed("jax", installed.JAX):
    import jax as _  # noqa: F401, the parts below import it without a word

from jaxkv import _exported as _exported
from jaxkv.ahead import precompile
from jaxkv.blocks import copy_blocks, swap_blocks, zero_blocks
from jaxkv.cache import PagedKVCache
from jaxkv.devices import context_attention, context_lens, context_slots, local_indices
from jaxkv.dlpack import from_dlpack
from jaxkv.merge import merge_attention
from jaxkv.mla import concat_and_cache_mla
from jaxkv.move import relayout
from jaxkv.quantize import (
    reshape_and_cache_flash_diffkv_per_token_head_quant,
    reshape_and_cache_flash_per_token_head_quant,
)
from jaxkv.read import gather_kv, paged_attention
from jaxkv.rope import rope_and_cache
from jaxkv.scales import kv_scales
from jaxkv.slots import gather_slots, slot_mapping
from jaxkv.tables import rope_table
from jaxkv.views import heads
from jaxkv.write import reshape_and_cache_flash, reshape_and_cache_flash_diffkv
from kvcore.batch import RaggedBatch, ragged_batch
from kvcore.fitting import blocks_that_fit
from kvcore.layout import CacheLayout
from kvcore.pool import BlockPool, OutOfBlocks
from kvcore.sequence import Sequence
from kvcore.slots import check_tables, find_duplicate_slots

__all__ = [
    "BlockPool",
    "CacheLayout",
    "OutOfBlocks",
    "PagedKVCache",
    "RaggedBatch",
    "Sequence",
    "blocks_that_fit",
    "check_tables",
    "concat_and_cache_mla",
    "context_attention",
    "context_lens",
    "context_slots",
    "copy_blocks",
    "find_duplicate_slots",
    "from_dlpack",
    "gather_kv",
    "gather_slots",
    "heads",
    "kv_scales",
    "local_indices",
    "merge_attention",
    "paged_attention",
    "precompile",
    "ragged_batch",
    "relayout",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_diffkv",
    "reshape_and_cache_flash_diffkv_per_token_head_quant",
    "reshape_and_cache_flash_per_token_head_quant",
    "rope_and_cache",
    "rope_table",
    "slot_mapping",
    "swap_blocks",
    "zero_blocks",
]

__version__: str

if not TYPE_CHECKING:  # for which every name would be an attribute
    __getattr__ = installed.version_attribute(__name__)
