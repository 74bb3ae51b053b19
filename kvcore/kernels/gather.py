"""Read keys and values of sequences out of a paged KV cache into contiguous arrays.

A program takes TOKENS positions of a sequence (axis 0 of the grid) and one stretch of their rows (axis 1), of K and V:

    position n = 0 … max_len - 1,   block = block_tables[seq, n // BLOCK_SIZE],   place = n % BLOCK_SIZE

`rows.py` says where the elements are; the token of the contiguous arrays is `seq * max_len + n`.
"""

import triton
import triton.language as tl

from .address import (
    cache_offsets,
    columns,
    dim_offset,
    elements,
    head_scale,
    layer_index,
    slot_offset,
    token_offsets,
)
from .decode import decode, widen
from .encode import encode


@triton.jit
def _own_scales(scales_ptr, layer, block, place, column, mask, R: tl.constexpr, S: tl.constexpr,
                HARDWARE: tl.constexpr):  # fmt: skip
    """The computed scales of units, `[TOKENS, columns]` float32."""
    unit = column % R.head_size
    within = (column // R.head_size) * S.head_stride + dim_offset(unit // (S.group // R.pack), S)
    at = slot_offset(layer, block, place, S)[:, None] + within[None, :]
    if S.bits == 8:
        scale = decode(tl.load(scales_ptr.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0), S, HARDWARE)
    else:
        scale = tl.load(scales_ptr.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0)
    return widen(scale)


@triton.jit
def _dequantise(x, own, scale, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    x = widen(decode(x, FORMAT, HARDWARE))
    if own is not None:
        x = x * own
    if scale is not None:
        x = x * scale
    return x


@triton.jit
def _read(
    cache_ptr, scale_ptr, out_ptr, layer, block, place, token, there, asked,
    R: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr, OUT: tl.constexpr, HARDWARE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Reads K, or V: copies, or `round(float32(x) * scale)`."""
    column, inside = columns(R)
    mask = there[:, None] & inside[None, :]
    x = tl.load(cache_ptr + cache_offsets(layer, block, place, column, R), mask=mask, other=0)
    element, given = elements(R)
    if OUT is not None:
        own = None
        if S is not None:
            if S.inside:
                own = _own_scales(cache_ptr, layer, block, place, column, mask, R, S, HARDWARE)
            else:
                own = _own_scales(scale_ptr, layer, block, place, column, mask, R, S, HARDWARE)
        scale = None
        if S is None or S.inside:
            scale = head_scale(scale_ptr, column * R.pack, inside, R)
        if R.pack == 2:
            low = _dequantise(x, own, scale, FORMAT, HARDWARE)
            high = _dequantise(x >> 4, own, scale, FORMAT, HARDWARE)
            x = tl.reshape(tl.join(low, high), [TOKENS, R.columns * 2])
        else:
            x = _dequantise(x, own, scale, FORMAT, HARDWARE)
        x = encode(x, None, OUT, False)
        # Not even a scale of NaN gets into what is not there.
        x = tl.where(there[:, None], x, tl.full([1, 1], 0, x.dtype))
    out = out_ptr.to(tl.pointer_type(x.dtype)) + token_offsets(token, element, R)
    tl.store(out, x, mask=asked[:, None] & given[None, :])


@triton.jit
def gather_kv_kernel(
    key_cache_ptr,     # K's array
    value_cache_ptr,   # V's array
    block_tables_ptr,  # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,      # [num_seqs] int32 or int64
    k_scale_ptr,       # one float32, or one a head, or one a token and head (KS), or None for 1
    v_scale_ptr,
    layer,             # one integer in memory (LAYER_IS_POINTER), an integer, or None
    max_len,           # positions of a sequence in key and value
    max_blocks,        # entries of a row of block_tables
    table_stride,      # elements from one row of block_tables to the next
    num_blocks,        # of one layer
    num_layers,
    key_ptr,           # [num_seqs, max_len, num_heads, head_size]
    value_ptr,         # [num_seqs, max_len, num_heads, head_size_v]
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and key cache
    V: tl.constexpr,
    KS: tl.constexpr,            # kvcore.plan.rows.ScaleRows of computed scales, or None
    VS: tl.constexpr,
    ROPE: tl.constexpr,          # kvcore.plan.rows.Rows of the part of fp8_ds_mla in bfloat16, or None
    BLOCK_SIZE: tl.constexpr,
    TABLE_STEP: tl.constexpr,    # elements from one entry of a row of block_tables to the next
    LENS_STRIDE: tl.constexpr,
    CACHE: tl.constexpr,         # kvcore.formats.FloatFormat of the cache
    OUT: tl.constexpr,           # … of key and value, or None to copy bits
    HARDWARE: tl.constexpr,      # whether the target converts e4m3
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
    entry = seq * table_stride + (n // BLOCK_SIZE).to(tl.int64) * TABLE_STEP
    block = tl.load(block_tables_ptr + entry, mask=there, other=-1).to(tl.int64)
    there = there & (block >= 0) & (block < num_blocks)
    place = n % BLOCK_SIZE
    token = seq * max_len + n
    asked = n < max_len
    _read(
        key_cache_ptr, k_scale_ptr, key_ptr, at_layer, block, place, token, there, asked,
        K, KS, CACHE, OUT, HARDWARE, TOKENS,
    )  # fmt: skip
    _read(
        value_cache_ptr, v_scale_ptr, value_ptr, at_layer, block, place, token, there, asked,
        V, VS, CACHE, OUT, HARDWARE, TOKENS,
    )  # fmt: skip
    if ROPE is not None:
        rope_ptr = key_cache_ptr.to(tl.pointer_type(tl.bfloat16))
        _read(
            rope_ptr, None, key_ptr + K.head_size, at_layer, block, place, token, there, asked,
            ROPE, None, OUT, OUT, HARDWARE, TOKENS,
        )  # fmt: skip
