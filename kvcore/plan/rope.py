"""Launch plans of `rope_and_cache_kernel`: plain numbers, made from no data."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.rope import Rope
from kvcore.formats import FLOATS
from kvcore.placement import Address
from kvcore.plan.kernel import EXACT, KernelPlan, Target, converts_exactly
from kvcore.plan.rows import Rows, plan_rows, power_of_two, scale_rows


class RopePlan(NamedTuple):
    """How to launch `rope_and_cache_kernel`.

    Attributes:
        kernel: What to launch.
        q_heads: Rows of query of a token.
        q_rows: Those that a program takes.
        heads: Rows of K, or of V, of a token.
        rows: Those that a program takes.
    """

    kernel: KernelPlan
    q_heads: int
    q_rows: int
    heads: int
    rows: int

    def grid(self, num_tokens: int, num_written: int) -> tuple[int, int, int]:
        """Programs along each axis for so many tokens, and entries of slot_mapping."""
        return 2 * -(-num_written * self.heads // self.rows) - (-num_tokens * self.q_heads // self.q_rows), 1, 1


class Rotary(NamedTuple):
    """A rotation, and where its angles lie. A constexpr of the kernel. Strides count elements."""

    dim: int  # elements of a head that are rotated
    interleaved: bool  # whether the elements of a pair are neighbours, not dim / 2 apart
    run: int  # elements of a half that are taken together: the largest power of two that divides dim / 2
    sections: tuple[int, int, int] | None  # pairs that have each of three rows of positions, or None
    position_stride: int  # from one token's position to the next
    section_stride: int  # from one row of positions to the next
    row_stride: int  # cos_sin: [max_position, dim]
    column_stride: int
    eps: float  # of the norm
    at_once: int  # elements that a program's threads load at a time, in a power of two


POINTERS = (
    "query_ptr", "key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr", "k_scale_cache_ptr", "v_scale_cache_ptr",
    "positions_ptr", "cos_sin_ptr", "slot_mapping_ptr", "q_norm_ptr", "k_norm_ptr", "k_scale_ptr", "v_scale_ptr",
    "layer",
)  # fmt: skip
"""Pointer arguments of the kernel, in order. All from value_cache_ptr on may be None, but those of positions, cos_sin
and slot_mapping."""

SCALARS = {"num_tokens": "i32", "num_written": "i32", "num_slots": "i64", "num_layers": "i32", "max_position": "i64"}
"""Run-time integers that follow the pointers, in the kernel's order, and their types. Then comes out_ptr."""


FEW_TOKENS, MANY_TOKENS = 16, 1024
"""Up to so many tokens, and from so many on, plans are others than between."""


def batch_class(num_tokens: int) -> int:
    """0 for few tokens, 2 for many, else 1: calls of one class have one plan."""
    return (num_tokens > FEW_TOKENS) + (num_tokens >= MANY_TOKENS)


def arguments(
    call: Rope,
    query: Any,
    key: Any,
    value: Any,
    caches: Sequence[Any],
    scale_caches: Sequence[Any],
    positions: Any,
    cos_sin: Any,
    slot_mapping: Any,
    q_norm: Any,
    k_norm: Any,
    k_scale: Any,
    v_scale: Any,
    layer: Any,
    num_tokens: int,
    num_written: int,
) -> list[Any]:
    """All that the kernel is launched with but its result, in its order: values of `POINTERS`, then of `SCALARS`.

    Args:
        call: What the kernel does.
        query: The array, or whatever stands for it: an address, the dtype. So are all up to layer.
        key: As it is passed to the op.
        value: As it is passed to the op.
        caches: The key and the value cache, or the one array of both.
        scale_caches: Those of key and of value, or none.
        positions: As it is passed to the op.
        cos_sin: As it is passed to the op.
        slot_mapping: As it is passed to the op.
        q_norm: As it is passed to the op.
        k_norm: As it is passed to the op.
        k_scale: As it is passed to the op. The kernel gets None for a scale that has no effect.
        v_scale: As it is passed to the op; of MLA's rows, k_scale.
        layer: The array of one index, or the index, or None.
        num_tokens: Rows of query.
        num_written: Entries of slot_mapping.
    """
    value_cache = caches[1] if len(caches) == 2 else None
    scales = (k_scale, v_scale) if call.write.scaled else (None, None)
    return [
        query, key, value, caches[0], value_cache, *(scale_caches or (None, None)), positions, cos_sin, slot_mapping,
        q_norm, k_norm, *scales, layer, *scalars(call, num_tokens, num_written),
    ]  # fmt: skip


def scalars(call: Rope, num_tokens: int, num_written: int) -> tuple[int, ...]:
    """Values of `SCALARS`."""
    extents = call.write.placement.extents
    return num_tokens, num_written, extents.num_slots, extents.num_layers or 1, call.cos_sin.shape[0]


@lru_cache(maxsize=4096)
def plan_rope(
    call: Rope, target: Target, layer_is_pointer: bool = False, out: ArraySpec | None = None, in_place: bool = False
) -> RopePlan:
    """The plan for a call on a target.

    Args:
        call: From `kvcore.contract.rope.check_rope`. Of its numbers of tokens, only their class matters.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
        out: Where rotated queries go; None: to an array in C order.
        in_place: Whether that is query.
    """
    write = call.write
    (extents, key_address, value_address), scales = write.placement, write.cache.scales
    stored, stored_v, heads = write.cache.format, write.format_v, extents.num_heads
    k_strides, v_strides = write.scale_strides

    def side(
        spec: ArraySpec, units: int, address: Address, per_unit: int = 1, strides: tuple[int, int] = (0, 0)
    ) -> Rows:
        width = max(16, power_of_two(units * per_unit))
        num_heads = spec.shape[1]
        return plan_rows(spec, num_heads, units, address, width // per_unit, per_unit, strides, merge=False)

    _, q_heads, q_size = call.query.shape
    token_step, head_step, step = (out or ArraySpec(call.query.shape, "")).steps
    query = side(call.query, q_size, Address(0, 0, token_step, 0, head_step, step, 1, 0))
    key = side(write.key, extents.head_units, key_address, stored.elements_per_unit, k_strides)
    value = side(write.value, extents.head_units_v, value_address, stored_v.elements_per_unit, v_strides)
    k_width, v_width = key.columns * key.elements_per_unit, value.columns * value.elements_per_unit
    key_scales = value_scales = None
    if scales is not None:
        key_scales = scale_rows(scales, scales.placement.key, k_width, stored)
        if stored_v == stored:
            value_scales = scale_rows(scales, scales.placement.value, v_width, stored)
    elements, warps, options = _tile(call, target, max(query.columns, k_width, v_width))
    rows = max(1, elements // max(k_width, v_width))
    q_rows = max(1, elements // query.columns)
    computed_k, computed_v = call.computed
    position_steps = call.positions.steps
    kernel = KernelPlan(
        module="rope",
        name="rope_and_cache_kernel",
        num_warps=warps,
        scalars=SCALARS,
        constexprs={
            "Q": query,
            "K": key,
            "V": value,
            "KS": key_scales,
            "VS": value_scales,
            "BLOCK_SIZE": extents.block_size,
            "SLOT_STRIDE": write.slot_mapping.steps[0],
            "FORMAT_Q": FLOATS[call.query.dtype],
            "FORMAT": None if not computed_k and stored.name == write.key.dtype else stored,
            "FORMAT_V": None if not computed_v and stored_v.name == write.value.dtype else stored_v,
            "HARDWARE_Q": converts_exactly(FLOATS[call.query.dtype], target),
            "HARDWARE_CAST": converts_exactly(stored, target),
            "HARDWARE_SCALES": scales is not None and converts_exactly(scales.format, target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "ROTARY": Rotary(
                dim=call.rotary_dim,
                interleaved=call.options.interleaved,
                run=call.rotary_dim // 2 & -(call.rotary_dim // 2),
                sections=call.options.sections,
                position_stride=position_steps[-1],
                section_stride=position_steps[0] if len(position_steps) == 2 else 0,
                row_stride=call.cos_sin.steps[0],
                column_stride=call.cos_sin.steps[1],
                eps=call.options.eps,
                at_once=warps * target.warp_size * 128 // FLOATS[call.query.dtype].bits,
            ),
            "LATENT": call.latent,
            "Q_NORM_STRIDE": _stride(call.q_norm),
            "K_NORM_STRIDE": _stride(call.k_norm),
            "IN_PLACE": in_place,
            "Q_ROWS": q_rows,
            "ROWS": rows,
        },
        options={**EXACT, **options},
    )
    return RopePlan(kernel, q_heads, q_rows, heads, rows)


def _tile(call: Rope, target: Target, width: int) -> tuple[int, int, dict[str, Any]]:
    """Elements of a program, its warps, and options, where a head takes up to `width` elements.

    Measured on an H100, with 32 + 8 + 8 heads of 128 in a token.
    """
    if target.backend == "interpret":
        return 65536, 1, {}  # a program costs milliseconds, an element next to nothing
    batch = batch_class(call.query.shape[0])
    if batch == 0 and width <= 256:
        return 256, 1, {}  # the time is that of one program, from its first load to its store
    if batch < 2:
        # Given 64 registers, ptxas loads all that a thread needs before it uses the first; by itself it keeps to 32.
        return 512, 2, {"maxnreg": 64} if target.backend == "cuda" and width <= 512 else {}
    return 1024, 1, {}  # many rows a thread, which loads angles and weights once for all of them


def _stride(spec: ArraySpec | None) -> int:
    return 0 if spec is None else spec.steps[0]
