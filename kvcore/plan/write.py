"""Launch plans of writes: a write and a target → grid, tile, warps and kernel arguments, as plain integers.

Both frameworks launch what a plan says, so that they provably start the same kernel with the same arguments. Plans
depend on shapes, strides and dtypes only, never on data.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.write import Write
from kvcore.formats import FLOATS, FloatFormat
from kvcore.placement import Address
from kvcore.plan.kernel import EXACT, KernelPlan, Target, converts_exactly
from kvcore.plan.rows import Rows, plan_rows, plan_tile, plan_warps, power_of_two, row_programs, scale_rows


class WritePlan(NamedTuple):
    """How to launch a write.

    Attributes:
        kernel: What to launch.
        token_rows: Rows of a token: 1, a token row, or one for each head.
        rows: Rows that a program takes.
        row_programs: Programs that share a row.
    """

    kernel: KernelPlan
    token_rows: int
    rows: int
    row_programs: int

    def grid(self, num_tokens: int) -> tuple[int, int, int]:
        """Programs along each axis for `num_tokens` entries of slot_mapping."""
        return -(-num_tokens * self.token_rows // self.rows), self.row_programs, 1


SCALARS = {"num_tokens": "i32", "num_slots": "i64", "num_layers": "i32"}
"""Run-time integers that follow the pointers, in the kernels' order, and their types."""


def pointers(write: Write) -> tuple[str, ...]:
    """Names of a kernel's pointer arguments, in order. All but the first three and slot_mapping_ptr may be None."""
    caches = ("kv_cache_ptr",) if write.cache.layout.single_array else ("key_cache_ptr", "value_cache_ptr")
    if write.by_head:
        caches = ("key_cache_ptr", "value_cache_ptr", "k_scale_cache_ptr", "v_scale_cache_ptr")
    return ("key_ptr", "value_ptr", *caches, "slot_mapping_ptr", "k_scale_ptr", "v_scale_ptr", "layer")


def arguments(
    write: Write,
    key: Any,
    value: Any,
    caches: Sequence[Any],
    scale_caches: Sequence[Any],
    slot_mapping: Any,
    k_scale: Any,
    v_scale: Any,
    layer: Any,
    num_tokens: int,
) -> list[Any]:
    """All that the kernel is launched with, in its order: values of `pointers`, then of `SCALARS`.

    Args:
        write: What the kernel does.
        key: The array, or whatever stands for it: an address, the dtype. So are all up to layer.
        value: As it is passed to the op.
        caches: The key and the value cache, or the one array of both.
        scale_caches: Those of key and of value, or none.
        slot_mapping: As it is passed to the op.
        k_scale: As it is passed to the op. The kernel gets None for a scale that has no effect.
        v_scale: As it is passed to the op.
        layer: The array of one index, or the index, or None.
        num_tokens: Entries of slot_mapping.
    """
    memory = list(caches)
    if write.by_head:  # the kernel has four pointers, whatever there is
        memory += [None] if write.cache.layout.single_array else []
        memory += scale_caches or (None, None)
    scales = (k_scale, v_scale) if write.scaled else (None, None)
    return [key, value, *memory, slot_mapping, *scales, layer, *scalars(write, num_tokens)]


def scalars(write: Write, num_tokens: int) -> tuple[int, int, int]:
    """Values of `SCALARS`. `num_tokens` is the length of slot_mapping."""
    extents = write.placement.extents
    return num_tokens, extents.num_slots, extents.num_layers or 1


@lru_cache(maxsize=4096)
def plan_write(write: Write, target: Target, layer_is_pointer: bool = False) -> WritePlan:
    """The plan for a write on a target.

    Args:
        write: From `kvcore.contract.write.check_write`. Its number of tokens does not matter.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
    """
    if write.by_head:
        return _plan_by_head(write, target, layer_is_pointer)
    stored, (extents, key_address, value_address) = write.cache.format, write.placement
    elements_per_unit, itemsize = stored.elements_per_unit, _itemsize(write.key.dtype)
    # Twice the tokens where stores are half as wide as loads.
    elements = 2048 if stored.bits < 8 * itemsize else 1024
    tokens, columns = plan_tile(write.placement, elements // elements_per_unit, target)
    heads = extents.num_heads
    k_strides, v_strides = write.scale_strides
    key = plan_rows(write.key, heads, extents.head_units, key_address, columns, elements_per_unit, k_strides)
    value = plan_rows(write.value, heads, extents.head_units_v, value_address, columns, elements_per_unit, v_strides)
    kernel = KernelPlan(
        module="write",
        name="reshape_and_cache_kernel_flash" + ("_diffkv" if write.cache.layout.single_array else ""),
        num_warps=plan_warps(tokens * columns * elements_per_unit * itemsize, target),
        scalars=SCALARS,
        constexprs={
            "K": key,
            "V": value,
            "BLOCK_SIZE": extents.block_size,
            "SLOT_STRIDE": write.slot_mapping.steps[0],
            "FORMAT": None if write.copies else stored,
            "HARDWARE_CAST": converts_exactly(stored, target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "TOKENS": tokens,
        },
        options=EXACT,
    )
    return WritePlan(kernel, 1, tokens, row_programs(key, value))


def _plan_by_head(write: Write, target: Target, layer_is_pointer: bool) -> WritePlan:
    """The plan for a write whose heads have a scale each: a program takes whole heads."""
    (extents, key_address, value_address), scales = write.placement, write.cache.scales
    stored, stored_v, heads = write.cache.format, write.format_v, extents.num_heads
    k_strides, v_strides = write.scale_strides
    # Elements of a tile: powers of two that cover a head.
    k_width = max(16, power_of_two(extents.head_units * stored.elements_per_unit))
    v_width = max(16, power_of_two(extents.head_units_v * stored_v.elements_per_unit))
    # Measured on an H100: few rows, and 16 elements a thread, so that what rows share is computed less often.
    rows = max(1, (65536 if target.backend == "interpret" else 1024) // max(k_width, v_width))

    def side(
        spec: ArraySpec, units: int, address: Address, width: int, format: FloatFormat, strides: tuple[int, int]
    ) -> Rows:
        per_unit = format.elements_per_unit
        return plan_rows(spec, heads, units, address, width // per_unit, per_unit, strides, merge=False)

    key = side(write.key, extents.head_units, key_address, k_width, stored, k_strides)
    value = side(write.value, extents.head_units_v, value_address, v_width, stored_v, v_strides)
    key_scales = value_scales = None
    if scales is not None:
        key_scales = scale_rows(scales, scales.placement.key, k_width, stored)
        if stored_v == stored:
            value_scales = scale_rows(scales, scales.placement.value, v_width, stored)
    kernel = KernelPlan(
        module="quantize",
        name="quantize_and_cache_kernel",
        num_warps=plan_warps(rows * max(k_width, v_width), target),
        scalars=SCALARS,
        constexprs={
            "K": key,
            "V": value,
            "KS": key_scales,
            "VS": value_scales,
            "BLOCK_SIZE": extents.block_size,
            "SLOT_STRIDE": write.slot_mapping.steps[0],
            "FORMAT": stored,
            "FORMAT_V": None if stored_v.name == write.value.dtype else stored_v,
            "HARDWARE_CAST": converts_exactly(stored, target),
            "HARDWARE_SCALES": scales is not None and converts_exactly(scales.format, target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "ROWS": rows,
        },
        options=EXACT,
    )
    return WritePlan(kernel, heads, rows, 1)


def _itemsize(dtype: str) -> int:
    return FLOATS[dtype].bits // 8 if dtype in FLOATS else 1
