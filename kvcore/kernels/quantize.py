"""Write keys and values of new tokens into a paged KV cache, head by head: with scales of their own, in one pass.

A program takes ROWS heads of tokens (axis 0 of the grid), of K and of V:

    row = token * num_heads + head
    slot  = slot_mapping[token]          skipped unless 0 <= slot < num_slots
    block = slot // BLOCK_SIZE,   place = slot % BLOCK_SIZE

`encode.py` computes scales, `rows.py` says where the elements are. Scales lie in arrays of their own, or in the cache's
memory. Static scales, one a head, belong here, too.
"""

import triton
import triton.language as tl

from .address import dim_offset, layer_index, slot_offset
from .decode import widen
from .encode import block_scales, encode, pack, power_scales, row_scales, spread


@triton.jit
def _write(
    input_ptr, cache_ptr, scale_cache_ptr, scale_ptr, row, slot, layer, given, written,
    R: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr, SCALE_FORMAT: tl.constexpr, HARDWARE_FP8: tl.constexpr,
    HARDWARE_SCALES: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = R.columns * R.pack
    token = row // R.num_heads
    head = (row % R.num_heads).to(tl.int64)
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE
    element = tl.arange(0, WIDTH)
    inside = element < R.head_size * R.pack
    at = token * R.token_stride + head * R.input_head_stride
    # Lanes without an element get 1, not 0: dividing 0 takes the slow path of an exact division.
    x = tl.load(
        input_ptr + at[:, None] + (element * R.input_dim_stride)[None, :],
        mask=given[:, None] & inside[None, :],
        other=1,
    )
    if S is not None:
        x = widen(x)
        GROUPS: tl.constexpr = WIDTH // S.group
        if S.bits == 8:  # nvfp4
            whole = tl.full([ROWS, 1], 1.0, tl.float32)
            if scale_ptr is not None:
                whole = tl.load(scale_ptr + head[:, None] * R.scale_stride)
            scale, factor = block_scales(
                x, inside[None, :], whole, SCALE_FORMAT, HARDWARE_SCALES, S.largest, ROWS, WIDTH, S.group
            )
            bits = encode(x * spread(factor, ROWS, WIDTH, S.group), None, FORMAT, HARDWARE_FP8)
        else:
            if S.power_of_two:  # fp8_ds_mla
                scale = power_scales(x, inside[None, :], S.largest, S.least, ROWS, WIDTH, S.group)
            else:
                scale = row_scales(x, inside[None, :], S.largest, S.least, ROWS, WIDTH, S.group)
            bits = encode(x, spread(scale, ROWS, WIDTH, S.group), FORMAT, HARDWARE_FP8)
        scales_ptr = cache_ptr
        if scale_cache_ptr is not None:
            scales_ptr = scale_cache_ptr
        scales_ptr = scales_ptr.to(tl.pointer_type(scale.dtype))
        group = tl.arange(0, GROUPS)
        at = slot_offset(layer, block, place, S) + head * S.head_stride
        tl.store(
            scales_ptr + at[:, None] + dim_offset(group, S)[None, :],
            scale,
            mask=written[:, None] & (group * S.group < R.head_size * R.pack)[None, :],
        )
        x = bits
    elif FORMAT is not None:
        scale = scale_ptr
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + head[:, None] * R.scale_stride)
        x = encode(x, scale, FORMAT, HARDWARE_FP8 and FORMAT.bits == 8)
    x = pack(x, ROWS, WIDTH, FORMAT)
    column = tl.arange(0, R.columns)
    at = slot_offset(layer, block, place, R) + head * R.head_stride
    tl.store(
        cache_ptr.to(tl.pointer_type(x.dtype)) + at[:, None] + dim_offset(column, R)[None, :],
        x,
        mask=written[:, None] & (column < R.head_size)[None, :],
    )


@triton.jit
def quantize_and_cache_kernel(
    key_ptr,            # [num_tokens, num_heads, head_size]
    value_ptr,          # [num_tokens, num_heads, head_size_v]
    key_cache_ptr,      # K's array, or the array of both
    value_cache_ptr,    # V's array; None: key_cache_ptr
    k_scale_cache_ptr,  # float32; None: the scales lie in the cache
    v_scale_cache_ptr,
    slot_mapping_ptr,   # [num_tokens] int32 or int64
    k_scale_ptr,        # one float32, or one a head, or None for 1: static; nvfp4 has it beside the scales of blocks
    v_scale_ptr,
    layer,              # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,         # entries of slot_mapping
    num_slots,          # of one layer
    num_layers,
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and key cache; columns cover a head
    V: tl.constexpr,
    KS: tl.constexpr,            # kvcore.plan.rows.ScaleRows of k's computed scales, or None
    VS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,   # elements from one entry of slot_mapping to the next
    FORMAT: tl.constexpr,        # kvcore.formats.FloatFormat of the elements
    FORMAT_V: tl.constexpr,      # … of value's; None: copied
    SCALE_FORMAT: tl.constexpr,  # … of nvfp4's scales
    HARDWARE_FP8: tl.constexpr,  # whether the compiler's cast to fp8 is exact on the target
    HARDWARE_SCALES: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Quantise each row, and write it and its scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // K.num_heads
    given = token < num_tokens
    slot = tl.load(slot_mapping_ptr + token * SLOT_STRIDE, mask=given, other=-1).to(tl.int64)
    written = (slot >= 0) & (slot < num_slots)
    at_layer = layer_index(layer, LAYER_IS_POINTER)
    if layer is not None:
        written = written & (at_layer >= 0) & (at_layer < num_layers)
    _write(
        key_ptr, key_cache_ptr, k_scale_cache_ptr, k_scale_ptr, row, slot, at_layer, given, written,
        K, KS, FORMAT, SCALE_FORMAT, HARDWARE_FP8, HARDWARE_SCALES, BLOCK_SIZE, ROWS,
    )  # fmt: skip
    _write(
        value_ptr, key_cache_ptr if value_cache_ptr is None else value_cache_ptr, v_scale_cache_ptr, v_scale_ptr,
        row, slot, at_layer, given, written,
        V, VS, FORMAT_V, SCALE_FORMAT, HARDWARE_FP8, HARDWARE_SCALES, BLOCK_SIZE, ROWS,
    )  # fmt: skip
