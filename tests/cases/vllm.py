"""vLLM's call sites: the tensors that it hands over."""

import enum

import numpy as np
import torch

from kvcore.oracle import write as reference
from tests.cases.arrays import from_torch
from torchkv import read
from torchkv.integrations import vllm

BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, GROUP = 7, 8, 2, 32, 2


SLOTS = torch.tensor([3, -1, 40, 41, 55, 0])


class KVQuantMode(enum.IntEnum):
    """vLLM's, as far as it goes here."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5


SIGNATURES = {  # where vLLM 0.33 has a function, and its parameters
    "_custom_ops.reshape_and_cache_flash": (
        "key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale"
    ),
    "_custom_ops.concat_and_cache_mla": "kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False",
    "v1.attention.ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash": (
        "key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale, "
        "interleaved_v_pack_factor=0"
    ),
    "v1.attention.ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash_diffkv": (
        "key, value, kv_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale"
    ),
    "v1.attention.ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash_per_token_head_quant": (
        "key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, kv_quant_mode"
    ),
    "v1.attention.ops.triton_unified_attention.unified_attention": (
        "q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size, "
        "block_table, softcap, q_descale, k_descale, v_descale, seq_threshold_3D=None, num_par_softmax_segments=None, "
        "softmax_segm_output=None, softmax_segm_max=None, softmax_segm_expsum=None, alibi_slopes=None, "
        "output_scale=None, qq_bias=None, sinks=None, mm_prefix_range=None, rswa_prefix_lens=None, rswa_window=None, "
        "use_alibi_sqrt=False, kv_quant_mode=0, k_scale_cache=None, v_scale_cache=None, chunk_lookback=-1, "
        "use_td=False, mm_prefix_clamp_sliding_window=False"
    ),
    "v1.attention.ops.merge_attn_states.merge_attn_states": (
        "output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None, "
        "prefill_tokens_with_context=None, output_scale=None"
    ),
}


FUNCTIONS = {where.rpartition(".")[2]: where for where in SIGNATURES}


def rows(dtype=torch.bfloat16, tokens=8, head_size_v=HEAD_SIZE):
    """Slices of a fused projection, with more rows than slots."""
    torch.manual_seed(1)
    fused = torch.randn(tokens, HEADS * (HEAD_SIZE + head_size_v), dtype=dtype)
    key, value = fused.split([HEADS * HEAD_SIZE, HEADS * head_size_v], dim=-1)
    return key.view(tokens, HEADS, HEAD_SIZE), value.view(tokens, HEADS, head_size_v)


def layer_cache(content, dtype=torch.bfloat16, order="HND"):
    """A layer's cache as vLLM has it: `[blocks, heads, slots, content]`, in memory also `[blocks, slots, heads, …]`."""
    if order == "HND":
        cache = torch.empty(BLOCKS, HEADS, BLOCK_SIZE, content, dtype=torch.uint8 if dtype.itemsize == 1 else dtype)
    else:
        cache = torch.empty(
            BLOCKS, BLOCK_SIZE, HEADS, content, dtype=torch.uint8 if dtype.itemsize == 1 else dtype
        ).transpose(1, 2)
    cache.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).fill_(0x55)
    return cache.view(dtype) if dtype.itemsize == 1 else cache


def halves(cache, dtype=None):
    """K's and V's half, `[blocks, slots, heads, dim]`, as views of fp8 where they hold that."""
    k, v = cache.transpose(1, 2).split(cache.shape[-1] // 2, dim=-1)
    return (k, v) if dtype is None else (k.view(dtype), v.view(dtype))


def scale_views(cache):
    """float32 views of the padding of 4 bytes after each head's elements."""
    half = cache.shape[-1] // 2
    words = torch.tensor([], dtype=torch.float32, device=cache.device).set_(cache.untyped_storage())
    block, head, slot, _ = (s * cache.element_size() // 4 for s in cache.stride())
    first = cache.storage_offset() * cache.element_size() // 4
    return tuple(
        torch.as_strided(words, (BLOCKS, BLOCK_SIZE, HEADS), (block, slot, head), first + (i * half + half - 4) // 4)
        for i in range(2)
    )


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def oracle(key, value, cache, kv_cache_dtype="auto", scales=(None, None)):
    """What cache holds after the write: the oracle's answer, in the order `[blocks, slots, heads, …]`."""
    caches = [from_torch(c).copy() for c in halves(cache)]
    reference.reshape_and_cache_flash(
        from_torch(key), from_torch(value), *caches, SLOTS.numpy(), kv_cache_dtype, *scales, layout="NHD"
    )
    return [c.view(np.uint8) for c in caches]


def assert_bytes(tensors, want):
    for got, w in zip(tensors, want, strict=True):
        np.testing.assert_array_equal(bytes_of(got).numpy(), w)


MODES = {
    "int8": (KVQuantMode.INT8_PER_TOKEN_HEAD, torch.int8),
    "fp8": (KVQuantMode.FP8_PER_TOKEN_HEAD, torch.float8_e4m3fn),
}


def written_per_token_head(name, order="HND", mode=None):
    """A padded cache with its scales in the padding, and its halves."""
    key, value = rows()
    cache = layer_cache(2 * (HEAD_SIZE + 4), torch.int8, order)
    scales = scale_views(cache)
    for s in scales:
        s.fill_(1.0)
    vllm.triton_reshape_and_cache_flash_per_token_head_quant(
        key,
        value,
        *halves(cache, MODES[name][1]),
        *scales,
        SLOTS,
        kv_quant_mode=MODES[name][0] if mode is None else mode,
    )
    return key, value, cache, scales


def attention_arguments(dtype=torch.bfloat16, query_lens=(1, 3, 0, 2), lengths=(9, 17, 4, 3)):
    """What a forward pass hands over, padded as for a CUDA graph: rows after the last sequence's, blocks of -1."""
    torch.manual_seed(3)
    tokens = sum(query_lens) + 2
    order = iter(torch.randperm(BLOCKS).tolist())
    table = torch.full((len(lengths), 4), -1, dtype=torch.int32)
    for i, length in enumerate(lengths):
        for j in range(-(-length // BLOCK_SIZE)):
            table[i, j] = next(order)
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    query = torch.randn(tokens, HEADS * GROUP * HEAD_SIZE, dtype=dtype).view(tokens, HEADS * GROUP, HEAD_SIZE)
    output = torch.full((tokens + 3, HEADS * GROUP * HEAD_SIZE), 7.0, dtype=dtype)
    output = output.view(tokens + 3, HEADS * GROUP, HEAD_SIZE)
    return {
        "q": query, "out": output[:tokens], "cu_seqlens_q": starts, "max_seqlen_q": max(query_lens),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32), "max_seqlen_k": max(lengths), "softmax_scale": 0.2,
        "causal": True, "window_size": (-1, -1), "block_table": table, "softcap": 0, "q_descale": None,
        "k_descale": None, "v_descale": None,
    }  # fmt: skip


def filled_cache(dtype=torch.bfloat16, padding=0):
    cache = layer_cache(2 * (HEAD_SIZE + padding), torch.int8 if padding else dtype)
    torch.manual_seed(4)
    key, value = torch.randn(2, BLOCKS * BLOCK_SIZE, HEADS, HEAD_SIZE)
    slots = torch.arange(BLOCKS * BLOCK_SIZE)
    return cache, key, value, slots


def attend(arguments, k, v, **options):
    """The same by torchkv's own names, with the same backend."""
    a = arguments
    return read.paged_attention(
        a["q"], (k, v), a["block_table"], a["seqused_k"], query_start_loc=a["cu_seqlens_q"], scale=a["softmax_scale"],
        **options,
    )  # fmt: skip


def states(dtype=torch.bfloat16, tokens=6, heads=4, dim=16):
    torch.manual_seed(5)
    prefix, suffix = torch.randn(2, tokens, heads, 2 * dim, dtype=dtype)[..., :dim]  # strided, as padded backends give
    prefix_lse, suffix_lse = torch.randn(heads, tokens), torch.randn(tokens, heads).T
    prefix_lse[1, 2] = torch.inf  # FlashAttention's, of no context
    return prefix, prefix_lse, suffix, suffix_lse
