"""Read keys and values of slots of a cache, and write them to slots of another one, whose format may be another.

A program takes TOKENS pairs of slots (axis 0 of the grid), HEADS heads (axis 1) and one layer (axis 2), of K and of V.
A *row* is a head of a slot, ROWS = TOKENS * HEADS of them:

    row r   pair r // HEADS,  head r % HEADS        of the program's

It is loaded and dequantised as `gather.py` does, and quantised and stored as `quantize.py` does: by the bits, it is as
if keys and values had been gathered, then written. Source and destination are different memory, so the order does not
matter. `address.py` says where everything is.
"""

import triton
import triton.language as tl

from .address import head_row_offsets
from .decode import decode, dequantise, unpack, widen
from .quantize import static_scales, store_rows
from .scales import spread


@triton.jit
def _units(cache_ptr, head, layer, block, place, exists, R: tl.constexpr, STORED: tl.constexpr):
    """Stored units of rows, `[ROWS, columns]`. Those that a head does not have are 1: to divide 0 takes longer."""
    ADDRESS: tl.constexpr = R.address
    unit = tl.arange(0, R.columns)
    in_head = unit < R.head_units
    if R.wide:
        unit = unit.to(tl.int64)
    if STORED is not None:
        cache_ptr = cache_ptr.to(tl.pointer_type(tl.uint8))
    offset = head_row_offsets(layer, block, place, head, unit, ADDRESS)
    return tl.load(cache_ptr + offset, mask=exists[:, None] & in_head[None, :], other=1)


@triton.jit
def _computed_scales(
    scales_ptr, head, layer, block, place, exists, R: tl.constexpr, S: tl.constexpr, HARDWARE: tl.constexpr
):
    """The computed scales of rows as float32, `[ROWS, groups]`."""
    ADDRESS: tl.constexpr = S.address
    FORMAT: tl.constexpr = S.format
    group = tl.arange(0, R.columns * R.elements_per_unit // S.group)
    in_head = group * S.group < R.head_units * R.elements_per_unit
    if R.wide:
        group = group.to(tl.int64)
    offset = head_row_offsets(layer, block, place, head, group, ADDRESS)
    mask = exists[:, None] & in_head[None, :]
    if FORMAT.bits == 8:
        scale = tl.load(scales_ptr.to(tl.pointer_type(tl.uint8)) + offset, mask=mask, other=0)
        scale = decode(scale, FORMAT, HARDWARE)
    else:
        scale = tl.load(scales_ptr.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0)
    return widen(scale)


@triton.jit
def _static_scales(scale_ptr, head, layer, R: tl.constexpr):
    """The static scales of rows, `[ROWS, 1]`, or the one of all; None for 1."""
    scale = scale_ptr
    if scale_ptr is not None:
        scale_ptr += layer * R.layer_scale_stride
        if R.scale_stride == 0:
            scale = tl.load(scale_ptr)
        else:
            scale = static_scales(scale_ptr, head, R)
    return scale


@triton.jit
def _elements(
    units, computed_scale, static_scale, R: tl.constexpr, S: tl.constexpr, STORED: tl.constexpr,
    HARDWARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Elements of rows, `[ROWS, elements]`: as they are, or dequantised, and which of them a head has."""
    WIDTH: tl.constexpr = R.columns * R.elements_per_unit
    x = units
    if STORED is not None:
        if S is not None:
            computed_scale = spread(computed_scale, ROWS, WIDTH, S.group)
        x = dequantise(unpack(x, ROWS, R.columns, STORED), computed_scale, static_scale, STORED, HARDWARE)
    in_head = tl.arange(0, WIDTH) < R.head_units * R.elements_per_unit
    return x, in_head[None, :]


@triton.jit
def requantise_kernel(
    key_cache_ptr,      # of the source: K's array, or the array of both
    value_cache_ptr,    # … V's array; None: key_cache_ptr
    k_scale_cache_ptr,  # … float32; None: there are none, or they lie in the cache
    v_scale_cache_ptr,  # … of V
    key_target_ptr,      # the same of the destination
    value_target_ptr,
    k_scale_target_ptr,
    v_scale_target_ptr,
    pairs_ptr,          # [n, 2] int32 or int64: slots of source and destination; None: each slot to its own number
    k_scale_ptr,        # static, of the source: one, one a head, or rows of such for all layers, float32; None for 1
    v_scale_ptr,        # … of V
    k_target_static_ptr,  # … of the destination
    v_target_static_ptr,
    n,                  # pairs
    num_slots,          # of the source
    num_target_slots,   # of the destination
    K: tl.constexpr,    # kvcore.plan.requantise.HeadRows of the source's K
    V: tl.constexpr,    # … of its V
    KS: tl.constexpr,   # kvcore.plan.rows.ScaleRows of k's computed scales, or None
    VS: tl.constexpr,   # … of v's
    TARGET_K: tl.constexpr,   # the same of the destination
    TARGET_V: tl.constexpr,
    TARGET_KS: tl.constexpr,
    TARGET_VS: tl.constexpr,
    STORED: tl.constexpr,     # kvcore.formats.FloatFormat of the source; None: floats, of which none is scaled
    FORMAT: tl.constexpr,     # … of the destination; None to copy bits
    HARDWARE: tl.constexpr,   # whether the target converts e4m3
    HARDWARE_CAST: tl.constexpr,    # … whether the compiler's cast to FORMAT is exact on it
    HARDWARE_SCALES: tl.constexpr,  # … to the format of the destination's computed scales
    BLOCK_SIZE: tl.constexpr,         # slots of a block of the source
    TARGET_BLOCK_SIZE: tl.constexpr,  # … of the destination
    PAIR_STEP: tl.constexpr,          # elements from one pair to the next
    COLUMN_STEP: tl.constexpr,        # … from source to destination
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,    # of a program, a power of two
    TOKENS: tl.constexpr,   # pairs of a program, a power of two
):  # fmt: skip
    """Read slots, write slots."""
    ROWS: tl.constexpr = TOKENS * HEADS
    row = tl.arange(0, ROWS)
    if TOKENS == 1:
        i = tl.full([1], tl.program_id(0), tl.int64)
    else:
        i = tl.program_id(0).to(tl.int64) * TOKENS + row // HEADS
    head = (tl.program_id(1) * HEADS + row % HEADS).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    exists = i < n
    if pairs_ptr is None:
        slot, target = i, i
    else:
        slot = tl.load(pairs_ptr + i * PAIR_STEP, mask=exists, other=-1).to(tl.int64)
        target = tl.load(pairs_ptr + i * PAIR_STEP + COLUMN_STEP, mask=exists, other=-1).to(tl.int64)
    exists = exists & (slot >= 0) & (slot < num_slots) & (target >= 0) & (target < num_target_slots)
    if NUM_HEADS % HEADS != 0:
        exists = exists & (head < NUM_HEADS)
        head = tl.minimum(head, NUM_HEADS - 1)  # static scales are read whether rows exist or not
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE

    # ---- all loads, then all stores: a load behind a store would wait until what is stored has come
    values_ptr = key_cache_ptr if value_cache_ptr is None else value_cache_ptr
    k = _units(key_cache_ptr, head, layer, block, place, exists, K, STORED)
    v = _units(values_ptr, head, layer, block, place, exists, V, STORED)
    k_computed, v_computed = None, None
    if KS is not None:
        k_scales_ptr = key_cache_ptr if KS.inside else k_scale_cache_ptr
        v_scales_ptr = values_ptr if VS.inside else v_scale_cache_ptr
        k_computed = _computed_scales(k_scales_ptr, head, layer, block, place, exists, K, KS, HARDWARE)
        v_computed = _computed_scales(v_scales_ptr, head, layer, block, place, exists, V, VS, HARDWARE)
    k_static = _static_scales(k_scale_ptr, head, layer, K)
    v_static = _static_scales(v_scale_ptr, head, layer, V)
    k_target_static = _static_scales(k_target_static_ptr, head, layer, TARGET_K)
    v_target_static = _static_scales(v_target_static_ptr, head, layer, TARGET_V)

    k, in_head = _elements(k, k_computed, k_static, K, KS, STORED, HARDWARE, ROWS)
    store_rows(
        k, in_head, key_target_ptr, k_scale_target_ptr, k_target_static, head, target, layer, exists,
        TARGET_K, TARGET_KS, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, TARGET_BLOCK_SIZE, ROWS,
    )  # fmt: skip
    v, in_head = _elements(v, v_computed, v_static, V, VS, STORED, HARDWARE, ROWS)
    store_rows(
        v, in_head, key_target_ptr if value_target_ptr is None else value_target_ptr, v_scale_target_ptr,
        v_target_static, head, target, layer, exists,
        TARGET_V, TARGET_VS, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, TARGET_BLOCK_SIZE, ROWS,
    )  # fmt: skip
