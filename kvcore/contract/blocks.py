"""The contract of the ops that move whole blocks of a cache: `copy_blocks` and `zero_blocks`.

To them a cache is arrays with an axis `block`: what lies in a block, and in which format, does not matter.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvcore.arrays import ArraySpec, array_names, shape_of
from kvcore.contract.checks import check_devices, check_indices, check_same_dtype, either, layout_of
from kvcore.formats import FLOATS, FP8
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis, spell
from kvcore.placement import axis_table
from kvcore.scales import scale_layout_of

DTYPES = (*FLOATS, *FP8, "uint8", "int8")
"""What caches may be of."""


class BlockArray(NamedTuple):
    """One array of a cache; hashable.

    Attributes:
        shape: Sizes of its axes, with joined ones taken apart. A batch of caches has an axis in front.
        steps: Strides of these, in elements.
        axis: Which of them is `block`.
        dtype: Of an element.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    axis: int
    dtype: str


class Blocks(NamedTuple):
    """A call that fulfils the contract; hashable, and all that a plan or an implementation needs.

    Attributes:
        arrays: Caches, then scale caches.
        num_blocks: Blocks of each.
        indices: The spec of pairs, `(n, 2)`, or of blocks, `(n,)`; with a batch, both have it in front.
        batched: Whether there is a batch of caches, each with pairs or blocks of its own.
        layout: Of the caches.
        scale_layout: Of the scale caches; None where there are none.
    """

    arrays: tuple[BlockArray, ...]
    num_blocks: int
    indices: ArraySpec
    batched: bool
    layout: CacheLayout
    scale_layout: CacheLayout | None

    @property
    def copies(self) -> bool:
        """Whether blocks are copied; else they are filled with zeros."""
        return len(self.indices.shape) - self.batched == 2


def check_blocks(
    name: str,
    indices: ArraySpec,
    caches: Sequence[ArraySpec],
    scale_caches: Sequence[ArraySpec],
    layout: str | CacheLayout | None,
    scale_layout: str | CacheLayout | None,
    batched: bool = False,
) -> Blocks:
    """Checks the arguments of a call.

    Args:
        name: What it calls the indices: "pairs" or "blocks".
        indices: `(n, 2)` or `(n,)`.
        caches: The key and the value cache, or the one array of both.
        scale_caches: Those of key and value, or none.
        layout: Of the caches.
        scale_layout: Of the scale caches.
        batched: Whether all arrays have a batch in front.

    Raises:
        ValueError: a shape, a layout or a device does not fit, or elements of an array overlap.
        TypeError: a dtype or a type does not fit.
    """
    shape: tuple[int | str, ...] = ("n", 2) if name == "pairs" else ("n",)
    check_indices(name, indices, (indices.shape[0], *shape) if batched else shape)
    found = check_arrays("", caches, scale_caches, layout, scale_layout, batched)
    named = zip(found.names, (*caches, *scale_caches), strict=True)
    check_devices([(name, indices), *named], found.names[0], caches[0])
    return Blocks(found.arrays, found.num_blocks, indices, batched, found.layout, found.scale_layout)


class BlockArrays(NamedTuple):
    """The arrays of a cache, as far as blocks are concerned.

    Attributes:
        names: What errors call them.
        arrays: Caches, then scale caches.
        sizes: Of each one's axes, by their names.
        num_blocks: Blocks of each.
        layout: Of the caches.
        scale_layout: Of the scale caches; None where there are none.
    """

    names: tuple[str, ...]
    arrays: tuple[BlockArray, ...]
    sizes: tuple[dict[str, int], ...]
    num_blocks: int
    layout: CacheLayout
    scale_layout: CacheLayout | None


def check_arrays(
    prefix: str,
    caches: Sequence[ArraySpec],
    scale_caches: Sequence[ArraySpec],
    layout: str | CacheLayout | None,
    scale_layout: str | CacheLayout | None,
    batched: bool,
) -> BlockArrays:
    """Checks the arrays of one cache, wherever they are.

    Args:
        prefix: What errors put in front of the arrays' names.
        caches: The key and the value cache, or the one array of both.
        scale_caches: Those of key and value, or none.
        layout: Of the caches.
        scale_layout: Of the scale caches.
        batched: Whether all arrays have a batch in front.

    Raises:
        ValueError: a shape or a layout does not fit, or elements of an array overlap.
        TypeError: a dtype or a type does not fit.
    """
    items = [_item(cache) if batched else cache for cache in (*caches, *scale_caches)]
    chosen = _layout(layout, items[: len(caches)])
    axes: list[Sequence[Axis]] = list(chosen.arrays)
    scale_chosen = scale_layout_of(scale_layout, chosen.has_layer) if scale_caches else None
    if scale_chosen is not None:
        axes += [scale_axes[:-1] for scale_axes in scale_chosen.arrays]
    names = tuple(prefix + name for name in array_names(len(caches), len(scale_caches)))
    tables = []
    for i, (name, array_axes, item) in enumerate(zip(names, axes, items, strict=True)):
        _check_dtype(name, item, of_scales=i >= len(caches))
        if len(item.shape) != len(array_axes):
            raise ValueError(
                f"{name} must have {len(array_axes)} axes ({spell(array_axes)}), got shape {shape_of(item)}"
            )
        tables.append(axis_table(name, tuple(array_axes), item.shape, item.steps, item.strides is None))
        for axis in ("block", "layer"):
            wanted, got = (table[0].get(axis) for table in (tables[0], tables[-1]))
            if wanted != got:
                raise ValueError(f"{name} axis {axis} must have size {wanted}, as in {names[0]}, got {got}")
    if len(caches) == 2:
        check_same_dtype(names[1], caches[1], names[0], caches[0])
    arrays = tuple(
        _array(spec, sizes, steps, batched)
        for spec, (sizes, steps) in zip((*caches, *scale_caches), tables, strict=True)
    )
    sizes = tuple(table[0] for table in tables)
    return BlockArrays(names, arrays, sizes, sizes[0]["block"], chosen, scale_chosen)


def _array(spec: ArraySpec, sizes: dict[str, int], steps: dict[str, int], batched: bool) -> BlockArray:
    front, front_step = ((spec.shape[0],), (spec.steps[0],)) if batched else ((), ())
    names = list(sizes)
    return BlockArray(
        (*front, *sizes.values()), (*front_step, *(steps[n] for n in names)), batched + names.index("block"), spec.dtype
    )


def _item(batch: ArraySpec) -> ArraySpec:
    """The spec of one item of a batch."""
    return batch._replace(shape=batch.shape[1:], strides=None if batch.strides is None else batch.strides[1:])


def _layout(layout: str | CacheLayout | None, caches: Sequence[ArraySpec]) -> CacheLayout:
    """The layout that is meant. NHD stands for HND, too: either has its blocks in front."""
    if layout is None and len(caches) == 2 and [len(cache.shape) for cache in caches] == [5, 5]:
        raise ValueError("layout must be given where key_cache and value_cache have 5 axes each, got None")
    chosen = layout_of(layout, caches, None)
    if len(chosen.arrays) != len(caches):
        wanted = "one array" if chosen.single_array else "(key_cache, value_cache)"
        raise ValueError(f"caches must be {wanted} for layout '{chosen}', got {len(caches)} arrays")
    return chosen


def _check_dtype(name: str, spec: ArraySpec, of_scales: bool) -> None:
    """Checks that an array is of what a cache, or a scale cache, may be of."""
    allowed = ("float32",) if of_scales else DTYPES
    if spec.dtype not in allowed:
        raise TypeError(f"{name} must have dtype {either(allowed)}, got {spec.dtype}")
