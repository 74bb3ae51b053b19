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
def _units(first_ptr, second_ptr, third_ptr, fourth_ptr, INDEX: tl.constexpr, RUN: tl.constexpr):
    """One of a cache's arrays, as integers."""
    if INDEX == 0:
        array_ptr = first_ptr
    elif INDEX == 1:
        array_ptr = second_ptr
    elif INDEX == 2:
        array_ptr = third_ptr
    else:
        array_ptr = fourth_ptr
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
def _columns(RUN: tl.constexpr):
    """This program's columns of one run, `[columns]`, and which of them slots have."""
    column = tl.program_id(1) * RUN.columns + tl.arange(0, RUN.columns)
    in_row = column < RUN.num_heads * RUN.units
    if RUN.wide:
        column = column.to(tl.int64)
    return column, in_row


@triton.jit
def _load(array_ptr, layer, block, place, exists, RUN: tl.constexpr):
    """This program's columns of slots of the source, `[TOKENS, columns]`."""
    ADDRESS: tl.constexpr = RUN.source
    column, in_row = _columns(RUN)
    offset = slot_offset(layer, block, place, ADDRESS)[:, None] + _within(column, ADDRESS, RUN)[None, :]
    return tl.load(array_ptr + offset, mask=exists[:, None] & in_row[None, :])


@triton.jit
def _store(array_ptr, x, layer, block, place, exists, RUN: tl.constexpr):
    """Stores them in slots of the destination."""
    ADDRESS: tl.constexpr = RUN.target
    column, in_row = _columns(RUN)
    offset = slot_offset(layer, block, place, ADDRESS)[:, None] + _within(column, ADDRESS, RUN)[None, :]
    tl.store(array_ptr + offset, x, mask=exists[:, None] & in_row[None, :])


@triton.jit
def relayout_kernel(
    first_ptr,   # the source's arrays, each once: caches, then scale caches
    second_ptr,  # … None where it has fewer, like the next
    third_ptr,
    fourth_ptr,
    first_target_ptr,  # those of the destination
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
    TOGETHER: tl.constexpr,           # slots in a row of which all or none exist, without pairs: at most TOKENS
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
    if pairs_ptr is None:
        # Blocks are whole: slots that share one exist together. Where slots are innermost, a thread moves several then.
        exists = tl.max_constancy(exists, TOGETHER)
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    target_block, target_place = target // TARGET_BLOCK_SIZE, target % TARGET_BLOCK_SIZE

    # ---- loads of all runs, then stores: a load behind a store would wait until what is stored has come
    second, third, fourth = second_ptr, third_ptr, fourth_ptr
    array_ptr = _units(first_ptr, second_ptr, third_ptr, fourth_ptr, FIRST.source_array, FIRST)
    first = _load(array_ptr, layer, block, place, exists, FIRST)
    if SECOND is not None:
        array_ptr = _units(first_ptr, second_ptr, third_ptr, fourth_ptr, SECOND.source_array, SECOND)
        second = _load(array_ptr, layer, block, place, exists, SECOND)
    if THIRD is not None:
        array_ptr = _units(first_ptr, second_ptr, third_ptr, fourth_ptr, THIRD.source_array, THIRD)
        third = _load(array_ptr, layer, block, place, exists, THIRD)
    if FOURTH is not None:
        array_ptr = _units(first_ptr, second_ptr, third_ptr, fourth_ptr, FOURTH.source_array, FOURTH)
        fourth = _load(array_ptr, layer, block, place, exists, FOURTH)
    array_ptr = _units(
        first_target_ptr, second_target_ptr, third_target_ptr, fourth_target_ptr, FIRST.target_array, FIRST
    )
    _store(array_ptr, first, layer, target_block, target_place, exists, FIRST)
    if SECOND is not None:
        array_ptr = _units(
            first_target_ptr, second_target_ptr, third_target_ptr, fourth_target_ptr, SECOND.target_array, SECOND
        )
        _store(array_ptr, second, layer, target_block, target_place, exists, SECOND)
    if THIRD is not None:
        array_ptr = _units(
            first_target_ptr, second_target_ptr, third_target_ptr, fourth_target_ptr, THIRD.target_array, THIRD
        )
        _store(array_ptr, third, layer, target_block, target_place, exists, THIRD)
    if FOURTH is not None:
        array_ptr = _units(
            first_target_ptr, second_target_ptr, third_target_ptr, fourth_target_ptr, FOURTH.target_array, FOURTH
        )
        _store(array_ptr, fourth, layer, target_block, target_place, exists, FOURTH)
