"""vLLM's functions that write a cache."""

from typing import Any

from torch import Tensor

from torchkv import mla, quantize, write
from torchkv.integrations.vllm.arguments import (
    UnsupportedError,
    cache_format,
    per_token_head_format,
    triton_cache_format,
)


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """`vllm._custom_ops.reshape_and_cache_flash`: `torchkv.reshape_and_cache_flash` with vLLM's names of formats.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        key_cache: `[num_blocks, block_size, num_heads, head_size]` in any order of memory, or head-major,
            `[num_blocks, num_heads, head_size / x, block_size, x]`.
        value_cache: `[num_blocks, block_size, num_heads, head_size_v]` in any order of memory, or head-major,
            `[num_blocks, num_heads, head_size_v, block_size]`.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format's name, vLLM's or torchkv's.
        k_scale: float32 of one element, or `[num_heads]`.
        v_scale: float32 of one element, or `[num_heads]`.

    Raises:
        UnsupportedError: kv_cache_dtype is a format that torchkv lacks, or tensors are on another device than a CPU,
            CUDA or ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    name = cache_format(kv_cache_dtype, key_cache)
    write.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, name, k_scale, v_scale)


def triton_reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved_v_pack_factor: int = 0,
) -> None:
    """The function of this name in vLLM: `torchkv.reshape_and_cache_flash`, into two tensors.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        key_cache: `[num_blocks, block_size, num_heads, head_size]` in any order of memory, or head-major,
            `[num_blocks, num_heads, head_size / x, block_size, x]`.
        value_cache: `[num_blocks, block_size, num_heads, head_size_v]` in any order of memory, or head-major,
            `[num_blocks, num_heads, head_size_v, block_size]`.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format's name, vLLM's or torchkv's. Where it is one of fp8, the caches' dtype says which, and
            a cache of uint8 holds e4m3, so that "fp8_e5m2" does not go with it.
        k_scale: float32 of one element, or `[num_heads]`.
        v_scale: float32 of one element, or `[num_heads]`.
        interleaved_v_pack_factor: 0; other value caches are vLLM's alone.

    Raises:
        UnsupportedError: interleaved_v_pack_factor is not 0, kv_cache_dtype is a format that torchkv lacks, or tensors
            are on another device than a CPU, CUDA or ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    if interleaved_v_pack_factor:
        raise UnsupportedError(f"interleaved_v_pack_factor must be 0, got {interleaved_v_pack_factor}")
    name = triton_cache_format(kv_cache_dtype, key_cache)
    write.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, name, k_scale, v_scale)


def triton_reshape_and_cache_flash_diffkv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """The function of this name in vLLM: `torchkv.reshape_and_cache_flash_diffkv`, into one tensor that holds both.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        kv_cache: `[num_blocks, block_size, num_heads, head_size + head_size_v]`, in any order of memory.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format's name, vLLM's or torchkv's. Where it is one of fp8, the cache's dtype says which, and
            a cache of uint8 holds e4m3, so that "fp8_e5m2" does not go with it.
        k_scale: float32 of one element, or `[num_heads]`.
        v_scale: float32 of one element, or `[num_heads]`.

    Raises:
        UnsupportedError: kv_cache_dtype is a format that torchkv lacks, or tensors are on another device than a CPU,
            CUDA or ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    name = triton_cache_format(kv_cache_dtype, kv_cache)
    write.reshape_and_cache_flash_diffkv(key, value, kv_cache, slot_mapping, name, k_scale, v_scale)


def triton_reshape_and_cache_flash_per_token_head_quant(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_quant_mode: Any,
) -> None:
    """The function of this name in vLLM: a scale for each token's head, into caches of int8 or fp8.

    vLLM reads what this writes, and torchkv what vLLM writes. The bytes are not the same: vLLM multiplies by the
    reciprocal of `max(absmax / m, 1e-6)` and rounds int8 halves away from zero; here elements are divided by
    `absmax / m`, rounded to nearest even.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        key_cache: `[num_blocks, block_size, num_heads, head_size]`, or with padding after each head's elements, which
            is left as it is.
        value_cache: `[num_blocks, block_size, num_heads, head_size_v]`, or padded in the same way.
        k_scale_cache: `[num_blocks, block_size, num_heads]` of float32; it may lie in key_cache's padding.
        v_scale_cache: `[num_blocks, block_size, num_heads]` of float32; it may lie in value_cache's padding.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_quant_mode: vLLM's enum (INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD), its number, or the name of a format
            (`int8_per_token_head`); None: as key_cache's dtype says.

    Raises:
        UnsupportedError: kv_quant_mode is another, such as int4, or tensors are on another device than a CPU, CUDA or
            ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    quantize.reshape_and_cache_flash_per_token_head_quant(
        key,
        value,
        key_cache[..., : key.shape[-1]],
        value_cache[..., : value.shape[-1]],
        k_scale_cache,
        v_scale_cache,
        slot_mapping,
        per_token_head_format(kv_quant_mode, key_cache),
    )


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    scale: Tensor,
    skip_scale: bool = False,
) -> None:
    """`vllm._custom_mla.concat_and_cache_mla`: `torchkv.concat_and_cache_mla` with vLLM's names of formats.

    Args:
        kv_c: `[num_tokens, kv_lora_rank]`.
        k_pe: `[num_tokens, qk_rope_head_dim]`; without columns for rows without a rotary part.
        kv_cache: `[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]`, or rows of 656 bytes for "fp8_ds_mla".
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format's name, vLLM's or torchkv's.
        scale: float32 of one element; not read with "fp8_ds_mla".
        skip_scale: Whether scale is not read, and counts as 1.

    Raises:
        UnsupportedError: kv_cache_dtype is a format that torchkv lacks, or tensors are on another device than a CPU,
            CUDA or ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    name = cache_format(kv_cache_dtype, kv_cache)
    mla.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, name, scale, skip_scale)
