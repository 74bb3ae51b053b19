"""torchkv: write a paged KV cache from torch, in place, with the Triton kernels that jaxkv launches from JAX.

    torchkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping)

Docs: README.md. Layouts: `torchkv.CacheLayout`.
"""

from kvcore.layout import CacheLayout
from kvcore.slots import find_duplicate_slots
from torchkv.ops import reshape_and_cache_flash, reshape_and_cache_flash_diffkv

__all__ = [
    "CacheLayout",
    "find_duplicate_slots",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_diffkv",
]
