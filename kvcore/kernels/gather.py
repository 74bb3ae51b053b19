"""Read keys and values of sequences out of a paged KV cache into contiguous arrays.

A program takes TOKENS positions of a sequence (axis 0 of the grid) and one stretch of their rows (axis 1), of K and V:

    position n = 0 … max_len - 1,   block = block_tables[seq, n // BLOCK_SIZE],   place = n % BLOCK_SIZE

`rows.py` says where the elements are; the token of the contiguous arrays is `seq * max_len + n`.
"""

import triton
import triton.language as tl

from .decode import decode, widen
from .encode import encode
from .rows import cache_offsets, columns, layer_index, token_offsets


@triton.jit
def _convert(x, scale_ptr, CACHE: tl.constexpr, OUT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """`round(float32(x) * scale)` as bits of OUT."""
    x = widen(decode(x, CACHE, HARDWARE_FP8))
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr)
    return encode(x, None, OUT, False)


@triton.jit
def gather_kv_kernel(
    key_cache_ptr,     # K's array
    value_cache_ptr,   # V's array
    block_tables_ptr,  # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,      # [num_seqs] int32 or int64
    k_scale_ptr,       # one float32, or None for 1
    v_scale_ptr,
    layer,             # one integer in memory (LAYER_IS_POINTER), an integer, or None
    max_len,           # positions of a sequence in key and value
    max_blocks,        # entries of a row of block_tables
    table_stride,      # elements from one row of block_tables to the next
    num_blocks,        # of one layer
    num_layers,
    key_ptr,           # [num_seqs, max_len, num_heads, head_size]
    value_ptr,         # [num_seqs, max_len, num_heads, head_size_v]
    K: tl.constexpr,             # kvcore.plan.Rows of key and key cache
    V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LENS_STRIDE: tl.constexpr,
    CACHE: tl.constexpr,         # kvcore.quantization.FloatFormat of the cache
    OUT: tl.constexpr,           # … of key and value, or None to copy bits
    HARDWARE_FP8: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Copies, or dequantises; zeros where a sequence has no position, or a position no block."""
    per_seq = (max_len + TOKENS - 1) // TOKENS
    seq = (tl.program_id(0) // per_seq).to(tl.int64)
    n = (tl.program_id(0) % per_seq) * TOKENS + tl.arange(0, TOKENS)
    seq_len = tl.load(seq_lens_ptr + seq * LENS_STRIDE)
    at_layer = layer_index(layer, LAYER_IS_POINTER)
    there = (n < seq_len) & (n < max_len) & (n < max_blocks * BLOCK_SIZE)
    if layer is not None:
        there = there & (at_layer >= 0) & (at_layer < num_layers)
    block = tl.load(block_tables_ptr + seq * table_stride + n // BLOCK_SIZE, mask=there, other=-1).to(tl.int64)
    there = there & (block >= 0) & (block < num_blocks)
    place = n % BLOCK_SIZE
    token = seq * max_len + n
    k_column, k_inside = columns(K)
    v_column, v_inside = columns(V)
    k_at = cache_offsets(at_layer, block, place, k_column, K)
    v_at = cache_offsets(at_layer, block, place, v_column, V)
    k = tl.load(key_cache_ptr + k_at, mask=there[:, None] & k_inside[None, :], other=0)
    v = tl.load(value_cache_ptr + v_at, mask=there[:, None] & v_inside[None, :], other=0)
    if OUT is not None:
        k = _convert(k, k_scale_ptr, CACHE, OUT, HARDWARE_FP8)
        v = _convert(v, v_scale_ptr, CACHE, OUT, HARDWARE_FP8)
        # Not even a scale of NaN gets into what is not there.
        k = tl.where(there[:, None], k, tl.full([1, 1], 0, k.dtype))
        v = tl.where(there[:, None], v, tl.full([1, 1], 0, v.dtype))
    keys = key_ptr.to(tl.pointer_type(k.dtype)) + token_offsets(token, k_column, K)
    values = value_ptr.to(tl.pointer_type(v.dtype)) + token_offsets(token, v_column, V)
    asked = n < max_len
    tl.store(keys, k, mask=asked[:, None] & k_inside[None, :])
    tl.store(values, v, mask=asked[:, None] & v_inside[None, :])
