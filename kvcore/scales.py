"""Where quantised elements and their scales are: one scale a tensor, a head, a token's head, or a group of elements.

Static scales are arrays of one element, or of one a head. Scales that the kernels compute lie in

    scale caches        one float32 for each token and head: `block slot head`, or another pattern
    nvfp4               the cache itself. The axes after layer, block and kv are a region of its own; in it, first the
                        elements of all heads lie in the layout's order, then the e4m3 scales of all in the same order.
                        `block slot head dim`: [block_size, num_heads, head_size / 2] bytes of elements, then
                        [block_size, num_heads, head_size / 16] scales
    fp8_ds_mla          the cache itself: an MLA row is 512 bytes of elements, 4 float32 scales, 64 elements of bfloat16
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec, shape_of
from kvcore.formats import (
    DS_MLA_GROUP,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
    DS_MLA_ROW,
    E4M3,
    FLOAT32,
    FP8_DS_MLA,
    NVFP4,
    NVFP4_GROUP,
    FloatFormat,
)
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis
from kvcore.placement import Address, Extents, Placement


class Scales(NamedTuple):
    """Scales that a kernel computes; hashable.

    Attributes:
        placement: Where those of K and of V are, counted in scales; its head_units are the scales of a head.
        group: Elements along dim that share one; None: all of a head.
        format: Of a scale.
        inside: Whether they lie in the caches' own memory.
    """

    placement: Placement
    group: int | None
    format: FloatFormat
    inside: bool


class Stored(NamedTuple):
    """Where the elements of a cache are, and the scales among them; hashable.

    Attributes:
        placement: K and V, counted in stored units: elements, or bytes of two. Of fp8_ds_mla, the part in fp8.
        scales: Those that lie in the same memory.
        rope: The part of fp8_ds_mla in bfloat16, counted in elements of that.
    """

    placement: Placement
    scales: Scales | None = None
    rope: Address | None = None


def place_stored(
    layout: CacheLayout,
    caches: Sequence[ArraySpec],
    stored: FloatFormat | None,
    head_size: int | None,
    head_size_v: int | None,
    names: Sequence[str],
) -> Stored:
    """Finds elements, and the scales among them, in caches.

    Args:
        layout: Of the caches.
        caches: The key and the value cache, or the one array of both.
        stored: What they hold; None for elements that are not quantised.
        head_size: Elements of a key head, where the layout does not tell.
        head_size_v: Elements of a value head, where the layout does not tell.
        names: What errors call the caches.

    Raises:
        ValueError: an extent does not fit the layout or the format.
    """
    if stored == FP8_DS_MLA:
        return _place_ds_mla(layout, caches[0], head_size_v, names[0])
    if stored == NVFP4:
        return _place_nvfp4(layout, caches, head_size, head_size_v, names)
    elements_per_unit = 1 if stored is None else stored.elements_per_unit
    return Stored(
        layout.place(
            [c.shape for c in caches],
            [c.strides for c in caches],
            head_size=None if head_size is None else head_size // elements_per_unit,
            head_size_v=None if head_size_v is None else head_size_v // elements_per_unit,
            names=names,
        )
    )


def scale_layout_of(layout: str | CacheLayout | None, has_layer: bool) -> CacheLayout:
    """The layout of scale caches, as that of caches whose heads have one element.

    Args:
        layout: Pattern of the axes block, slot and head, in any order, and layer; None: `block slot head`, with `layer`
            in front where the caches have it. One for both arrays, or two separated by a comma.
        has_layer: Whether the caches have an axis layer.

    Raises:
        ValueError: an axis is unknown, missing or superfluous.
        TypeError: it is no pattern.
    """
    if layout is None:
        layout = ("layer " if has_layer else "") + "block slot head"
    if isinstance(layout, CacheLayout):  # one that this function made
        return layout
    check_scale_layout_type(layout)
    wanted = {"layer", "block", "slot", "head"} if has_layer else {"block", "slot", "head"}
    for pattern in layout.split(","):
        if set(pattern.split()) != wanted or len(pattern.split()) != len(wanted):
            raise ValueError(
                f"scale_layout must name axes {', '.join(sorted(wanted))} once each, got '{pattern.strip()}'"
            )
    return CacheLayout(", ".join(f"{pattern} dim" for pattern in layout.split(",")))


def check_scale_layout_type(layout: Any) -> None:
    """Checks that a layout of scale caches is a pattern.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(layout, str):
        raise TypeError(f"scale_layout must be a pattern string, got {layout!r}")


def place_scale_caches(
    layout: CacheLayout, scale_caches: Sequence[ArraySpec], extents: Extents, names: Sequence[str]
) -> Scales:
    """Finds the scales of tokens and heads in scale caches. `layout` is from `scale_layout_of`.

    Raises:
        ValueError: a shape does not fit the caches' extents.
        TypeError: a dtype is not float32.
    """
    for name, axes, spec in zip(names, layout.arrays, scale_caches, strict=True):
        sizes = {
            "layer": extents.num_layers, "block": extents.num_blocks, "slot": extents.block_size,
            "head": extents.num_heads,
        }  # fmt: skip
        wanted = tuple(sizes[axis[0]] for axis in axes[:-1])
        if tuple(spec.shape) != wanted:
            raise ValueError(f"{name} must have shape {wanted}, got {shape_of(spec)}")
        if spec.dtype != "float32":
            raise TypeError(f"{name} must have dtype float32, got {spec.dtype}")
    shapes = [(*s.shape, 1) for s in scale_caches]
    strides = [None if s.strides is None else (*s.strides, 1) for s in scale_caches]
    return Scales(layout.place(shapes, strides, names=names), None, FLOAT32, inside=False)


# ---- scales in the caches' memory


def region_start(axes: Sequence[Axis]) -> int:
    """The first axis of an nvfp4 region: the one after the last of layer, block and kv."""
    return 1 + max(i for i, axis in enumerate(axes) if {"layer", "block", "kv"}.issuperset(axis))


def heads_share_regions(layout: CacheLayout) -> bool:
    """Whether blocks of nvfp4 have the elements of all heads, then all scales: then no part of one has some heads."""
    regions = (axes[region_start(axes) :] for axes in layout.arrays)
    return any("head" in axis for region in regions for axis in region)


def _place_nvfp4(
    layout: CacheLayout,
    caches: Sequence[ArraySpec],
    head_size: int | None,
    head_size_v: int | None,
    names: Sequence[str],
) -> Stored:
    per_unit = {"elements": 2, "scales": NVFP4_GROUP}
    shapes: dict[str, list[tuple[int, ...]]] = {part: [] for part in per_unit}
    strides: dict[str, list[tuple[int, ...]]] = {part: [] for part in per_unit}
    offsets = []
    for name, axes, spec in zip(names, layout.arrays, caches, strict=False):
        if len(spec.shape) != len(axes):
            layout.place([c.shape for c in caches], names=names)  # says so
        start, dim = region_start(axes), len(axes) - 1
        if axes[dim] not in (("dim",), ("k+v",), ("latent",)) or start > dim:
            raise ValueError(f"layout must end with axis dim for kv_cache_dtype 'nvfp4', got '{layout}'")
        full = spec.shape[dim]
        if full % 9:
            raise ValueError(
                f"{name} axis {axes[dim][0]} must be a multiple of 9, head_size / 2 elements and head_size / 16 "
                f"scales, for kv_cache_dtype 'nvfp4', got {full}"
            )
        region = list(zip(spec.shape, spec.steps, strict=True))[start:]
        reach = 1 + sum((size - 1) * step for size, step in region)
        if 0 not in spec.shape and (reach != prod(size for size, _ in region) or (full > 1 and region[-1][1] != 1)):
            raise ValueError(
                f"{name} must be contiguous from axis {' '.join(axes[start])} on for kv_cache_dtype 'nvfp4', "
                f"got strides {tuple(spec.steps)}"
            )
        offsets.append(reach // 9 * 8)
        for part, units in (("elements", full // 9 * 8), ("scales", full // 9)):
            shapes[part].append((*spec.shape[:dim], units))
            inner = (step // (full or 1) * units for step in spec.steps[start:dim])
            strides[part].append((*spec.steps[:start], *inner, 1))

    def place(part: str) -> Placement:
        return layout.place(
            shapes[part],
            strides[part],
            head_size=None if head_size is None else head_size // per_unit[part],
            head_size_v=None if head_size_v is None else head_size_v // per_unit[part],
            names=names,
            apart=all(c.strides is None for c in caches),
        )

    scales = place("scales")
    key, value = (
        at._replace(offset=at.offset + offset) for at, offset in zip(scales[1:], (offsets[0], offsets[-1]), strict=True)
    )
    return Stored(place("elements"), Scales(Placement(scales.extents, key, value), NVFP4_GROUP, E4M3, inside=True))


def _place_ds_mla(layout: CacheLayout, cache: ArraySpec, head_size_v: int | None, name: str) -> Stored:
    if not layout.latent:
        raise ValueError(f"layout must have an axis latent for kv_cache_dtype 'fp8_ds_mla', got '{layout}'")
    if head_size_v not in (None, DS_MLA_LATENT):
        raise ValueError(f"head_size_v must be {DS_MLA_LATENT} for kv_cache_dtype 'fp8_ds_mla', got {head_size_v}")
    axes = layout.arrays[0]
    if len(cache.shape) != len(axes):
        layout.place([cache.shape], head_size_v=1, names=[name])  # says so
    latent = axes.index(("latent",))
    if cache.shape[latent] != DS_MLA_ROW:
        raise ValueError(
            f"{name} axis latent must have size {DS_MLA_ROW} for kv_cache_dtype 'fp8_ds_mla', got {cache.shape[latent]}"
        )
    if cache.steps[latent] != 1 or any(step % 4 for i, step in enumerate(cache.steps) if i != latent):
        raise ValueError(
            f"{name} must have strides of 1 along latent and of multiples of 4 elsewhere for kv_cache_dtype "
            f"'fp8_ds_mla', got {tuple(cache.steps)}"
        )

    def place(units: int, itemsize: int) -> Placement:
        shape = tuple(units if i == latent else size for i, size in enumerate(cache.shape))
        steps = tuple(1 if i == latent else step // itemsize for i, step in enumerate(cache.steps))
        return layout.place([shape], [steps], head_size_v=units, names=[name], apart=cache.strides is None)

    elements = place(DS_MLA_LATENT, 1)
    extents, scale, _ = place(DS_MLA_LATENT // DS_MLA_GROUP, 4)
    scale = scale._replace(offset=DS_MLA_LATENT // 4)
    scales = Scales(Placement(extents, scale, scale), DS_MLA_GROUP, FLOAT32, inside=True)
    rope = place(DS_MLA_ROPE, 2).key._replace(offset=(DS_MLA_ROW - 2 * DS_MLA_ROPE) // 2)
    return Stored(elements, scales, rope)
