"""Where K, V and their scales are in arrays, as XLA's gather and scatter want it: for any order of the axes."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._call import CacheOperands, CacheOptions
from jaxkv._xla.formats import decode, from_bytes
from kvcore.contract.cache import Cache
from kvcore.formats import (
    BFLOAT16,
    DS_MLA_GROUP,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
    DS_MLA_ROW,
    E4M3,
    FP8,
    FP8_DS_MLA,
    NVFP4,
    NVFP4_GROUP,
)
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis
from kvcore.placement import Extents, Placement
from kvcore.scales import region_start


def static_scales(options: CacheOptions, operands: CacheOperands) -> tuple[jax.Array | None, jax.Array | None]:
    """The layer's static scales of K and of V, of one element or one a head: a row where they are those of all layers.

    Of a layer that the cache does not have, they are any one's.
    """

    def of_layer(scale: jax.Array | None) -> jax.Array | None:
        if scale is None or scale.ndim == 1:
            return scale
        layer = options.layer if operands.layer is None else operands.layer[0]
        return lax.dynamic_index_in_dim(scale, layer, keepdims=False)

    return of_layer(operands.k_scale), of_layer(operands.v_scale)


class Part(NamedTuple):
    """Stored units of K, or of V, or the scales of either, in one of a call's arrays.

    Attributes:
        array: Which of them: caches, then scale caches.
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
    """The elements of K or V, and their scales, unless these are static or between the elements.

    Args:
        cache: Describes the arrays.
        shapes: Of the caches, then of the scale caches.
        scale_layout: Of the scale caches.
        kv: 0 for K, 1 for V.
    """
    layout, extents = cache.layout, cache.extents
    array = kv if len(layout.arrays) == 2 else 0
    axes, shape = layout.arrays[array], shapes[array]
    if cache.format == NVFP4:
        assert cache.scales is not None
        elements = _region(array, kv, axes, shape, cache.placement)
        return elements, _region(array, kv, axes, shape, cache.scales.placement)
    start = {"kv": kv, "k+v": extents.head_units if layout.packed and kv else 0}
    units = DS_MLA_ROW if cache.format == FP8_DS_MLA else (extents.head_units, extents.head_units_v)[kv]
    elements = Part(array, _sizes(axes, shape), start, {}, units, extents)
    if scale_layout is None:
        return elements, None
    array = len(layout.arrays) + kv
    sizes = _sizes(scale_layout.arrays[kv], (*shapes[array], 1))
    return elements, Part(array, sizes, {}, {}, 1, extents)


def _region(array: int, kv: int, axes: Sequence[Axis], shape: Sequence[int], placement: Placement) -> Part:
    """Elements, or scales, in a cache of nvfp4."""
    extents, address = placement.extents, (placement.key, placement.value)[kv]
    sizes = _sizes(axes, shape)
    inside = {name for axis in axes[region_start(axes) :] for name in axis}
    size = 1
    for name in inside:
        size *= sizes.pop(name)
    steps = {name: step for name, step in (("slot", address.slot), ("head", address.head)) if name in inside}
    start = {"kv": kv, "region": address.offset % max(size, 1)}
    units = (extents.head_units, extents.head_units_v)[kv]
    return Part(array, sizes | {"region": size}, start, steps, units, extents)


def _sizes(axes: Sequence[Axis], shape: Sequence[int]) -> dict[str, int]:
    """Sizes of axes by name; of an axis (head kv), head has half."""
    sizes = {}
    for axis, size in zip(axes, shape, strict=True):
        for name in axis:
            sizes[name] = size if len(axis) == 1 else 2 if name == "kv" else size // 2
    return sizes


def take(arrays: Sequence[jax.Array], part: Part, indices: Mapping[str, jax.Array], window: str) -> jax.Array:
    """Units at any places; zeros where indices point outside.

    One gather from the whole array: a slice first, or a cast, would copy more than is asked for.

    Args:
        arrays: Caches, then scale caches.
        part: What to take.
        indices: Into layer and block, and into slot or head; they broadcast.
        window: Of slot and head the other one, which is taken whole.

    Returns:
        Axes of the indices, then `window`, then units.
    """
    array = arrays[part.array]
    if array.dtype.name in FP8:
        # XLA's CPU code would gather from wider floats, and make them of the whole cache. The barrier ties the array to
        # an index, else bytes of the whole cache would be made before a loop.
        array, block = lax.optimization_barrier((array, indices["block"]))
        array, indices = lax.bitcast_convert_type(array, jnp.uint8), {**indices, "block": block}
    index, indexed, window_axes = _index(part, indices, window)
    names = _axes(array, part, window_axes)
    kept = [name for name in names if name in window_axes]
    batch = index.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + len(kept))),
        collapsed_slice_dims=tuple(n for n, name in enumerate(names) if name not in window_axes),
        start_index_map=tuple(names.index(name) for name in indexed),
    )
    slices = tuple(_taken(part, name) if name in window_axes else 1 for name in names)
    array = array.reshape(tuple(part.sizes[name] for name in names))
    units = lax.gather(array, index, numbers, slices, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0)
    units = units.transpose(*range(batch), *(batch + kept.index(name) for name in window_axes if name in kept))
    units = units.reshape(*units.shape[:batch], *(_taken(part, name) for name in window_axes))
    return units.reshape(*units.shape[: units.ndim - 2], -1) if "x" in window_axes else units


def put(array: jax.Array, part: Part, indices: Mapping[str, jax.Array], rows: jax.Array) -> jax.Array:
    """The array with rows at other places than its own.

    One scatter: in place on a donated array. What indices point outside for is dropped.

    Args:
        array: The one that has the part.
        part: Where the rows belong.
        indices: Into layer, block and slot: `[n]` each, or one for all.
        rows: Bits of units, `[n, head, units]`.
    """
    if array.dtype.name in FP8:  # XLA scatters fp8 as wider floats, and NaN comes back with other bits
        new = put(lax.bitcast_convert_type(array, jnp.uint8), part, indices, rows)
        return lax.bitcast_convert_type(new, array.dtype)
    index, indexed, window_axes = _index(part, indices, "head")
    names = _axes(array, part, window_axes)
    window_axes = [name for name in window_axes if name in names]
    kept = [name for name in names if name in window_axes]
    front = index.shape[:-1]
    rows = lax.bitcast_convert_type(rows, array.dtype).reshape(*front, *(_taken(part, name) for name in window_axes))
    rows = rows.transpose(*range(len(front)), *(len(front) + window_axes.index(name) for name in kept))
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(len(front), rows.ndim)),
        inserted_window_dims=tuple(n for n, name in enumerate(names) if name not in window_axes),
        scatter_dims_to_operand_dims=tuple(names.index(name) for name in indexed),
    )
    whole = array.reshape(tuple(part.sizes[name] for name in names))
    new = lax.scatter(whole, index, rows, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)
    return new.reshape(array.shape)


def _axes(array: jax.Array, part: Part, window_axes: Sequence[str]) -> list[str]:
    """The part's axes but for those of one element that the array lacks, as dim in an array of scales.

    XLA's CPU code puts such an axis at another place in memory, and copies the whole array for it.
    """
    names = list(part.sizes)
    for name in reversed(window_axes):
        if len(names) > array.ndim and part.sizes[name] == 1:
            names.remove(name)
    return names


def _index(part: Part, indices: Mapping[str, jax.Array], window: str) -> tuple[jax.Array, list[str], list[str]]:
    """Indices `[…, n]`, the n axes that they are for, and the axes that are taken whole, as results have them."""
    indices = dict(indices)
    window_axes = [name for name in (window, "dim", "k+v", "latent", "dim/x", "x") if name in part.sizes]
    if "region" in part.sizes:  # heads, or slots, are not side by side there: each has an index of its own
        size = {"slot": part.extents.block_size, "head": part.extents.num_heads}[window]
        indices = {name: index[..., None] for name, index in indices.items()}
        indices[window] = jnp.arange(size, dtype=jnp.int32)
        indices = dict(zip(indices, jnp.broadcast_arrays(*indices.values()), strict=True))
        steps = (indices[name] * step for name, step in part.steps.items())
        indices["region"] = sum(steps, jnp.int32(part.start["region"]))
        window_axes = ["region"]
    indices |= {name: jnp.int32(start) for name, start in part.start.items() if name != "region"}
    indexed = [name for name in part.sizes if name in indices]
    by_name = dict(zip(indices, jnp.broadcast_arrays(*indices.values()), strict=True))
    return jnp.stack([by_name[name] for name in indexed], axis=-1), indexed, window_axes


def _taken(part: Part, name: str) -> int:
    """Elements along an axis that is taken whole, or in part where K and V, or elements and scales, share it."""
    return part.units if name in ("k+v", "latent", "region") else part.sizes[name]


# ---- decoded


class Source(NamedTuple):
    """A cache to read from.

    Attributes:
        cache: Its description.
        arrays: Caches, then scale caches.
        parts: Where K is in them, and V: elements, and scales if they were computed.
    """

    cache: Cache
    arrays: tuple[jax.Array, ...]
    parts: tuple[tuple[Part, Part | None], ...]

    @classmethod
    def of(cls, cache: Cache, options: CacheOptions, operands: CacheOperands) -> "Source":
        """The cache of a call."""
        shapes = [array.shape for array in operands.memory]
        parts = tuple(parts_of(cache, shapes, options.scale_layout, kv) for kv in (0, 1))
        return cls(cache, operands.memory, parts)

    def take(self, kv: int, indices: Mapping[str, jax.Array], window: str) -> jax.Array:
        """K (`kv` 0) or V (1) as it is stored; arguments and results are those of the function `take`."""
        elements, _ = self.parts[kv]
        return take(self.arrays, elements, indices, window)

    def decode(
        self,
        kv: int,
        indices: Mapping[str, jax.Array],
        window: str,
        multiply: Callable[[jax.Array, jax.Array], jax.Array] = operator.mul,
    ) -> jax.Array:
        """K (`kv` 0) or V (1) as float32, multiplied by scales that were computed, not by static ones.

        Args:
            kv: 0 for K, 1 for V.
            indices: Into layer and block, and into slot or head; they broadcast.
            window: Of slot and head the other one, which is taken whole.
            multiply: How to multiply. nvfp4's products are exact, and need no other way than the usual one.

        Returns:
            Axes of the indices, then `window`, then elements.
        """
        stored, units = self.cache.format, self.take(kv, indices, window)
        if stored == FP8_DS_MLA:
            return _decode_mla(units, multiply)[..., : (self.cache.head_size, self.cache.head_size_v)[kv]]
        elements = decode(units, stored)
        _, scale_part = self.parts[kv]
        if scale_part is None:
            return elements
        scales = take(self.arrays, scale_part, indices, window)
        if stored == NVFP4:
            scales = decode(scales, E4M3)[..., None]
            return (elements.reshape(*scales.shape[:-1], NVFP4_GROUP) * scales).reshape(elements.shape)
        return multiply(elements, scales)


def _decode_mla(row: jax.Array, multiply: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Rows of fp8_ds_mla as float32."""
    front, rope_at = row.shape[:-1], row.shape[-1] - 2 * DS_MLA_ROPE
    latent = decode(row[..., :DS_MLA_LATENT], FP8_DS_MLA).reshape(*front, -1, DS_MLA_GROUP)
    scales = from_bytes(row[..., DS_MLA_LATENT:rope_at], jnp.float32)
    rope = from_bytes(row[..., rope_at:], jnp.bfloat16)
    return jnp.concatenate([multiply(latent, scales[..., None]).reshape(*front, -1), decode(rope, BFLOAT16)], axis=-1)
