"""Launch plan of `relayout`."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

from kvcore.contract.relayout import Relayout, Run
from kvcore.placement import Address
from kvcore.plan.kernel import EXACT, KernelPlan, Target
from kvcore.plan.rows import plan_tile, plan_warps, power_of_two

_FOUR = ("first", "second", "third", "fourth")
"""Arrays of a cache, and runs of units: there are at least one and at most four of either."""

POINTERS = (*(f"{name}_ptr" for name in _FOUR), *(f"{name}_target_ptr" for name in _FOUR), "pairs_ptr")
"""Pointer arguments of the kernel, in order. An array is passed once, whatever runs it has: JAX loses what is written
to an array that is passed twice."""

SCALARS = {"n": "i32", "num_slots": "i64", "num_target_slots": "i64"}
"""Run-time integers that follow the pointers, and their types."""


class UnitRun(NamedTuple):
    """Units that move together. A constexpr of the kernel.

    Where heads follow each other without gaps in both caches, they are described as one long head.
    """

    num_heads: int
    units: int  # of a head
    bits: int  # of a unit
    source_array: int  # which of the source's arrays has them
    target_array: int  # … of the destination's
    source: Address
    target: Address
    columns: int  # units of a slot that a program takes, a power of two
    wide: bool  # whether offsets within a slot need 64 bits


class RelayoutPlan(NamedTuple):
    """How to launch a call.

    Attributes:
        kernel: What to launch.
        grid: Programs along each axis.
    """

    kernel: KernelPlan
    grid: tuple[int, int, int]


def arguments(call: Relayout, source: Sequence[Any], destination: Sequence[Any], pairs: Any) -> list[Any]:
    """All that the kernel is launched with, in its order.

    Args:
        call: What is done.
        source: Caches, then scale caches: the arrays, or what stands for them.
        destination: The same of the other cache.
        pairs: As it is passed to the op.
    """
    arrays = [[*memory, *[None] * (len(_FOUR) - len(memory))] for memory in (source, destination)]
    return [*arrays[0], *arrays[1], pairs, *scalars(call)]


def scalars(call: Relayout) -> tuple[int, int, int]:
    """Values of `SCALARS`."""
    return call.num_pairs, call.source.extents.num_slots, call.destination.extents.num_slots


@lru_cache(maxsize=4096)
def plan_relayout(call: Relayout, target: Target) -> RelayoutPlan:
    """The plan for a call on a target.

    Args:
        call: From `kvcore.contract.relayout.check_relayout`.
        target: What to compile for.
    """
    # 2 KiB of K and as much of V, as of writes and gathers: a thread of four warps moves 16 bytes of each.
    elements = 2048 * 8 // call.runs[0].bits
    tiles = [plan_tile(cache.placement, elements, target) for cache in (call.source, call.destination)]
    # Where slots are innermost in one of them, a program takes many: neighbours share cache lines there.
    tokens, columns = min(tiles, key=lambda tile: tile[1])
    tokens = max(tokens, *(t for t, c in tiles if c == columns))
    runs = [_unit_run(run, columns) for run in call.runs]
    constexprs: dict[str, Any] = dict.fromkeys(name.upper() for name in _FOUR)
    constexprs |= zip(constexprs, runs, strict=False)
    pair_step, column_step = (0, 0) if call.pairs is None else call.pairs.steps
    constexprs |= {
        "BLOCK_SIZE": call.source.extents.block_size,
        "TARGET_BLOCK_SIZE": call.destination.extents.block_size,
        "PAIR_STEP": pair_step,
        "COLUMN_STEP": column_step,
        "TOKENS": tokens,
        "TOGETHER": gcd(tokens, call.source.extents.block_size, call.destination.extents.block_size),
    }
    kernel = KernelPlan(
        module="relayout",
        name="relayout_kernel",
        num_warps=plan_warps(tokens * columns * runs[0].bits // 8, target),
        scalars=SCALARS,
        constexprs=constexprs,
        options=EXACT,
    )
    stretches = max(-(-run.num_heads * run.units // run.columns) for run in runs)
    # Blocks without slots have none to move.
    empty = 0 in (call.source.extents.num_slots, call.destination.extents.num_slots)
    return RelayoutPlan(kernel, (0 if empty else -(-call.num_pairs // tokens), stretches, call.num_layers))


def _unit_run(run: Run, columns: int) -> UnitRun:
    heads, units = run.num_heads, run.units
    if all(address.x == 1 and address.head == units * address.dim for address in run.addresses):
        heads, units = 1, heads * units
    reach = max((heads - 1) * address.head + units * max(address.dim, address.x_stride) for address in run.addresses)
    return UnitRun(
        heads, units, run.bits, *run.arrays, *run.addresses, min(columns, power_of_two(heads * units)), reach >= 2**31
    )
