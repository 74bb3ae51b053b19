"""Read keys and values of sequences out of a paged KV cache into contiguous arrays.

A program takes TOKENS positions of a sequence (axis 0 of the grid) and one stretch of their token rows (axis 1), of K
and of V:

    position n = 0 … max_len - 1,   block = block_tables[seq, n // BLOCK_SIZE],   place = n % BLOCK_SIZE

`address.py` says where the elements are; the token of the contiguous arrays is `seq * max_len + n`. Positions past a
sequence's end, and those whose block does not exist, become zeros.

Without lengths, it is slots that are read, as one sequence: block = slot // BLOCK_SIZE, place = slot % BLOCK_SIZE.
"""

import triton
import triton.language as tl

from .address import (
    cache_offsets,
    columns,
    elements,
    in_layer,
    layer_index,
    scales_of_layer,
    slot_offset,
    token_offsets,
    unit_offset,
)
from .decode import decode, dequantise, widen
from .encode import encode


@triton.jit
def _computed_scales(scales_ptr, layer, block, place, column, mask, R: tl.constexpr, S: tl.constexpr,
                     HARDWARE: tl.constexpr):  # fmt: skip
    """The computed scale of each unit, `[TOKENS, columns]` float32."""
    ADDRESS: tl.constexpr = S.address
    FORMAT: tl.constexpr = S.format
    if R.wide:
        column = column.to(tl.int64)
    group = column % R.head_units // (S.group // R.elements_per_unit)
    within = (column // R.head_units) * ADDRESS.head + unit_offset(group, ADDRESS)
    offset = slot_offset(layer, block, place, ADDRESS)[:, None] + within[None, :]
    if FORMAT.bits == 8:
        scale = tl.load(scales_ptr.to(tl.pointer_type(tl.uint8)) + offset, mask=mask, other=0)
        scale = decode(scale, FORMAT, HARDWARE)
    else:
        scale = tl.load(scales_ptr.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0)
    return widen(scale)


@triton.jit
def _static_scales(scale_ptr, column, in_row, R: tl.constexpr):
    """The static scale of all heads, or of each unit's head, `[1, columns]`; None for 1."""
    scale = scale_ptr
    if scale_ptr is not None:
        if R.scale_stride == 0:
            scale = tl.load(scale_ptr)
        else:
            scale = tl.load(scale_ptr + (column // R.head_units) * R.scale_stride, mask=in_row, other=1)[None, :]
    return scale


@triton.jit
def _gather(
    cache_ptr, scale_ptr, array_ptr, layer, block, place, token, exists, in_array,
    R: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr, OUT: tl.constexpr, HARDWARE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Gathers K, or V: copies, or `round(float32(x) * scale)`.

    `block`, `place`, `token` and the masks `exists` and `in_array` are `[TOKENS]`, `layer` is `[1]`.
    """
    column, in_row = columns(R)
    mask = exists[:, None] & in_row[None, :]
    x = tl.load(cache_ptr + cache_offsets(layer, block, place, column, R), mask=mask, other=0)
    element, element_in_row = elements(R)
    if OUT is not None:
        computed_scale = None
        if S is not None:
            scales_ptr = cache_ptr if S.inside else scale_ptr
            computed_scale = _computed_scales(scales_ptr, layer, block, place, column, mask, R, S, HARDWARE)
        static_scale = None
        if S is None or S.inside:
            static_scale = _static_scales(scale_ptr, column, in_row, R)
        if R.elements_per_unit == 2:
            low = dequantise(x, computed_scale, static_scale, FORMAT, HARDWARE)
            high = dequantise(x >> 4, computed_scale, static_scale, FORMAT, HARDWARE)
            x = tl.reshape(tl.join(low, high), [TOKENS, R.columns * 2])
        else:
            x = dequantise(x, computed_scale, static_scale, FORMAT, HARDWARE)
        x = encode(x, None, OUT, False)
        # Where nothing exists, the load gave zeros, but a scale that is NaN has turned them into NaN.
        x = tl.where(exists[:, None], x, tl.full([1, 1], 0, x.dtype))
    array = array_ptr.to(tl.pointer_type(x.dtype)) + token_offsets(token, element, R)
    tl.store(array, x, mask=in_array[:, None] & element_in_row[None, :])


@triton.jit
def gather_kv_kernel(
    key_cache_ptr,     # K's array
    value_cache_ptr,   # V's array
    block_tables_ptr,  # [num_seqs, max_blocks] int32 or int64; of slots [1, max_len]
    seq_lens_ptr,      # [num_seqs] int32 or int64; None: block_tables has slots
    k_scale_ptr,       # float32: one, one a head, rows of such for all layers, or one a token and head (KS); None for 1
    v_scale_ptr,       # … of V (VS)
    layer,             # one integer in memory (LAYER_IS_POINTER), an integer, or None
    max_len,           # positions of a sequence in key and value
    max_blocks,        # entries of a row of block_tables
    table_stride,      # elements from one row of block_tables to the next
    num_blocks,        # of one layer
    num_layers,        # 1 where the cache has no axis layer
    key_ptr,           # [num_seqs, max_len, num_heads, head_size]
    value_ptr,         # [num_seqs, max_len, num_heads, head_size_v]
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and key cache
    V: tl.constexpr,             # … of value and value cache
    KS: tl.constexpr,            # kvcore.plan.rows.ScaleRows of k's computed scales, or None
    VS: tl.constexpr,            # … of v's
    ROPE: tl.constexpr,          # kvcore.plan.rows.Rows of the rotary part of fp8_ds_mla, in bfloat16, or None
    BLOCK_SIZE: tl.constexpr,    # slots of a block
    TABLE_STEP: tl.constexpr,    # elements from one entry of a row of block_tables to the next
    LENS_STRIDE: tl.constexpr,   # … of seq_lens
    CACHE: tl.constexpr,         # kvcore.formats.FloatFormat of the cache
    OUT: tl.constexpr,           # … of key and value, or None to copy bits
    HARDWARE: tl.constexpr,      # whether the target converts e4m3
    LAYER_IS_POINTER: tl.constexpr,
    TOKENS: tl.constexpr,        # positions of a program
):  # fmt: skip
    """Copy K and V of positions, or dequantise them."""
    programs_per_seq = (max_len + TOKENS - 1) // TOKENS
    seq = (tl.program_id(0) // programs_per_seq).to(tl.int64)
    n = (tl.program_id(0) % programs_per_seq) * TOKENS + tl.arange(0, TOKENS)
    index = layer_index(layer, LAYER_IS_POINTER)
    if seq_lens_ptr is None:
        exists = in_layer(n < max_len, layer, index, num_layers)
        slot = tl.load(block_tables_ptr + n.to(tl.int64) * TABLE_STEP, mask=exists, other=-1).to(tl.int64)
        exists = exists & (slot >= 0)
        block, place = slot // BLOCK_SIZE, (slot % BLOCK_SIZE).to(tl.int32)
    else:
        seq_len = tl.load(seq_lens_ptr + seq * LENS_STRIDE)
        exists = (n < seq_len) & (n < max_len) & (n < max_blocks * BLOCK_SIZE)
        exists = in_layer(exists, layer, index, num_layers)
        entry = seq * table_stride + (n // BLOCK_SIZE).to(tl.int64) * TABLE_STEP
        block = tl.load(block_tables_ptr + entry, mask=exists, other=-1).to(tl.int64)
        place = n % BLOCK_SIZE
    exists = exists & (block >= 0) & (block < num_blocks)
    if k_scale_ptr is not None:
        k_scale_ptr = scales_of_layer(k_scale_ptr, layer, num_layers, LAYER_IS_POINTER, K.layer_scale_stride)
    if v_scale_ptr is not None:
        v_scale_ptr = scales_of_layer(v_scale_ptr, layer, num_layers, LAYER_IS_POINTER, V.layer_scale_stride)
    token = seq * max_len + n
    in_array = n < max_len
    _gather(
        key_cache_ptr, k_scale_ptr, key_ptr, index, block, place, token, exists, in_array,
        K, KS, CACHE, OUT, HARDWARE, TOKENS,
    )  # fmt: skip
    _gather(
        value_cache_ptr, v_scale_ptr, value_ptr, index, block, place, token, exists, in_array,
        V, VS, CACHE, OUT, HARDWARE, TOKENS,
    )  # fmt: skip
    if ROPE is not None:
        rope_ptr = key_cache_ptr.to(tl.pointer_type(tl.bfloat16))
        _gather(
            rope_ptr, None, key_ptr + K.head_units, index, block, place, token, exists, in_array,
            ROPE, None, OUT, OUT, HARDWARE, TOKENS,
        )  # fmt: skip
