"""torchkv: a paged KV cache in torch, written in place and read, with the Triton kernels that jaxkv launches from JAX.

    torchkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping)
    out = torchkv.paged_attention(query, (key_cache, value_cache), block_tables, seq_lens)

Docs: README.md. Layouts: `torchkv.CacheLayout`. Under other projects' names:
`torchkv.integrations.vllm` and `torchkv.integrations.flashinfer`.
"""

from typing import TYPE_CHECKING

from kvcore import installed

with installed.needed("torch", installed.TORCH):
    import torch as _  # noqa: F401, the parts below import it without a word

from kvcore.batch import RaggedBatch, ragged_batch
from kvcore.fitting import blocks_that_fit
from kvcore.layout import CacheLayout
from kvcore.pool import BlockPool, OutOfBlocks
from kvcore.sequence import Sequence
from kvcore.slots import check_tables, find_duplicate_slots
from torchkv.ahead import precompile
from torchkv.blocks import copy_blocks, swap_blocks, zero_blocks
from torchkv.cache import PagedKVCache
from torchkv.dlpack import from_dlpack
from torchkv.integrations.vllm import (
    merge_attn_states,
    triton_reshape_and_cache_flash,
    triton_reshape_and_cache_flash_diffkv,
    triton_reshape_and_cache_flash_per_token_head_quant,
    unified_attention,
)
from torchkv.merge import merge_attention
from torchkv.mla import concat_and_cache_mla
from torchkv.move import relayout
from torchkv.quantize import (
    reshape_and_cache_flash_diffkv_per_token_head_quant,
    reshape_and_cache_flash_per_token_head_quant,
)
from torchkv.read import gather_kv, paged_attention
from torchkv.rope import rope_and_cache
from torchkv.scales import kv_scales
from torchkv.slots import gather_slots, slot_mapping
from torchkv.tables import rope_table
from torchkv.write import reshape_and_cache_flash, reshape_and_cache_flash_diffkv

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
    "copy_blocks",
    "find_duplicate_slots",
    "from_dlpack",
    "gather_kv",
    "gather_slots",
    "kv_scales",
    "merge_attention",
    "merge_attn_states",
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
    "triton_reshape_and_cache_flash",
    "triton_reshape_and_cache_flash_diffkv",
    "triton_reshape_and_cache_flash_per_token_head_quant",
    "unified_attention",
    "zero_blocks",
]

__version__: str

if not TYPE_CHECKING:  # for which every name would be an attribute
    __getattr__ = installed.version_attribute(__name__)
