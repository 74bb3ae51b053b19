"""Write keys and values of new tokens into a paged KV cache.

A program takes TOKENS tokens (axis 0 of the grid) and one stretch of their rows (axis 1), for K and for V:

    slot  = slot_mapping[token]          skipped unless 0 <= slot < num_slots
    block = slot // BLOCK_SIZE,   place = slot % BLOCK_SIZE

`rows.py` says where the elements are.
"""

import triton
import triton.language as tl

from .address import cache_offsets, columns, elements, layer_index, token_offsets
from .encode import encode, pack


@triton.jit
def _load(input_ptr, token, element, mask, R: tl.constexpr):
    # Lanes without an element get 1, not 0: dividing 0 takes the slow path of an exact division.
    return tl.load(input_ptr + token_offsets(token, element, R), mask=mask, other=1)


@triton.jit
def _store(cache_ptr, layer, block, place, column, x, mask, R: tl.constexpr):
    cache_ptr = cache_ptr.to(tl.pointer_type(x.dtype))  # encoded elements are integers
    tl.store(cache_ptr + cache_offsets(layer, block, place, column, R), x, mask=mask)


@triton.jit
def _write(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slot_mapping_ptr, k_scale_ptr, v_scale_ptr, layer,
    num_tokens, num_slots, num_layers,
    K: tl.constexpr, V: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOT_STRIDE: tl.constexpr, FORMAT: tl.constexpr,
    HARDWARE_FP8: tl.constexpr, LAYER_IS_POINTER: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What both kernels do; they differ in whether K and V have a cache each."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    given = token < num_tokens
    k_element, k_given = elements(K)
    v_element, v_given = elements(V)

    # No load waits for another: rows are read before it is known whether their slots are valid.
    slot = tl.load(slot_mapping_ptr + token * SLOT_STRIDE, mask=given, other=-1).to(tl.int64)
    k = _load(key_ptr, token, k_element, given[:, None] & k_given[None, :], K)
    v = _load(value_ptr, token, v_element, given[:, None] & v_given[None, :], V)
    k_scale, v_scale = k_scale_ptr, v_scale_ptr
    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr)
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr)

    written = (slot >= 0) & (slot < num_slots)
    at_layer = layer_index(layer, LAYER_IS_POINTER)
    if layer is not None:
        written = written & (at_layer >= 0) & (at_layer < num_layers)
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE

    if FORMAT is not None:
        k = pack(encode(k, k_scale, FORMAT, HARDWARE_FP8), TOKENS, K.columns * K.pack, FORMAT)
        v = pack(encode(v, v_scale, FORMAT, HARDWARE_FP8), TOKENS, V.columns * V.pack, FORMAT)
    k_column, k_inside = columns(K)
    v_column, v_inside = columns(V)
    _store(key_cache_ptr, at_layer, block, place, k_column, k, written[:, None] & k_inside[None, :], K)
    _store(value_cache_ptr, at_layer, block, place, v_column, v, written[:, None] & v_inside[None, :], V)


@triton.jit
def reshape_and_cache_kernel_flash(
    key_ptr,           # [num_tokens, num_heads, head_size]
    value_ptr,         # [num_tokens, num_heads, head_size_v]
    key_cache_ptr,     # K's array
    value_cache_ptr,   # V's array
    slot_mapping_ptr,  # [num_tokens] int32 or int64
    k_scale_ptr,       # one float32, or None for 1
    v_scale_ptr,
    layer,             # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,        # entries of slot_mapping
    num_slots,         # of one layer
    num_layers,
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and key cache
    V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,   # elements from one entry of slot_mapping to the next
    FORMAT: tl.constexpr,        # kvcore.formats.FloatFormat to convert to, or None to copy bits
    HARDWARE_FP8: tl.constexpr,  # whether the compiler's cast to fp8 is exact on the target
    LAYER_IS_POINTER: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write K and V into a cache each."""
    _write(
        key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slot_mapping_ptr, k_scale_ptr, v_scale_ptr, layer,
        num_tokens, num_slots, num_layers, K, V, BLOCK_SIZE, SLOT_STRIDE, FORMAT, HARDWARE_FP8,
        LAYER_IS_POINTER, TOKENS,
    )  # fmt: skip


@triton.jit
def reshape_and_cache_kernel_flash_diffkv(
    key_ptr,           # [num_tokens, num_heads, head_size]
    value_ptr,         # [num_tokens, num_heads, head_size_v]
    kv_cache_ptr,      # the array of both
    slot_mapping_ptr,  # [num_tokens] int32 or int64
    k_scale_ptr,       # one float32, or None for 1
    v_scale_ptr,
    layer,             # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,        # entries of slot_mapping
    num_slots,         # of one layer
    num_layers,
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and its part of the cache
    V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,   # elements from one entry of slot_mapping to the next
    FORMAT: tl.constexpr,        # kvcore.formats.FloatFormat to convert to, or None to copy bits
    HARDWARE_FP8: tl.constexpr,  # whether the compiler's cast to fp8 is exact on the target
    LAYER_IS_POINTER: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write K and V into one array, where their head sizes may differ."""
    _write(
        key_ptr, value_ptr, kv_cache_ptr, kv_cache_ptr, slot_mapping_ptr, k_scale_ptr, v_scale_ptr, layer,
        num_tokens, num_slots, num_layers, K, V, BLOCK_SIZE, SLOT_STRIDE, FORMAT, HARDWARE_FP8,
        LAYER_IS_POINTER, TOKENS,
    )  # fmt: skip
