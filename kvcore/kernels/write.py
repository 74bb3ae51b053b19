"""Write keys and values of new tokens into a paged KV cache.

A program takes TOKENS tokens (axis 0 of the grid) and one stretch of their token rows (axis 1), of K and of V:

    slot  = slot_mapping[token]          skipped unless 0 <= slot < num_slots
    block = slot // BLOCK_SIZE,   place = slot % BLOCK_SIZE

`address.py` says where the elements are.
"""

import triton
import triton.language as tl

from .address import cache_offsets, columns, elements, in_layer, layer_index, scales_of_layer, token_offsets
from .encode import encode, pack


@triton.jit
def _load(array_ptr, token, element, mask, R: tl.constexpr):
    """Elements of token rows, `[TOKENS, elements]`.

    Where the mask is False they are 1, not 0: to divide 0 takes the slow path of an exact division.
    """
    return tl.load(array_ptr + token_offsets(token, element, R), mask=mask, other=1)


@triton.jit
def _store(cache_ptr, x, layer, block, place, column, mask, R: tl.constexpr):
    """Stores units of token rows, `[TOKENS, columns]`."""
    cache_ptr = cache_ptr.to(tl.pointer_type(x.dtype))  # encoded elements are integers
    tl.store(cache_ptr + cache_offsets(layer, block, place, column, R), x, mask=mask)


@triton.jit
def reshape_and_cache_kernel_flash(
    key_ptr,           # [num_tokens, num_heads, head_size]
    value_ptr,         # [num_tokens, num_heads, head_size_v]
    key_cache_ptr,     # K's array
    value_cache_ptr,   # V's array
    slot_mapping_ptr,  # [num_tokens] int32 or int64
    k_scale_ptr,       # float32: one, or one a layer; None for 1
    v_scale_ptr,       # … of V
    layer,             # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,        # entries of slot_mapping
    num_slots,         # of one layer
    num_layers,        # 1 where the cache has no axis layer
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and key cache
    V: tl.constexpr,             # … of value and value cache
    BLOCK_SIZE: tl.constexpr,    # slots of a block
    SLOT_STRIDE: tl.constexpr,   # elements from one entry of slot_mapping to the next
    FORMAT: tl.constexpr,        # kvcore.formats.FloatFormat to convert to, or None to copy bits
    HARDWARE_CAST: tl.constexpr,  # whether the compiler's cast to FORMAT is exact on the target
    LAYER_IS_POINTER: tl.constexpr,
    TOKENS: tl.constexpr,        # tokens of a program
):  # fmt: skip
    """Write K and V into an array each."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    in_batch = token < num_tokens
    k_element, k_in_row = elements(K)
    v_element, v_in_row = elements(V)

    # ---- loads: k and v are [TOKENS, elements]. None waits for another: token rows are read before it is known whether
    # their slots are valid.
    slot = tl.load(slot_mapping_ptr + token * SLOT_STRIDE, mask=in_batch, other=-1).to(tl.int64)
    k = _load(key_ptr, token, k_element, in_batch[:, None] & k_in_row[None, :], K)
    v = _load(value_ptr, token, v_element, in_batch[:, None] & v_in_row[None, :], V)
    k_scale, v_scale = k_scale_ptr, v_scale_ptr
    if k_scale_ptr is not None:
        k_scale = tl.load(scales_of_layer(k_scale_ptr, layer, num_layers, LAYER_IS_POINTER, K.layer_scale_stride))
    if v_scale_ptr is not None:
        v_scale = tl.load(scales_of_layer(v_scale_ptr, layer, num_layers, LAYER_IS_POINTER, V.layer_scale_stride))

    # ---- where tokens go: written, block and place are [TOKENS]
    written = (slot >= 0) & (slot < num_slots)
    index = layer_index(layer, LAYER_IS_POINTER)
    written = in_layer(written, layer, index, num_layers)
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE

    # ---- stored units: k and v become [TOKENS, columns]
    if FORMAT is not None:
        k = pack(encode(k, k_scale, FORMAT, HARDWARE_CAST), TOKENS, K.columns * K.elements_per_unit, FORMAT)
        v = pack(encode(v, v_scale, FORMAT, HARDWARE_CAST), TOKENS, V.columns * V.elements_per_unit, FORMAT)
    k_column, k_in_row = columns(K)
    v_column, v_in_row = columns(V)
    _store(key_cache_ptr, k, index, block, place, k_column, written[:, None] & k_in_row[None, :], K)
    _store(value_cache_ptr, v, index, block, place, v_column, written[:, None] & v_in_row[None, :], V)


@triton.jit
def reshape_and_cache_kernel_flash_diffkv(
    key_ptr,
    value_ptr,
    kv_cache_ptr,  # the array of both; all else is what it is to reshape_and_cache_kernel_flash
    slot_mapping_ptr,
    k_scale_ptr,
    v_scale_ptr,
    layer,
    num_tokens,
    num_slots,
    num_layers,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write K and V into one array, where their head sizes may differ."""
    reshape_and_cache_kernel_flash(
        key_ptr, value_ptr, kv_cache_ptr, kv_cache_ptr, slot_mapping_ptr, k_scale_ptr, v_scale_ptr, layer,
        num_tokens, num_slots, num_layers,
        K, V, BLOCK_SIZE, SLOT_STRIDE, FORMAT, HARDWARE_CAST, LAYER_IS_POINTER, TOKENS,
    )  # fmt: skip
