"""torchkv: a paged KV cache in torch, written in place and read, with the Triton kernels that jaxkv launches from JAX.

    torchkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping)
    out = torchkv.paged_attention(query, (key_cache, value_cache), block_tables, seq_lens)

Docs: README.md. Layouts: `torchkv.CacheLayout`.
"""

from kvcore.layout import CacheLayout
from kvcore.slots import find_duplicate_slots
from torchkv.cache import PagedKVCache
from torchkv.ops import reshape_and_cache_flash, reshape_and_cache_flash_diffkv
from torchkv.read_ops import gather_kv, merge_attention, paged_attention

__all__ = [
    "CacheLayout",
    "PagedKVCache",
    "find_duplicate_slots",
    "gather_kv",
    "merge_attention",
    "paged_attention",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_diffkv",
]
