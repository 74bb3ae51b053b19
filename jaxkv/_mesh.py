"""Device meshes and partition specs: which arrays of a call may be split, along which axis, over which mesh axes.

Only heads are ever split: every device has all slots of some heads, so that no op needs to communicate.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv._call import CacheOperands, CacheOptions
from jaxkv._views import Heads
from kvcore import scales
from kvcore.contract.views import groups_error, split_error
from kvcore.formats import NVFP4
from kvcore.pattern import Axis


def used_spec(sharding: NamedSharding) -> P:
    """The spec of a sharding without mesh axes of size 1, over which nothing is split."""

    def used(mesh_axes: Any) -> Any:
        names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
        kept = tuple(name for name in names if sharding.mesh.shape[name] > 1)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*(None if mesh_axes is None else used(mesh_axes) for mesh_axes in sharding.spec))


def explicit_axes(array: Any) -> tuple[Any, set[str]]:
    """The mesh that an array is on, and those of its axes that are part of the array's type."""
    mesh = jax.typeof(array).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, {name for name, kind in kinds if kind == AxisType.Explicit}


def varying_axes(arrays: Any) -> frozenset[str]:
    """The mesh axes of a shard_map along which any array of a pytree differs."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)))


def vary(arrays: Any, mesh_axes: frozenset[str]) -> Any:
    """The arrays of a pytree, as ones that may differ along these mesh axes."""

    def cast(array: Any) -> Any:
        missing = tuple(sorted(mesh_axes - varying_axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, arrays)


# ---- how a cache is split


def head_mesh_axes(options: CacheOptions, specs: Sequence[P]) -> Any:
    """The mesh axes over which the heads of a cache are split; None if they are not.

    Args:
        options: Of the cache.
        specs: Of its arrays: of the caches, then of the scale caches.

    Raises:
        ValueError: another axis is split, or only one of key and value cache, or heads that share a region of nvfp4.
    """
    layout = options.layout
    every = [_head_mesh_axes(axes, spec) for axes, spec in zip(options.arrays, specs, strict=True)]
    splits = every[: len(layout.arrays)]  # scale caches follow the caches
    if len({str(split) for split in splits}) > 1:
        raise ValueError(f"key_cache and value_cache must be split alike over heads, got {splits[0]} and {splits[1]}")
    if splits[0] is not None:
        check_regions(options, splits[0])
    return splits[0]


def check_regions(options: CacheOptions, mesh_axes: Any) -> None:
    """Raises a ValueError where no part of a cache's array has some heads, which are split over mesh axes."""
    if heads_share_regions(options):
        raise ValueError(
            f"a cache of nvfp4 may be split over heads only where its layout has them before block, as in "
            f"'head block slot dim', got '{options.layout}' split over {mesh_axes}; jax.shard_map can give each device "
            "a cache of its own heads"
        )


def _head_mesh_axes(axes: Sequence[Axis], spec: P) -> Any:
    """The mesh axes over which the heads of one array are split; an error if anything else is."""
    split = None
    for axis, mesh_axes in _split_axes(axes, spec):
        if axis[0] != "head":  # of a joined (kv head), devices would get K or V
            raise ValueError(
                f"a cache may be split over heads only, got axis {' '.join(axis)} split over {mesh_axes}; "
                "jax.shard_map can give each device blocks of its own"
            )
        split = mesh_axes
    return split


def mesh_axes_by_name(axes: Sequence[Axis], spec: P) -> dict[str, Any]:
    """The mesh axes over which heads, blocks and layers of a cache are split, by the name of the cache's axis.

    Raises:
        ValueError: anything else is split; then no device has whole rows of a head, which even `jax.shard_map` needs.
    """
    split = {}
    for axis, mesh_axes in _split_axes(axes, spec):
        if axis[0] not in ("head", "block", "layer"):  # of a joined (kv head), devices would get K or V
            raise ValueError(
                f"a cache may be split over heads, blocks and layers only, got axis {' '.join(axis)} split over "
                f"{mesh_axes}"
            )
        split[axis[0]] = mesh_axes
    return split


def _split_axes(axes: Sequence[Axis], spec: P) -> list[tuple[Axis, Any]]:
    """The axes of an array that are split, each with its mesh axes."""
    padded = (*spec, *(None,) * (len(axes) - len(spec)))
    return [(axis, mesh_axes) for axis, mesh_axes in zip(axes, padded, strict=True) if mesh_axes is not None]


def check_whole_blocks(options: CacheOptions, specs: Sequence[P]) -> None:
    """Checks that no array of a cache is split over blocks.

    Args:
        options: Of the cache.
        specs: Of its arrays, without a batch's axis: of the caches, then of the scale caches.

    Raises:
        ValueError: one is.
    """
    for axes, spec in zip(options.arrays, specs, strict=True):
        for axis, mesh_axes in _split_axes(axes, spec):
            if "block" in axis:
                raise _split_blocks_error(axis, mesh_axes)


def check_block_parts(options: CacheOptions, operands: Any) -> None:
    """As `check_whole_blocks`, of operands that are types with shardings of XLA's, maybe with a batch in front.

    Raises:
        ValueError: an array is split over blocks.
    """
    for axes, array in zip(options.arrays, operands.cache.memory, strict=True):
        parts = _num_parts(array)[-len(axes) :]
        for axis, count in zip(axes, parts, strict=True):
            if "block" in axis and count > 1:
                raise _split_blocks_error(axis, f"{count} devices")


def _split_blocks_error(axis: Axis, split: Any) -> ValueError:
    return ValueError(
        f"a cache whose blocks are moved must not be split over them, got axis {' '.join(axis)} split over {split}; "
        "jax.shard_map can give each device blocks of its own"
    )


def heads_share_regions(options: CacheOptions) -> bool:
    """Whether blocks hold the elements of all heads, then the scales of all, so that no part of one has some heads."""
    return options.kv_cache_dtype == NVFP4.name and scales.heads_share_regions(options.layout)


# ---- specs


def replicated(operands: Any) -> Any:
    """Specs of operands that are not split."""
    return jax.tree.map(lambda array: P(*(None,) * len(array.shape)), operands)


def cache_specs(options: CacheOptions, operands: CacheOperands, mesh_axes: Any) -> CacheOperands:
    """Specs of a cache's arrays with heads split over mesh axes, and nothing else."""
    memory = [P(*(mesh_axes if "head" in axis else None for axis in axes)) for axes in options.arrays]
    return (
        replicated(operands)
        .with_memory(memory)
        ._replace(k_scale=_scale_spec(operands.k_scale, mesh_axes), v_scale=_scale_spec(operands.v_scale, mesh_axes))
    )


def head_specs(rows: Any, mesh_axes: Any) -> Any:
    """The spec of key, value or query with heads split over mesh axes; of a view, in place of its array.

    Heads of groups are split by splitting the groups. `check_views` refuses those of other views.
    """
    if not isinstance(rows, Heads):
        return P(None, mesh_axes, None)
    return replicated(rows) if rows.num_groups is None else rows.with_array(P(None, mesh_axes, None, None))


def head_factor(rows: Any, factor: str | None) -> Any:
    """As `head_specs`, for a factor of heads in place of mesh axes: without it where no axis has one entry a head."""
    one_a_head = not isinstance(rows, Heads) or rows.num_groups == rows.shape[1]
    return head_specs(rows, factor if one_a_head else None)


def query_mesh_axes(mesh_axes: Any, spec: P, query: Any, num_heads: int) -> Any:
    """The mesh axes over which attention splits query heads: those of the KV heads, `mesh_axes`, and maybe more.

    Devices that have one KV head may have it in common, and take query heads of their own.

    Args:
        mesh_axes: Over which the KV heads of the cache are split; None if they are not.
        spec: That query has.
        query: An array with a mesh.
        num_heads: KV heads of the cache.
    """
    present, needed = _names((*spec, None, None)[1]), _names(mesh_axes)
    mesh = jax.typeof(query).sharding.mesh
    if present[: len(needed)] == needed and num_heads == (_num_devices(mesh, mesh_axes) if needed else 1):
        return present if len(present) > 1 else present[0] if present else None
    return mesh_axes


def check_views(operands: Any, specs: Any, mesh_axes: Any) -> None:
    """Checks that views of heads can be split as the heads of the caches are, and are not split in a way of their own.

    Args:
        operands: Of an op; arrays with a mesh, of which only shapes count.
        specs: That they have.
        mesh_axes: Over which heads are split; None if they are not.

    Raises:
        ValueError: heads that follow each other are split: a device has no way to know which of them are its own.
    """
    present = specs.named()
    for name, view in _views(operands):
        shape, mesh = view.array.shape, jax.typeof(view.array).sharding.mesh
        devices = _num_devices(mesh, mesh_axes)
        if view.num_groups is not None and view.num_groups % devices:
            raise groups_error(name, shape, devices)
        if view.kind in ("heads", "flat"):
            devices = max(devices, _num_devices(mesh, (*present[name].array, None, None)[1]))
            if devices > 1:
                raise split_error(name, shape, devices)


def check_split_views(options: CacheOptions, operands: Any) -> None:
    """Checks views whose arrays XLA has split, or the caches: a device must have whole heads, and know which ones.

    Args:
        options: Of the cache.
        operands: Of an op; types with shardings.

    Raises:
        ValueError: it has not, or does not.
    """
    cache = operands.cache.caches[0]
    axes = zip(options.arrays[0], _num_parts(cache), strict=True)
    of_cache = max((parts for axis, parts in axes if "head" in axis), default=1)
    for name, view in _views(operands):
        parts = _num_parts(view.array)[1 if view.num_groups is None else 2 :]
        devices = max(*parts, of_cache if view.kind in ("heads", "flat") else 1)
        if devices > 1:
            raise split_error(name, view.array.shape, devices)


def _num_parts(array: Any) -> list[int]:
    """Into how many parts each axis of an array is split; an axis without entries into none."""
    return [
        -(-size // max(part, 1))
        for size, part in zip(array.shape, array.sharding.shard_shape(array.shape), strict=True)
    ]


def _views(operands: Any) -> list[tuple[str, Heads]]:
    return [(name, operand) for name, operand in operands.named().items() if isinstance(operand, Heads)]


def _num_devices(mesh: Any, mesh_axes: Any) -> int:
    """Devices along mesh axes."""
    return math.prod(mesh.shape[name] for name in _names(mesh_axes))


def _names(mesh_axes: Any) -> tuple[str, ...]:
    """Mesh axes as a tuple of their names."""
    return mesh_axes if isinstance(mesh_axes, tuple) else () if mesh_axes is None else (mesh_axes,)


def _scale_spec(scale: Any | None, mesh_axes: Any) -> P | None:
    """The spec of a static scale: where each head has one, they are split with the heads."""
    if scale is None:
        return None
    *layers, heads = scale.shape
    return P(*(None for _ in layers), mesh_axes if heads > 1 else None)
