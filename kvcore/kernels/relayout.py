"""Copy slots of a cache to slots of another one, whose layout and whose blocks' size may be others.

A program takes TOKENS pairs of slots (axis 0 of the grid), one stretch of their units (axis 1), and one layer (axis 2):
first of K, then of V, and of their scales. `address.py` says where they are, in either cache. Source and destination
are different memory, so the order does not matter.

Each run of units is a kvcore.plan.relayout.UnitRun; its units are integers here, whatever they mean.
"""

import triton
import triton.language as tl

from .address import slot_offset, unit_offset


@triton.jit
def _units(array_ptr, RUN: tl.constexpr):
    """The array as integers."""
    if RUN.bits == 32:
        units = array_ptr.to(tl.pointer_type(tl.int32))
    elif RUN.bits == 16:
        units = array_ptr.to(tl.pointer_type(tl.int16))
    else:
        units = array_ptr.to(tl.pointer_type(tl.int8))
    return units


@triton.jit
def _within(column, ADDRESS: tl.constexpr, RUN: tl.constexpr):
    """Offsets of columns from the beginning of their slot's first head."""
    return (column // RUN.units) * ADDRESS.head + unit_offset(column % RUN.units, ADDRESS)


@triton.jit
def _move(
    source_ptr, target_ptr, layer, block, place, target_block, target_place, exists, RUN: tl.constexpr,
):  # fmt: skip
    """Copies this program's columns of one run. Slots are `[TOKENS]`, as block and place."""
    SOURCE: tl.constexpr = RUN.source
    TARGET: tl.constexpr = RUN.target
    column = tl.program_id(1) * RUN.columns + tl.arange(0, RUN.columns)
    mask = exists[:, None] & (column < RUN.num_heads * RUN.units)[None, :]
    if RUN.wide:
        column = column.to(tl.int64)
    here = slot_offset(layer, block, place, SOURCE)[:, None] + _within(column, SOURCE, RUN)[None, :]
    there = slot_offset(layer, target_block, target_place, TARGET)[:, None] + _within(column, TARGET, RUN)[None, :]
    x = tl.load(_units(source_ptr, RUN) + here, mask=mask)
    tl.store(_units(target_ptr, RUN) + there, x, mask=mask)


@triton.jit
def relayout_kernel(
    first_ptr,    # the source's array that has the first run
    second_ptr,   # … the second one, or None, like the next
    third_ptr,
    fourth_ptr,
    first_target_ptr,  # the destination's array for the first run
    second_target_ptr,
    third_target_ptr,
    fourth_target_ptr,
    pairs_ptr,    # [n, 2] int32 or int64: slots of the source and of the destination; None: each slot to its own number
    n,            # pairs
    num_slots,    # of the source
    num_target_slots,  # of the destination
    FIRST: tl.constexpr,   # kvcore.plan.relayout.UnitRun
    SECOND: tl.constexpr,  # … or None, like the next
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,         # slots of a block of the source
    TARGET_BLOCK_SIZE: tl.constexpr,  # … of the destination
    PAIR_STEP: tl.constexpr,          # elements from one pair to the next
    COLUMN_STEP: tl.constexpr,        # … from source to destination
    TOKENS: tl.constexpr,             # pairs of a program
):  # fmt: skip
    """Copy slots to slots."""
    i = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    layer = tl.program_id(2).to(tl.int64)
    exists = i < n
    if pairs_ptr is None:
        slot, target = i, i
    else:
        slot = tl.load(pairs_ptr + i * PAIR_STEP, mask=exists, other=-1).to(tl.int64)
        target = tl.load(pairs_ptr + i * PAIR_STEP + COLUMN_STEP, mask=exists, other=-1).to(tl.int64)
    exists = exists & (slot >= 0) & (slot < num_slots) & (target >= 0) & (target < num_target_slots)
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    target_block, target_place = target // TARGET_BLOCK_SIZE, target % TARGET_BLOCK_SIZE
    _move(first_ptr, first_target_ptr, layer, block, place, target_block, target_place, exists, FIRST)
    if SECOND is not None:
        _move(second_ptr, second_target_ptr, layer, block, place, target_block, target_place, exists, SECOND)
    if THIRD is not None:
        _move(third_ptr, third_target_ptr, layer, block, place, target_block, target_place, exists, THIRD)
    if FOURTH is not None:
        _move(fourth_ptr, fourth_target_ptr, layer, block, place, target_block, target_place, exists, FOURTH)
