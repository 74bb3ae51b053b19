"""Launch plan of `gather_kv_kernel`. As `kvcore.plan`: plain integers, from shapes, never from data."""

from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.checks import ArraySpec
from kvcore.layout import contiguous_strides
from kvcore.plan import Target, has_e4m3, plan_rows, power_of_two
from kvcore.read_contract import Gather


class GatherPlan(NamedTuple):
    """How to launch `gather_kv_kernel`.

    Attributes:
        grid: Programs along each axis.
        num_warps: Warps per program.
        constexprs: The kernel's compile-time arguments, by name.
    """

    grid: tuple[int, int, int]
    num_warps: int
    constexprs: dict[str, Any]


POINTERS = (
    "key_cache_ptr", "value_cache_ptr", "block_tables_ptr", "seq_lens_ptr", "k_scale_ptr", "v_scale_ptr", "layer",
)  # fmt: skip
"""Pointer arguments of the kernel, in order. Scales and layer may be None."""

SCALARS = ("max_len", "max_blocks", "table_stride", "num_blocks", "num_layers")
"""Run-time integers that follow the pointers. Then come key_ptr and value_ptr."""


def scalars(call: Gather) -> tuple[int, ...]:
    """Values of `SCALARS`."""
    extents = call.cache.placement.extents
    tables = call.block_tables
    stride = (tables.strides or contiguous_strides(tables.shape))[0]
    return call.max_len, tables.shape[1], stride, extents.num_blocks, extents.num_layers or 1


@lru_cache(maxsize=4096)
def plan_gather(call: Gather, target: Target, layer_is_pointer: bool = False) -> GatherPlan:
    """The plan for a gather on a target.

    Args:
        call: From `kvcore.read_contract.check_gather`.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
    """
    extents, at = call.cache.placement.extents, call.cache.placement
    row = power_of_two(extents.num_heads * max(extents.head_size, extents.head_size_v))
    copies = call.cache.format == call.format
    if target.backend == "interpret":
        tokens, columns = 32, min(row, 1024)
    elif at.value.slot == 1 or at.key.slot == at.key.x:
        tokens, columns = 16, min(row, 128)
    else:
        tokens, columns = max(1, (1024 if copies else 2048) // row), min(row, 2048)
    key, value = (ArraySpec(shape[1:], call.format.name) for shape in call.shapes)
    sequences = call.block_tables.shape[0]
    key_rows = plan_rows(key, extents.num_heads, extents.head_size, at.key, columns)
    value_rows = plan_rows(value, extents.num_heads, extents.head_size_v, at.value, columns)
    width = tokens * columns * call.format.bits // 8
    return GatherPlan(
        grid=(
            sequences * -(-call.max_len // tokens),
            max(-(-r.num_heads * r.head_size // columns) for r in (key_rows, value_rows)),
            1,
        ),
        num_warps=min(8, max(1, width // (16 * target.warp_size))),
        constexprs={
            "K": key_rows,
            "V": value_rows,
            "BLOCK_SIZE": extents.block_size,
            "LENS_STRIDE": (call.seq_lens.strides or (1,))[0],
            "CACHE": call.cache.format,
            "OUT": None if copies else call.format,
            "HARDWARE_FP8": has_e4m3(target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "TOKENS": tokens,
        },
    )
