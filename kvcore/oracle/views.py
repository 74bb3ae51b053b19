"""Caches of any layout as views `[layer, block, slot, head, dim]`."""

from collections.abc import Sequence

import numpy as np

from kvcore.formats import NVFP4, NVFP4_GROUP, FloatFormat
from kvcore.layout import CacheLayout
from kvcore.scales import region_start, scale_layout_of


def views(
    caches: Sequence[np.ndarray],
    layout: CacheLayout,
    head_size: int,
    head_size_v: int | None,
    stored: FloatFormat,
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Of K and of V: the stored units, and for nvfp4 the scales of its groups.

    Each is `[layer, block, slot, head, dim // x, x]`. Head sizes count elements.
    """
    if stored != NVFP4:
        units = _key_and_value(
            caches, layout, head_size // stored.elements_per_unit, (head_size_v or 0) // stored.elements_per_unit
        )
        return [(u, None) for u in units]
    regions = [_regions(c, axes) for c, axes in zip(caches, layout.arrays, strict=True)]
    elements = _key_and_value([r[0] for r in regions], layout, head_size // 2, (head_size_v or 0) // 2)
    scales = _key_and_value(
        [r[1] for r in regions], layout, head_size // NVFP4_GROUP, (head_size_v or 0) // NVFP4_GROUP
    )
    return list(zip(elements, scales, strict=True))


def scale_views(scale_caches: Sequence[np.ndarray], scale_layout: str | None, layout: CacheLayout) -> list[np.ndarray]:
    """Scale caches as `[layer, block, slot, head]`."""
    chosen = scale_layout_of(scale_layout, layout.has_layer)
    return [u[..., 0, 0] for u in _key_and_value([c[..., None] for c in scale_caches], chosen, 1, 1)]


def _key_and_value(
    caches: Sequence[np.ndarray], layout: CacheLayout, head_size: int, head_size_v: int
) -> list[np.ndarray]:
    if not layout.single_array:
        return [logical_view(c, axes)[0] for c, axes in zip(caches, layout.arrays, strict=True)]
    view = logical_view(caches[0], layout.arrays[0])
    if layout.packed:
        return [view[0, ..., :head_size, :], view[0, ..., head_size:, :]]
    if layout.latent:
        return [view[0], view[0, ..., :head_size_v, :]]
    return [view[0], view[1]]


def _regions(array: np.ndarray, axes: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Elements and scales of an nvfp4 cache: views of the two parts of each region."""
    start = region_start(axes)
    # 16 elements take 8 bytes, and their scale one: of 9 bytes along the last axis, 8 are elements'.
    outer, inner, ninth = array.shape[:start], array.shape[start:-1], array.shape[-1] // 9
    regions = array.reshape(*outer, -1)
    first_scale = regions.shape[-1] // 9 * 8
    elements = regions[..., :first_scale].reshape(*outer, *inner, 8 * ninth)
    scales = regions[..., first_scale:].reshape(*outer, *inner, ninth)
    assert not array.size or np.shares_memory(array, elements)
    return elements, scales


def logical_view(array: np.ndarray, axes: Sequence[tuple[str, ...]]) -> np.ndarray:
    """The array seen as `[kv, layer, block, slot, head, dim // x, x]`; axes that it lacks have size 1."""
    names, shape = [], []
    for axis, size in zip(axes, array.shape, strict=True):
        for name in axis:
            names.append({"dim/x": "dim", "k+v": "dim", "latent": "dim"}.get(name, name))
            shape.append(size if len(axis) == 1 else (2 if name == "kv" else size // 2))
    view = array.reshape(shape)
    order = ("kv", "layer", "block", "slot", "head", "dim", "x")
    present = [name for name in order if name in names]
    view = view.transpose([names.index(name) for name in present])
    return view[tuple(slice(None) if name in names else None for name in order)]
