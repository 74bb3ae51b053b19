"""jaxkv: write a paged KV cache from JAX, in place, with Triton kernels.

    key_cache, value_cache = jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping)

Under `jax.jit` with donated caches, in scans, loops and shardings, the caches are updated where they are. Docs:
README.md. Layouts: `jaxkv.CacheLayout`.
"""

from jaxkv.ops import reshape_and_cache_flash, reshape_and_cache_flash_diffkv
from kvcore.layout import CacheLayout
from kvcore.slots import find_duplicate_slots

__all__ = [
    "CacheLayout",
    "find_duplicate_slots",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_diffkv",
]
