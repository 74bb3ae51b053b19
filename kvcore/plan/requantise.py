"""Launch plan of `relayout` where formats differ: slots are read, and written, by one kernel."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.contract.cache import Cache
from kvcore.contract.relayout import Relayout
from kvcore.formats import FLOATS
from kvcore.placement import Address
from kvcore.plan.kernel import EXACT, KernelPlan, Target, converts_exactly, has_e4m3
from kvcore.plan.relayout import SCALARS, RelayoutPlan
from kvcore.plan.rows import ScaleRows, plan_warps, power_of_two, scale_rows

_MEMORY = ("key_cache_ptr", "value_cache_ptr", "k_scale_cache_ptr", "v_scale_cache_ptr")

POINTERS = (
    *_MEMORY, *(name.replace("cache_ptr", "target_ptr") for name in _MEMORY), "pairs_ptr",
    "k_scale_ptr", "v_scale_ptr", "k_target_static_ptr", "v_target_static_ptr",
)  # fmt: skip
"""Pointer arguments of the kernel, in order; `SCALARS` of plan.relayout follow. An array is passed once, as JAX loses
what is written to one that is passed twice: one that has K and V is key's, and value's is None."""

STATIC_SCALES = POINTERS[-4:]
"""Those that may be no multiples of 16."""


class HeadRows(NamedTuple):
    """Heads of slots of K, or of V: where they lie in a cache. A constexpr of the kernel."""

    head_units: int
    elements_per_unit: int
    scale_stride: int  # from one head's static scale to the next; 0: one for all
    layer_scale_stride: int  # from one layer's static scales to the next; 0: the same for all
    address: Address
    columns: int  # units of a head in a tile, a power of two
    wide: bool  # whether offsets within a slot need 64 bits


def arguments(
    call: Relayout,
    source: Sequence[Any],
    destination: Sequence[Any],
    pairs: Any,
    scales: Sequence[Any],
) -> list[Any]:
    """All that the kernel is launched with, in its order, but for the scalars.

    Args:
        call: What is done.
        source: Caches, then scale caches: the arrays, or what stands for them.
        destination: The same of the other cache.
        pairs: As it is passed to the op.
        scales: Static scales: k_scale and v_scale of the source, then of the destination. The kernel gets None for one
            that has no effect.
    """
    memory, static = [], []
    for i, (cache, arrays) in enumerate(zip((call.source, call.destination), (source, destination), strict=True)):
        count = len(cache.layout.arrays)
        memory += [*arrays[:count], *[None] * (2 - count), *(arrays[count:] or (None, None))]
        static += scales[2 * i : 2 * i + 2] if _is_static(cache) else (None, None)
    return [*memory, pairs, *static]


@lru_cache(maxsize=4096)
def plan_requantise(call: Relayout, target: Target) -> RelayoutPlan:
    """The plan for a call on a target.

    Args:
        call: From `kvcore.contract.relayout.check_relayout`.
        target: What to compile for.
    """
    source, destination = call.source, call.destination
    heads = source.extents.num_heads
    # Elements of a tile: powers of two that cover a head.
    widths = [max(16, power_of_two(size)) for size in (source.head_size, source.head_size_v)]
    rows = max(1, _elements(call, target) // max(widths))
    # Where slots are innermost in one of them, neighbours share cache lines there: a program takes many of one head.
    innermost = any(_slots_are_innermost(cache) for cache in (source, destination))
    taken = 1 if innermost else min(rows, power_of_two(heads))
    tokens = max(16 if innermost else 1, rows // taken)
    stored, format = source.format, destination.format
    sides = [_sides(cache, widths) for cache in (source, destination)]
    (key, value, key_scales, value_scales), (to_key, to_value, to_key_scales, to_value_scales) = sides
    pair_step, column_step = (0, 0) if call.pairs is None else call.pairs.steps
    scales = destination.scales
    kernel = KernelPlan(
        module="requantise",
        name="requantise_kernel",
        num_warps=_warps(call, tokens * taken * max(widths), target),
        scalars=SCALARS,
        constexprs={
            "K": key,
            "V": value,
            "KS": key_scales,
            "VS": value_scales,
            "TARGET_K": to_key,
            "TARGET_V": to_value,
            "TARGET_KS": to_key_scales,
            "TARGET_VS": to_value_scales,
            "STORED": None if stored.name in FLOATS else stored,
            "FORMAT": None if stored == format and stored.name in FLOATS else format,
            "HARDWARE": has_e4m3(target),
            "HARDWARE_CAST": converts_exactly(format, target),
            "HARDWARE_SCALES": scales is not None and converts_exactly(scales.format, target),
            "BLOCK_SIZE": source.extents.block_size,
            "TARGET_BLOCK_SIZE": destination.extents.block_size,
            "PAIR_STEP": pair_step,
            "COLUMN_STEP": column_step,
            "NUM_HEADS": heads,
            "HEADS": taken,
            "TOKENS": tokens,
        },
        options=EXACT,
    )
    # Blocks without slots have none to move.
    empty = 0 in (source.extents.num_slots, destination.extents.num_slots)
    return RelayoutPlan(kernel, (0 if empty else -(-call.num_pairs // tokens), -(-heads // taken), call.num_layers))


def _elements(call: Relayout, target: Target) -> int:
    """Elements of a program's tile, of K, and as many of V."""
    if target.backend == "interpret":
        return 65536  # a program costs milliseconds, an element next to nothing
    # As writes: few rows where scales are computed, else 16 bytes a thread of the wider elements.
    return 1024 if call.destination.scales is not None else 2048


def _warps(call: Relayout, elements: int, target: Target) -> int:
    if call.destination.scales is not None:  # 16 elements a thread, so that what rows share is computed less often
        return plan_warps(elements, target)
    bits = max(call.source.format.bits, call.destination.format.bits)
    return plan_warps(elements * bits // 8, target)


def _slots_are_innermost(cache: Cache) -> bool:
    return any(address.slot == address.x for address in cache.placement[1:])


def _is_static(cache: Cache) -> bool:
    """Whether static scales of a cache mean anything."""
    return cache.scaled and (cache.scales is None or cache.scales.inside)


def _sides(cache: Cache, widths: Sequence[int]) -> tuple[HeadRows, HeadRows, ScaleRows | None, ScaleRows | None]:
    """K and V of a cache, and their computed scales."""
    (extents, *_), scales = cache.placement, cache.scales
    addresses = cache.placement.key, cache.placement.value
    per_unit = cache.format.elements_per_unit
    static = cache.scale_strides if _is_static(cache) else ((0, 0), (0, 0))
    places = (None, None) if scales is None else (scales.placement.key, scales.placement.value)
    rows, computed = [], []
    sizes = extents.head_units, extents.head_units_v
    for side, (address, units, width) in enumerate(zip(addresses, sizes, widths, strict=True)):
        reach = (extents.num_heads - 1) * address.head + units * max(address.dim, address.x_stride)
        columns = width // per_unit
        rows.append(HeadRows(units, per_unit, *static[side], address, columns, reach >= 2**31))
        place = places[side]
        computed.append(place and scales and scale_rows(scales, place, width, cache.format))
    return rows[0], rows[1], computed[0], computed[1]
