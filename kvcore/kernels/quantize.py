"""Write keys and values of new tokens into a paged KV cache where each head has a scale of its own.

A program takes ROWS heads of tokens (axis 0 of the grid), of K and of V; a *row* is here a head of a token:

    row   = token * num_heads + head
    slot  = slot_mapping[token]          skipped unless 0 <= slot < num_slots
    block = slot // BLOCK_SIZE,   place = slot % BLOCK_SIZE

Scales are static, one for each head, or computed for each group of elements, as `scales.py` says. Computed ones are
stored in scale caches, or in the cache's memory. `address.py` says where everything is.

`head` is `[ROWS]`; so are `token`, `slot`, `block`, `place` and the masks `in_batch` and `written`, or `[1]` where all
rows are of one token; `layer` is `[1]`.
"""

import triton
import triton.language as tl

from .address import head_offset, head_row_offsets, in_layer, layer_index, scales_of_layer
from .decode import widen
from .encode import encode, pack
from .scales import encoded_scales, float_scales, power_scales, spread


@triton.jit
def find_rows(program, R: tl.constexpr, ROWS: tl.constexpr):
    """The tokens, `[ROWS]`, or `[1]` where it is one for all, and the heads, `[ROWS]`, of a program's rows; 64 bits."""
    PROGRAMS: tl.constexpr = R.num_heads // ROWS  # of a token
    if R.num_heads == PROGRAMS * ROWS:
        token = tl.full([1], program // PROGRAMS, tl.int64)
        head = (program % PROGRAMS * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    else:
        first = program.to(tl.int64) * ROWS
        token = first // R.num_heads  # of the first; to divide all rows in 64 bits takes longer than to load them
        row = (first - token * R.num_heads).to(tl.int32) + tl.arange(0, ROWS)
        token, head = token + row // R.num_heads, row % R.num_heads
    return token, head.to(tl.int64)


@triton.jit
def row_offsets(token, head, R: tl.constexpr):
    """Where rows begin in an array of tokens, `[ROWS]`."""
    return R.offset + token * R.token_stride + head_offset(head, R)


@triton.jit
def load_rows(array_ptr, token, head, in_batch, R: tl.constexpr):
    """Elements of rows, `[ROWS, elements]`, and which of them a head has, `[1, elements]`.

    Those that a head does not have are 1, not 0: to divide 0 takes the slow path of an exact division.
    """
    element = tl.arange(0, R.columns * R.elements_per_unit)
    in_head = element < R.head_units * R.elements_per_unit
    if R.wide:
        element = element.to(tl.int64)
    x = tl.load(
        array_ptr + row_offsets(token, head, R)[:, None] + (element * R.dim_stride)[None, :],
        mask=in_batch[:, None] & in_head[None, :],
        other=1,
    )
    return x, in_head[None, :]


@triton.jit
def _quantise(
    x, in_head, static_scale, S: tl.constexpr, FORMAT: tl.constexpr, HARDWARE_CAST: tl.constexpr,
    HARDWARE_SCALES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Encoded elements of rows, `[ROWS, WIDTH]`, and their computed scales as stored, `[ROWS, WIDTH // group]`."""
    x = widen(x)
    SCALE_FORMAT: tl.constexpr = S.format
    if SCALE_FORMAT.bits == 8:  # nvfp4
        row_scale = static_scale
        if static_scale is None:
            row_scale = tl.full([ROWS, 1], 1.0, tl.float32)
        scale, factor = encoded_scales(
            x, in_head, row_scale, SCALE_FORMAT, HARDWARE_SCALES, S.largest, ROWS, WIDTH, S.group
        )
        bits = encode(x * spread(factor, ROWS, WIDTH, S.group), None, FORMAT, HARDWARE_CAST)
    else:
        if S.power_of_two:  # fp8_ds_mla
            scale = power_scales(x, in_head, S.largest, S.least, ROWS, WIDTH, S.group)
        else:
            scale = float_scales(x, in_head, S.largest, S.least, ROWS, WIDTH, S.group)
        bits = encode(x, spread(scale, ROWS, WIDTH, S.group), FORMAT, HARDWARE_CAST)
    return bits, scale


@triton.jit
def _store_scales(
    scales_ptr, scale, head, layer, block, place, written, R: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr
):
    """Stores the computed scales of rows, `[ROWS, WIDTH // group]`."""
    ADDRESS: tl.constexpr = S.address
    group = tl.arange(0, WIDTH // S.group)
    in_head = group * S.group < R.head_units * R.elements_per_unit
    if R.wide:
        group = group.to(tl.int64)
    tl.store(
        scales_ptr.to(tl.pointer_type(scale.dtype)) + head_row_offsets(layer, block, place, head, group, ADDRESS),
        scale,
        mask=written[:, None] & in_head[None, :],
    )


@triton.jit
def store_units(cache_ptr, x, head, layer, block, place, written, R: tl.constexpr):
    """Stores units of rows, `[ROWS, columns]`."""
    ADDRESS: tl.constexpr = R.address
    unit = tl.arange(0, R.columns)
    if R.wide:
        unit = unit.to(tl.int64)
    tl.store(
        cache_ptr.to(tl.pointer_type(x.dtype)) + head_row_offsets(layer, block, place, head, unit, ADDRESS),
        x,
        mask=written[:, None] & (unit < R.head_units)[None, :],
    )


@triton.jit
def static_scales(scale_ptr, head, R: tl.constexpr):
    """The static scales of rows, `[ROWS, 1]`; None for 1."""
    scale = scale_ptr
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + head[:, None] * R.scale_stride)
    return scale


@triton.jit
def store_rows(
    x, in_head, cache_ptr, scale_cache_ptr, static_scale, head, slot, layer, written,
    R: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr, HARDWARE_CAST: tl.constexpr,
    HARDWARE_SCALES: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores rows of K, or of V, `[ROWS, elements]`: quantised by scales that S computes, encoded, or as they are."""
    WIDTH: tl.constexpr = R.columns * R.elements_per_unit
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE
    if S is not None:
        x, scale = _quantise(x, in_head, static_scale, S, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, ROWS, WIDTH)
        scales_ptr = cache_ptr if S.inside else scale_cache_ptr
        _store_scales(scales_ptr, scale, head, layer, block, place, written, R, S, WIDTH)
    elif FORMAT is not None:
        x = encode(x, static_scale, FORMAT, HARDWARE_CAST)
    store_units(cache_ptr, pack(x, ROWS, WIDTH, FORMAT), head, layer, block, place, written, R)


@triton.jit
def write_rows(
    array_ptr, cache_ptr, scale_cache_ptr, scale_ptr, token, head, slot, layer, in_batch, written,
    R: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr, HARDWARE_CAST: tl.constexpr,
    HARDWARE_SCALES: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes rows of K, or of V, out of an array of tokens."""
    x, in_head = load_rows(array_ptr, token, head, in_batch, R)
    static_scale = static_scales(scale_ptr, head, R)
    store_rows(
        x, in_head, cache_ptr, scale_cache_ptr, static_scale, head, slot, layer, written,
        R, S, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, BLOCK_SIZE, ROWS,
    )  # fmt: skip


@triton.jit
def quantize_and_cache_kernel(
    key_ptr,            # [num_tokens, num_heads, head_size]
    value_ptr,          # [num_tokens, num_heads, head_size_v]
    key_cache_ptr,      # K's array, or the array of both
    value_cache_ptr,    # V's array; None: key_cache_ptr
    k_scale_cache_ptr,  # float32; None: the scales lie in the cache
    v_scale_cache_ptr,  # … of V
    slot_mapping_ptr,   # [num_tokens] int32 or int64
    k_scale_ptr,        # static float32: one, one a head, or rows of such for all layers; None for 1. Also of nvfp4
    v_scale_ptr,        # … of V
    layer,              # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,         # entries of slot_mapping
    num_slots,          # of one layer
    num_layers,         # 1 where the cache has no axis layer
    K: tl.constexpr,             # kvcore.plan.rows.Rows of key and key cache; columns cover a head
    V: tl.constexpr,             # … of value and value cache
    KS: tl.constexpr,            # kvcore.plan.rows.ScaleRows of k's computed scales, or None
    VS: tl.constexpr,            # … of v's
    BLOCK_SIZE: tl.constexpr,    # slots of a block
    SLOT_STRIDE: tl.constexpr,   # elements from one entry of slot_mapping to the next
    FORMAT: tl.constexpr,        # kvcore.formats.FloatFormat of the elements
    FORMAT_V: tl.constexpr,      # … of value's; None: copied
    HARDWARE_CAST: tl.constexpr,  # whether the compiler's cast to FORMAT is exact on the target
    HARDWARE_SCALES: tl.constexpr,  # … to the format of computed scales
    LAYER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,          # rows of a program
):  # fmt: skip
    """Quantise each row, and write it and its scales."""
    token, head = find_rows(tl.program_id(0), K, ROWS)
    in_batch = token < num_tokens
    slot = tl.load(slot_mapping_ptr + token * SLOT_STRIDE, mask=in_batch, other=-1).to(tl.int64)
    written = (slot >= 0) & (slot < num_slots)
    index = layer_index(layer, LAYER_IS_POINTER)
    written = in_layer(written, layer, index, num_layers)
    if k_scale_ptr is not None:
        k_scale_ptr = scales_of_layer(k_scale_ptr, layer, num_layers, LAYER_IS_POINTER, K.layer_scale_stride)
    if v_scale_ptr is not None:
        v_scale_ptr = scales_of_layer(v_scale_ptr, layer, num_layers, LAYER_IS_POINTER, V.layer_scale_stride)
    write_rows(
        key_ptr, key_cache_ptr, k_scale_cache_ptr, k_scale_ptr, token, head, slot, index, in_batch, written,
        K, KS, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, BLOCK_SIZE, ROWS,
    )  # fmt: skip
    write_rows(
        value_ptr, key_cache_ptr if value_cache_ptr is None else value_cache_ptr, v_scale_cache_ptr, v_scale_ptr,
        token, head, slot, index, in_batch, written,
        V, VS, FORMAT_V, HARDWARE_CAST, HARDWARE_SCALES, BLOCK_SIZE, ROWS,
    )  # fmt: skip
