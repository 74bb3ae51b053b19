"""Launch plan of `slot_mapping_kernel`: plain numbers, from shapes, strides and dtypes, never from data."""

from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.contract.slots import SlotMapping
from kvcore.plan.kernel import EXACT, KernelPlan
from kvcore.plan.rows import power_of_two


class SlotMappingPlan(NamedTuple):
    """How to launch `slot_mapping_kernel`.

    Attributes:
        kernel: What to launch.
        grid: Programs along each axis.
    """

    kernel: KernelPlan
    grid: tuple[int, int, int]


POINTERS = ("block_tables_ptr", "query_start_loc_ptr", "seq_lens_ptr")
"""Pointer arguments of the kernel, in order. query_start_loc may be None."""

SCALARS: dict[str, str] = dict.fromkeys(("num_tokens", "num_seqs", "max_blocks", "table_stride"), "i32")
"""Run-time integers that follow the pointers, and their types. Then comes the result, slots_ptr."""

_PROGRAMS = 256
"""About how many there are to be: more than one for each of a GPU's processors, which all have to read the starts."""

_TOKENS = (32, 256)
"""The fewest and the most tokens of a program."""

_LANES = 32
"""Starts that are compared with a program's tokens at once."""


def arguments(call: SlotMapping, block_tables: Any, query_start_loc: Any, seq_lens: Any) -> list[Any]:
    """All that the kernel is launched with but its result, in its order: values of `POINTERS`, then of `SCALARS`.

    Args:
        call: What the kernel does.
        block_tables: The array, or whatever stands for it: an address, the dtype. So are the others.
        query_start_loc: As it is passed to the op.
        seq_lens: As it is passed to the op.
    """
    return [block_tables, query_start_loc, seq_lens, *scalars(call)]


def scalars(call: SlotMapping) -> tuple[int, ...]:
    """Values of `SCALARS`."""
    tables = call.block_tables
    return call.num_tokens, *tables.shape, tables.steps[0]


@lru_cache(maxsize=4096)
def plan_slot_mapping(call: SlotMapping) -> SlotMappingPlan:
    """The plan for a call of `kvcore.contract.slots.check_slot_mapping`, on any target."""
    fewest, most = _TOKENS
    tokens = min(max(power_of_two(call.num_tokens // _PROGRAMS), fewest), most)
    starts = call.query_start_loc
    kernel = KernelPlan(
        module="slots",
        name="slot_mapping_kernel",
        num_warps=4,
        scalars=SCALARS,
        constexprs={
            "BLOCK_SIZE": call.block_size,
            "TABLE_STEP": call.block_tables.steps[1],
            "START_STRIDE": 0 if starts is None else starts.steps[0],
            "LENS_STRIDE": call.seq_lens.steps[0],
            "TOKENS": tokens,
            "LANES": _LANES,
        },
        options=EXACT,
    )
    return SlotMappingPlan(kernel, (-(-call.num_tokens // tokens), 1, 1))
