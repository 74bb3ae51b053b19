"""Launch plan of `gather_kv_kernel`: plain numbers, from shapes, strides and dtypes, never from data."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.read import Gather
from kvcore.formats import DS_MLA_ROPE
from kvcore.plan.kernel import EXACT, KernelPlan, Target, has_e4m3
from kvcore.plan.rows import plan_rows, plan_tile, plan_warps, power_of_two, row_programs, scale_rows


class GatherPlan(NamedTuple):
    """How to launch `gather_kv_kernel`.

    Attributes:
        kernel: What to launch.
        grid: Programs along each axis.
    """

    kernel: KernelPlan
    grid: tuple[int, int, int]


POINTERS = (
    "key_cache_ptr", "value_cache_ptr", "block_tables_ptr", "seq_lens_ptr", "k_scale_ptr", "v_scale_ptr", "layer",
)  # fmt: skip
"""Pointer arguments of the kernel, in order. Scales and layer may be None, and seq_lens is where slots are read."""

SCALARS: dict[str, str] = dict.fromkeys(("max_len", "max_blocks", "table_stride", "num_blocks", "num_layers"), "i32")
"""Run-time integers that follow the pointers, and their types. Then come the results, key_ptr and value_ptr."""


def arguments(
    call: Gather,
    caches: Sequence[Any],
    block_tables: Any,
    seq_lens: Any,
    k_scale: Any,
    v_scale: Any,
    layer: Any,
) -> list[Any]:
    """All that the kernel is launched with but its results, in its order: values of `POINTERS`, then of `SCALARS`.

    The results follow: key and value.

    Args:
        call: What the kernel does.
        caches: The key and the value cache, or the one array of both: the arrays, or whatever stands for them: an
            address, the dtype. So are all up to layer.
        block_tables: As it is passed to the op, or slots.
        seq_lens: As it is passed to the op; None for slots.
        k_scale: As it is passed to the op. The kernel gets None for a scale that has no effect.
        v_scale: As it is passed to the op.
        layer: The array of one index, or the index, or None.
    """
    scales = (k_scale, v_scale) if call.cache.scaled else (None, None)
    return [caches[0], caches[-1], block_tables, seq_lens, *scales, layer, *scalars(call)]


def scalars(call: Gather) -> tuple[int, ...]:
    """Values of `SCALARS`."""
    extents, tables = call.cache.extents, call.block_tables
    return call.max_len, tables.shape[1], tables.steps[0], extents.num_blocks, extents.num_layers or 1


@lru_cache(maxsize=4096)
def plan_gather(call: Gather, target: Target, layer_is_pointer: bool = False) -> GatherPlan:
    """The plan for a gather on a target.

    Args:
        call: From `kvcore.contract.read.check_gather`.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
    """
    cache, scales = call.cache, call.cache.scales
    (extents, key_address, value_address), heads = cache.placement, cache.extents.num_heads
    elements_per_unit = cache.format.elements_per_unit
    copies = cache.format == call.format
    tokens, columns = plan_tile(cache.placement, (1024 if copies else 2048) // elements_per_unit, target)
    key, value = (ArraySpec(shape[-3:], call.format.name) for shape in call.shapes)
    k_strides, v_strides = cache.scale_strides
    merge = scales is None
    key_rows = plan_rows(key, heads, extents.head_units, key_address, columns, elements_per_unit, k_strides, merge)
    value_rows = plan_rows(
        value, heads, extents.head_units_v, value_address, columns, elements_per_unit, v_strides, merge
    )
    rope = None
    if cache.rope is not None:
        rope = plan_rows(key, heads, DS_MLA_ROPE, cache.rope, power_of_two(DS_MLA_ROPE), merge=False)
    key_scales = value_scales = None
    if scales is not None:
        _, k_scales, v_scales = scales.placement
        key_scales = scale_rows(scales, k_scales, extents.head_units * elements_per_unit, cache.format)
        value_scales = scale_rows(scales, v_scales, extents.head_units_v * elements_per_unit, cache.format)
    kernel = KernelPlan(
        module="gather",
        name="gather_kv_kernel",
        num_warps=plan_warps(tokens * columns * elements_per_unit * call.format.bits // 8, target),
        scalars=SCALARS,
        constexprs={
            "K": key_rows,
            "V": value_rows,
            "KS": key_scales,
            "VS": value_scales,
            "ROPE": rope,
            "BLOCK_SIZE": extents.block_size,
            "TABLE_STEP": call.block_tables.steps[1],
            "LENS_STRIDE": 0 if call.seq_lens is None else call.seq_lens.steps[0],
            "CACHE": cache.format,
            "OUT": None if copies else call.format,
            "HARDWARE": has_e4m3(target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "TOKENS": tokens,
        },
        options=EXACT,
    )
    per_seq = -(-call.max_len // tokens)
    return GatherPlan(kernel, (call.block_tables.shape[0] * per_seq, row_programs(key_rows, value_rows), 1))
