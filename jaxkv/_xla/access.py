"""Where K, V and their scales are in arrays, as XLA's gather and scatter want it: for any order of the axes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kvcore.contract.cache import Cache
from kvcore.formats import DS_MLA_ROW, FP8, FP8_DS_MLA, NVFP4
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis
from kvcore.placement import Extents, Placement
from kvcore.scales import region_start


class Part(NamedTuple):
    """Stored units of K, or of V, or the scales of either, in one of a call's arrays.

    Attributes:
        array: Which.
        sizes: Its axes, slowest first. Joined ones are taken apart, and a region of nvfp4 is one axis, `region`.
        start: Where the part begins along the axes kv, k+v and region.
        steps: Those of slot and head along region, where they are inside.
        units: Of a head.
        extents: Of the caches.
    """

    array: int
    sizes: dict[str, int]
    start: dict[str, int]
    steps: dict[str, int]
    units: int
    extents: Extents


def parts_of(
    cache: Cache, shapes: Sequence[tuple[int, ...]], scale_layout: CacheLayout | None, kv: int
) -> tuple[Part, Part | None]:
    """The elements of K (`kv` 0) or V (1), and their scales, unless these are static or between the elements.

    Args:
        cache: Describes the arrays.
        shapes: Of the caches, then of the scale caches.
        scale_layout: Of the scale caches.
        kv: Which.
    """
    layout, extents = cache.layout, cache.extents
    i = kv if len(layout.arrays) == 2 else 0
    if cache.format == NVFP4:
        assert cache.scales is not None
        elements, scales = (
            _region(i, kv, layout.arrays[i], shapes[i], p) for p in (cache.placement, cache.scales.placement)
        )
        return elements, scales
    start = {"kv": kv, "k+v": extents.head_units if layout.packed and kv else 0}
    units = DS_MLA_ROW if cache.format == FP8_DS_MLA else (extents.head_units, extents.head_units_v)[kv]
    elements = Part(i, _sizes(layout.arrays[i], shapes[i]), start, {}, units, extents)
    if scale_layout is None:
        return elements, None
    i = len(layout.arrays) + kv
    return elements, Part(i, _sizes(scale_layout.arrays[kv], (*shapes[i], 1)), {}, {}, 1, extents)


def _region(array: int, kv: int, axes: Sequence[Axis], shape: Sequence[int], place: Placement) -> Part:
    extents, at = place.extents, (place.key, place.value)[kv]
    first = region_start(axes)
    sizes = _sizes(axes, shape)
    inside = {name for axis in axes[first:] for name in axis}
    size = 1
    for name in inside:
        size *= sizes.pop(name)
    steps = {name: step for name, step in (("slot", at.slot), ("head", at.head)) if name in inside}
    start = {"kv": kv, "region": at.offset % max(size, 1)}
    return Part(array, sizes | {"region": size}, start, steps, (extents.head_units, extents.head_units_v)[kv], extents)


def _sizes(axes: Sequence[Axis], shape: Sequence[int]) -> dict[str, int]:
    sizes = {}
    for axis, size in zip(axes, shape, strict=True):
        for name in axis:
            sizes[name] = size if len(axis) == 1 else 2 if name == "kv" else size // 2
    return sizes


def take(arrays: Sequence[jax.Array], part: Part, at: Mapping[str, jax.Array], window: str) -> jax.Array:
    """Units at any places; zeros where `at` points outside.

    One gather from the whole array: a slice first, or a cast, would copy more than is asked for.

    Args:
        arrays: Caches, then scale caches.
        part: What to take.
        at: Indices into layer and block, and into slot or head; they broadcast.
        window: Of slot and head the other one, which is taken whole.

    Returns:
        Axes of the indices, then `window`, then units.
    """
    array = arrays[part.array]
    if array.dtype.name in FP8:
        # XLA's CPU code would gather from wider floats, and make them of the whole cache. The barrier ties the array to
        # an index, else bytes of the whole cache would be made before a loop.
        array, block = lax.optimization_barrier((array, at["block"]))
        array, at = lax.bitcast_convert_type(array, jnp.uint8), {**at, "block": block}
    names = list(part.sizes)
    index, indexed, order = _index(part, at, window)
    kept = [name for name in names if name in order]
    batch = index.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + len(kept))),
        collapsed_slice_dims=tuple(n for n, name in enumerate(names) if name not in order),
        start_index_map=tuple(names.index(name) for name in indexed),
    )
    slices = tuple(_taken(part, name) if name in order else 1 for name in names)
    array = array.reshape(tuple(part.sizes.values()))
    found = lax.gather(array, index, numbers, slices, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0)
    found = found.transpose(*range(batch), *(batch + kept.index(name) for name in order))
    return found.reshape(*found.shape[: found.ndim - 2], -1) if "x" in order else found


def put(array: jax.Array, part: Part, at: Mapping[str, jax.Array], rows: jax.Array) -> jax.Array:
    """The array with rows `[n, head, units]` of bits where `at`, `[n]` for layer, block and slot, says.

    One scatter: in place on a donated array. What `at` has outside is dropped.
    """
    if array.dtype.name in FP8:  # XLA scatters fp8 as wider floats, and NaN comes back with other bits
        new = put(lax.bitcast_convert_type(array, jnp.uint8), part, at, rows)
        return lax.bitcast_convert_type(new, array.dtype)
    names = list(part.sizes)
    index, indexed, order = _index(part, at, "head")
    kept = [name for name in names if name in order]
    front = index.shape[:-1]
    rows = lax.bitcast_convert_type(rows, array.dtype).reshape(*front, *(_taken(part, name) for name in order))
    rows = rows.transpose(*range(len(front)), *(len(front) + order.index(name) for name in kept))
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(len(front), rows.ndim)),
        inserted_window_dims=tuple(n for n, name in enumerate(names) if name not in order),
        scatter_dims_to_operand_dims=tuple(names.index(name) for name in indexed),
    )
    whole = array.reshape(tuple(part.sizes.values()))
    new = lax.scatter(whole, index, rows, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)
    return new.reshape(array.shape)


def _index(part: Part, at: Mapping[str, jax.Array], window: str) -> tuple[jax.Array, list[str], list[str]]:
    """Indices `[…, n]`, the n axes that they are for, and the axes that are taken whole, as results have them."""
    at = dict(at)
    order = [name for name in (window, "dim", "k+v", "latent", "dim/x", "x") if name in part.sizes]
    if "region" in part.sizes:  # heads, or slots, are not side by side there: each has an index of its own
        size = {"slot": part.extents.block_size, "head": part.extents.num_heads}[window]
        at = {name: x[..., None] for name, x in at.items()} | {window: jnp.arange(size, dtype=jnp.int32)}
        at = dict(zip(at, jnp.broadcast_arrays(*at.values()), strict=True))
        at["region"] = sum((at[name] * step for name, step in part.steps.items()), jnp.int32(part.start["region"]))
        order = ["region"]
    at |= {name: jnp.int32(start) for name, start in part.start.items() if name != "region"}
    indexed = [name for name in part.sizes if name in at]
    indices = jnp.broadcast_arrays(*at.values())
    return jnp.stack([indices[list(at).index(name)] for name in indexed], axis=-1), indexed, order


def _taken(part: Part, name: str) -> int:
    """Elements along an axis that is taken whole, or in part where K and V, or elements and scales, share it."""
    return part.units if name in ("k+v", "latent", "region") else part.sizes[name]
