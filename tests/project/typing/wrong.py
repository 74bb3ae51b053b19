"""Wrong uses of both packages: type checkers report every line marked `# wrong`, and no other. It is not run."""

import jax
from torch import Tensor

import jaxkv
import torchkv


def with_jax(x: jax.Array, ref: jax.Ref, cache: jaxkv.PagedKVCache) -> None:
    jaxkv.reshape_and_cache_flash(x, x, x, x, x, "fp9")  # wrong
    jaxkv.reshape_and_cache_flash(x, x, x, x, x, bakend="xla")  # wrong
    jaxkv.reshape_and_cache_flash(x, x, x, x, x, backend="torch")  # wrong
    jaxkv.reshape_and_cache_flash(x, x, ref, x, x)  # wrong
    key_cache, value_cache = jaxkv.reshape_and_cache_flash(x, x, ref, ref, x)  # wrong
    jaxkv.reshape_and_cache_flash_diffkv(x, x, ref, x).shape  # wrong
    jaxkv.reshape_and_cache_flash_per_token_head_quant(x, x, x, x, x, x, x, "nvfp4")  # wrong
    jaxkv.reshape_and_cache_flash_diffkv_per_token_head_quant(x, x, x, x, x, x, "auto")  # wrong
    jaxkv.concat_and_cache_mla(x, x, x, x, layout="MLA")  # wrong
    jaxkv.kv_scales(x, x, "auto")  # wrong
    jaxkv.kv_scales(x, x, "int8", "token_head")  # wrong
    jaxkv.paged_attention(x, (x, x), x, x, return_lse=True).shape  # wrong
    jaxkv.paged_attention(x, (x, x), x, x, slding_window=9)  # wrong
    jaxkv.paged_attention(x, (x, x), x, x, kv_cache_dtype="fp9")  # wrong
    jaxkv.gather_kv(x, x, x, 9, kv_cache_dtype="fp9")  # wrong
    jaxkv.slot_mapping(x, x, x, 4, backend="torch")  # wrong
    jaxkv.rope_table({}, 9, "full_attention")  # wrong
    jaxkv.copy_blocks((x, x), x, backend="torch")  # wrong
    jaxkv.copy_blocks((x, x), x, layer=0)  # wrong
    jaxkv.copy_blocks((ref, x), x)  # wrong
    jaxkv.gather_slots((x, x), x, backend="torch")  # wrong
    jaxkv.zero_blocks((x, x), x).shape  # wrong
    cache.copy_blocks(x, layer=0)  # wrong
    cache.swap_blocks(x, x)  # wrong
    jaxkv.swap_blocks((x, x), (ref, x), x)  # wrong
    jaxkv.PagedKVCache.create(num_blocks=1, block_size=1, num_heads=1, head_size=8, kv_cache_dtype="fp9")  # wrong
    jaxkv.PagedKVCache.create(num_blocks=1, block_size=1, num_heads=1, head_sise=8)  # wrong
    jaxkv.CacheLayout.from_json({"version": 1})  # wrong
    jaxkv.heads(x, 0, 4, 128)  # wrong
    jaxkv.heads(x, 0)  # wrong
    jaxkv.reshape_and_cache_flash(x, x, x, x, jaxkv.heads(x, 0, 4))  # wrong
    cache.write(x, x, x, layr=1)  # wrong
    cache.attend(x, x, x, slding_window=9)  # wrong
    cache.attend(x, x, x, kv_cache_dtype="fp8")  # wrong
    cache.attend(x, x, x, return_lse=True).shape  # wrong
    cache.gather(x, x, 9, head_size=8)  # wrong
    cache.gather(x, x, 9, backend="torch")  # wrong
    jaxkv.CacheLayout.HND.describe(num_blocks=1, block_size=1, num_heads=1, head_sise=8)  # wrong
    jaxkv.BlockPool(8, 16, watermark=0.1)  # wrong
    jaxkv.Sequence(cache, [1, 2])  # wrong
    jaxkv.blocks_that_fit("2GiB", block_size=16, num_heads=8, head_size=128, kv_cache_dtype="fp9")  # wrong


def with_torch(x: Tensor, cache: torchkv.PagedKVCache) -> None:
    torchkv.reshape_and_cache_flash(x, x, x, x, x, "fp9")  # wrong
    torchkv.reshape_and_cache_flash_diffkv(x, x, x, x, backend="xla")  # wrong
    torchkv.reshape_and_cache_flash_per_token_head_quant(x, x, x, x, x, x, x, "nvfp4")  # wrong
    torchkv.reshape_and_cache_flash_diffkv_per_token_head_quant(x, x, x, x, x, x, "auto")  # wrong
    torchkv.concat_and_cache_mla(x, x, x, x, "fp9")  # wrong
    torchkv.kv_scales(x, x, "auto")  # wrong
    torchkv.kv_scales(x, x, "int8", "token_head")  # wrong
    torchkv.paged_attention(x, (x, x), x, x, return_lse=True).shape  # wrong
    torchkv.paged_attention(x, (x, x), x, x, slding_window=9)  # wrong
    torchkv.gather_kv(x, x, x, 9, dtype="int8")  # wrong
    torchkv.slot_mapping(x, [0, 1], x, 4)  # wrong
    torchkv.rope_table({}, 9, dtype="int8")  # wrong
    torchkv.copy_blocks((x, x), x, backend="xla")  # wrong
    torchkv.gather_slots((x, x), x, dtype="int8")  # wrong
    torchkv.zero_blocks((x, x), [1])  # wrong
    cache.zero_blocks(x, layer=0)  # wrong
    cache.swap_blocks(cache, [[0, 1]])  # wrong
    torchkv.swap_blocks((x, x), (x, x))  # wrong
    torchkv.PagedKVCache.create(num_blocks=1, block_size=1, num_heads=1, head_size=8, dtype="fp8")  # wrong
    cache.write(x, x, x, backend="xla")  # wrong
    cache.attend(x, x, x, slding_window=9)  # wrong
    cache.attend(x, x, x, return_lse=True).shape  # wrong
    cache.gather(x, x, 9, head_size=8)  # wrong
