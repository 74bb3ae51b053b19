"""Typical use of both packages, for type checkers: nothing here may be an error. It is not run."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jaxkv
import torchkv
from kvcore.choices import KVCacheDtype


def jax_writers(key: jax.Array, cache: jax.Array, slots: np.ndarray, scales: jax.Array) -> None:
    ref, pair = jax.new_ref(cache), jaxkv.reshape_and_cache_flash(key, key, cache, cache, slots)
    assert_type(pair, tuple[jax.Array, jax.Array])
    key_cache, value_cache = jaxkv.reshape_and_cache_flash(key, key, *pair, [1, 2], "int8", 0.5, scales, layout="HND")
    assert_type(key_cache, jax.Array)
    jaxkv.reshape_and_cache_flash(key, key, ref, jax.new_ref(value_cache), slots, layer=1, backend="xla")
    one = jaxkv.reshape_and_cache_flash_diffkv(key, key, cache, slots, layout="block slot head k+v")
    assert_type(one, jax.Array)
    jaxkv.reshape_and_cache_flash_diffkv(key, key, ref, slots, "fp8")
    four = jaxkv.reshape_and_cache_flash_per_token_head_quant(key, key, cache, cache, scales, scales, slots, "int4")
    assert_type(four, tuple[jax.Array, jax.Array, jax.Array, jax.Array])
    three = jaxkv.reshape_and_cache_flash_diffkv_per_token_head_quant(
        key, key, cache, scales, scales, slots, "fp8", scale_layout="block head slot"
    )
    assert_type(three, tuple[jax.Array, jax.Array, jax.Array])
    assert_type(jaxkv.concat_and_cache_mla(key, key, cache, slots, "fp8_ds_mla", layer=jnp.int32(1)), jax.Array)
    jaxkv.concat_and_cache_mla(key, key, ref, slots, scale=0.5)
    assert_type(jaxkv.copy_blocks((cache, cache), [[1, 2]], layout="HND"), tuple[jax.Array, ...])
    assert_type(jaxkv.zero_blocks([cache], slots, scale_layout="block head slot", backend="xla"), tuple[jax.Array, ...])
    jaxkv.copy_blocks((ref, jax.new_ref(cache)), slots)
    assert_type(jaxkv.swap_blocks((cache, cache), [cache] * 2, [[1, 2]], layout="HND"), tuple[jax.Array, ...])
    jaxkv.swap_blocks([cache], (ref,), slots, backend="xla")


def jax_readers(query: jax.Array, cache: jax.Array, tables: jax.Array, lens: np.ndarray, lse: bool) -> None:
    ref = jax.new_ref(cache)
    assert_type(jaxkv.paged_attention(query, (cache, cache), tables, lens), jax.Array)
    assert_type(jaxkv.paged_attention(query, ref, [[1, 2]], [20], layout="MLA", head_size_v=512), jax.Array)
    out, sums = jaxkv.paged_attention(
        query, (ref, ref), tables, lens, query_start_loc=tables, scale=1.0, causal=False, soft_cap=30.0, sinks=query,
        kv_cache_dtype="nvfp4", k_scale=2.0, v_scale=ref, layout=jaxkv.CacheLayout.HND, layer=0, return_lse=True,
    )  # fmt: skip
    assert_type(out, jax.Array)
    either = jaxkv.paged_attention(query, cache, tables, lens, return_lse=lse)
    assert_type(either, jax.Array | tuple[jax.Array, jax.Array])
    merged = jaxkv.merge_attention(jnp.stack([out, out]), jnp.stack([sums, sums]))
    assert_type(merged, tuple[jax.Array, jax.Array])
    assert_type(jaxkv.rope_table({"head_dim": 64}, 9, dtype=jnp.bfloat16), jax.Array)
    assert_type(jaxkv.slot_mapping(tables, [0, 1, 4], lens, 16, 64), jax.Array)
    pair = jaxkv.gather_kv([cache, cache], tables, lens, 32, dtype=jnp.float32, kv_cache_dtype="int8")
    pair = jaxkv.gather_slots([cache, cache], [1, 2], dtype=jnp.float32, layout="HND")
    assert_type(pair, tuple[jax.Array, jax.Array])


def jax_views(projection: jax.Array, cache: jaxkv.PagedKVCache, slots: np.ndarray, scales: jax.Array) -> None:
    query, key, value = jaxkv.heads(projection, 0, 4), jaxkv.heads(projection, 4, 5), jaxkv.heads(projection, 5, 6)
    latent = jaxkv.heads(np.ones((3, 576), np.float32), 0, 512)
    flat = jaxkv.heads(jax.new_ref(projection), 0, 8, head_size=128)
    pair = jaxkv.reshape_and_cache_flash(key, flat, projection, projection, slots, "fp8", layout="HND")
    assert_type(pair, tuple[jax.Array, jax.Array])
    ref = jax.new_ref(projection)
    jaxkv.reshape_and_cache_flash_per_token_head_quant(key, value, ref, ref, ref, ref, slots, "int8")
    assert_type(jaxkv.concat_and_cache_mla(latent, latent, projection, slots), jax.Array)
    assert_type(jaxkv.paged_attention(query, pair, slots, slots), jax.Array)
    assert_type(jaxkv.kv_scales(key, value, "int8"), tuple[jax.Array, jax.Array])
    program = jaxkv.precompile(cache.write, key, jax.ShapeDtypeStruct((1, 2, 3), jnp.float32), slots, layer=0)
    assert_type(program, jax.stages.Compiled)
    cache = cache.write(key, value, slots, layer=0)
    assert_type(cache.attend(query, slots, slots, return_lse=True), tuple[jax.Array, jax.Array])
    print(query.shape, query.dtype, query.ndim, jnp.asarray(query))


def jax_cache(key: jax.Array, tables: jax.Array, kv_cache_dtype: KVCacheDtype) -> None:
    if kv_cache_dtype != "auto" and kv_cache_dtype != "fp8_ds_mla":
        k_scale, v_scale = jaxkv.kv_scales(key, key, kv_cache_dtype, "head")
        cache = jaxkv.PagedKVCache.create(
            num_layers=2, num_blocks=8, block_size=16, num_heads=8, head_size=128, dtype=jnp.float16, layout="HND",
            kv_cache_dtype=kv_cache_dtype, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        cache = cache.write(key, key, np.arange(8), layer=0)
        assert_type(cache, jaxkv.PagedKVCache)
        host = cache.create_host(num_blocks=4)
        assert_type(cache.swap_blocks(host, [[1, 2]]).swap_blocks(cache, tables, backend="xla"), jaxkv.PagedKVCache)
        assert_type(cache.create_host(memory="2GiB"), jaxkv.PagedKVCache)
        assert_type(cache.copy_blocks([[1, 2]]).zero_blocks(tables, backend="interpret"), jaxkv.PagedKVCache)
        assert_type(cache.relayout(cache, [[1, 2]], requantise=True), jaxkv.PagedKVCache)
        assert_type(jaxkv.relayout(cache, cache, backend="xla"), jaxkv.PagedKVCache)
        assert_type(cache.read([1, 2], layer=0), tuple[jax.Array, jax.Array])
        assert_type(cache.attend(key, tables, tables[:, 0], layer=0, sliding_window=9), jax.Array)
        assert_type(cache.attend(key, tables, tables, return_lse=True), tuple[jax.Array, jax.Array])
        key, value = cache.gather(tables, tables, 32, dtype="float32", layer=jnp.int32(0), backend="xla")
        assert_type(value, jax.Array)
    layout = jaxkv.CacheLayout.of("layer block head slot dim")
    print(layout.describe(num_layers=2, num_blocks=8, block_size=16, num_heads=8, head_size=128))
    assert_type(jaxkv.CacheLayout.from_json(jaxkv.CacheLayout.from_vllm("BLHNC").to_json()), jaxkv.CacheLayout)


def host(prompt: list[int]) -> None:
    pool = jaxkv.BlockPool(64, 16, watermark=2, seed=1)
    sequence = torchkv.Sequence(pool, prompt, salt="adapter")
    try:
        slots, copies = sequence.append(len(prompt) - sequence.length)
    except jaxkv.OutOfBlocks as error:
        print(error.asked, error.free)
        return
    assert_type(slots, list[int])
    assert_type(copies, list[tuple[int, int]])
    sequence.commit(prompt[sequence.num_shared :])
    assert_type(sequence.fork(), jaxkv.Sequence)
    batch = jaxkv.ragged_batch([sequence, sequence.fork()], (1, 0), num_seqs=4, max_blocks=8, num_tokens=16)
    assert_type(batch, torchkv.RaggedBatch)
    tables, _, lens, _ = batch
    assert_type(torchkv.slot_mapping(torch.from_numpy(tables), None, torch.from_numpy(lens), 16), torch.Tensor)
    assert_type(pool.statistics.hit_rate, float)
    pool.free(pool.allocate(3))
    blocks = torchkv.blocks_that_fit("2GiB", block_size=16, num_heads=8, head_size=128, dtype=torch.float16)
    assert_type(blocks, int)
    jaxkv.PagedKVCache.create(memory=2**31, block_size=16, num_heads=8, head_size=128)
    torchkv.PagedKVCache.create(memory="2GiB", block_size=16, num_heads=8, head_size=128)


def torch_writers(key: Tensor, cache: Tensor, slots: Tensor, scales: Tensor) -> None:
    torchkv.reshape_and_cache_flash(key, key, cache, cache, slots, "fp8", 0.5, scales, layout="HND", layer=slots)
    torchkv.reshape_and_cache_flash_diffkv(key, key, cache, slots, layout="block slot head k+v", backend="torch")
    torchkv.reshape_and_cache_flash_per_token_head_quant(key, key, cache, cache, scales, scales, slots, "int4")
    torchkv.reshape_and_cache_flash_diffkv_per_token_head_quant(
        key, key, cache, scales, scales, slots, "fp8", scale_layout="block head slot"
    )
    torchkv.concat_and_cache_mla(key, key, cache, slots, "fp8_ds_mla", layer=1)
    torchkv.copy_blocks((cache, cache, scales, scales), slots, scale_layout="block head slot")
    torchkv.zero_blocks(cache, slots, layout="KV_NHD", backend="torch")
    torchkv.swap_blocks((cache, cache), [cache, cache], slots, layout="HND", backend="interpret")


def torch_readers(query: Tensor, cache: Tensor, tables: Tensor, lens: Tensor, lse: bool) -> None:
    assert_type(torchkv.paged_attention(query, (cache, cache), tables, lens), Tensor)
    out, sums = torchkv.paged_attention(
        query, cache, tables, lens, query_start_loc=lens, causal=False, kv_cache_dtype="int8", k_scale=2.0,
        layout=torchkv.CacheLayout.INTERLEAVED, return_lse=True,
    )  # fmt: skip
    assert_type(out, Tensor)
    assert_type(torchkv.paged_attention(query, cache, tables, lens, return_lse=lse), Tensor | tuple[Tensor, Tensor])
    assert_type(torchkv.merge_attention(torch.stack([out, out]), torch.stack([sums, sums])), tuple[Tensor, Tensor])
    assert_type(
        torchkv.rope_table({"head_dim": 64}, layer_type="full_attention", dtype="float16", device="cpu"), Tensor
    )
    assert_type(torchkv.gather_kv([cache, cache], tables, lens, 32, dtype=torch.float32), tuple[Tensor, Tensor])
    assert_type(torchkv.gather_slots([cache, cache], lens, layer=1), tuple[Tensor, Tensor])
    assert_type(torchkv.slot_mapping(tables, None, lens, 16, out=lens, backend="torch"), Tensor)


def torch_cache(key: Tensor, tables: Tensor, kv_cache_dtype: KVCacheDtype) -> None:
    cache = torchkv.PagedKVCache.create(
        num_blocks=8, block_size=16, num_heads=8, head_size=128, dtype="float16", layout="layer block head slot dim",
        num_layers=2, kv_cache_dtype=kv_cache_dtype, device="cpu",
    )  # fmt: skip
    cache.write(key, key, tables[0], layer=0)
    torchkv.relayout(cache, cache, tables)
    assert_type(cache.read(tables[0]), tuple[Tensor, Tensor])
    cache.copy_blocks(tables)
    host = cache.create_host(num_blocks=4)
    cache.swap_blocks(host, tables)
    host.swap_blocks(cache, tables, backend="torch")
    assert_type(cache.create_host(memory="2GiB"), torchkv.PagedKVCache)
    cache.zero_blocks(tables[0], backend="interpret")
    assert_type(cache.attend(key, tables, tables[:, 0], layer=0, sliding_window=9), Tensor)
    assert_type(cache.attend(key, tables, tables, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cache.gather(tables, tables, 32, dtype=torch.float32, backend="torch"), tuple[Tensor, Tensor])
    assert_type(torchkv.precompile(cache.attend, key, tables, tables[:, 0], layer=0), int)
    k_scale, _ = torchkv.kv_scales(key, key, "nvfp4", granularity="head")
    assert_type(k_scale, Tensor)
