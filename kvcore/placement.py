"""Addresses: where K and V lie in arrays of given shapes and strides.

Every layout is affine, so eight integers say where all elements of K, or of V, are, to all kernels and both frameworks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvcore.arrays import array_names, check_integers, contiguous_strides, python_integers
from kvcore.pattern import Axis, spell


class Extents(NamedTuple):
    """Sizes of a cache.

    Attributes:
        num_layers: None without a `layer` axis.
        num_blocks: Blocks of a layer.
        block_size: Slots of a block.
        num_heads: KV heads.
        head_units: Stored units of a head of K: its elements, or bytes that hold two of them.
        head_units_v: The same for a head of V.
    """

    num_layers: int | None
    num_blocks: int
    block_size: int
    num_heads: int
    head_units: int
    head_units_v: int

    @property
    def num_slots(self) -> int:
        """Slots of one layer: `num_blocks * block_size`."""
        return self.num_blocks * self.block_size


class Address(NamedTuple):
    """Where K, or V, lies in its array. All numbers count elements of the array.

    Element (layer, block, place, head, dim), where place is a slot's index in its block, is at
    `offset + layer·L + block·B + place·S + head·H + (dim // x)·D + (dim % x)·X`.
    """

    offset: int
    layer: int
    block: int
    slot: int
    head: int
    dim: int
    x: int
    x_stride: int

    def of(self, layer: int, block: int, slot: int, head: int, dim: int) -> int:
        """Offset of one element from the array's first. `slot` is a place: an index in the block."""
        return (
            self.offset
            + layer * self.layer
            + block * self.block
            + slot * self.slot
            + head * self.head
            + dim // self.x * self.dim
            + dim % self.x * self.x_stride
        )


class Placement(NamedTuple):
    """A layout applied to arrays of known shape and strides."""

    extents: Extents
    key: Address
    value: Address


def shapes_of(
    pattern: str,
    arrays: Sequence[tuple[Axis, ...]],
    *,
    num_blocks: int,
    block_size: int,
    num_heads: int,
    head_size: int,
    head_size_v: int | None,
    num_layers: int | None,
    x: int | None,
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays for these extents: `CacheLayout.shapes`, where they are described.

    Args:
        pattern: What errors call the layout.
        arrays: Its axes, of each array.
        num_blocks: See there.
        block_size: See there.
        num_heads: See there.
        head_size: See there.
        head_size_v: See there.
        num_layers: See there.
        x: See there.

    Raises:
        ValueError: an extent is missing, superfluous, not positive, or does not fit its axis.
        TypeError: an extent is no integer.
    """
    check_integers(
        num_blocks=num_blocks, block_size=block_size, num_heads=num_heads, head_size=head_size,
        head_size_v=head_size_v, num_layers=num_layers, x=x,
    )  # fmt: skip
    num_blocks, block_size, num_heads, head_size, head_size_v, num_layers, x = python_integers(
        num_blocks, block_size, num_heads, head_size, head_size_v, num_layers, x
    )
    size_v = head_size if head_size_v is None else head_size_v
    of_axis = {"layer": num_layers, "block": num_blocks, "slot": block_size, "head": num_heads, "x": x}
    named = {name for axes in arrays for axis in axes for name in axis}
    for name, size in (*of_axis.items(), ("dim", head_size), ("dim", size_v)):
        if size is None and name in named:
            raise ValueError(f"layout '{pattern}' needs the size of axis {name}, got None")
        if size is not None and name not in named and name in ("layer", "x"):
            raise ValueError(f"layout '{pattern}' has no axis {name}, got size {size} for it")
        if size is not None and size < 1:
            raise ValueError(f"axis {name} must have a positive size, got {size}")
    dims = {"head_size": head_size, "head_size_v": size_v}
    for axes, (name, size) in zip(arrays, dims.items(), strict=False):
        if x is not None and ("x",) in axes and size % x:
            raise ValueError(f"axis x of size {x} must divide {name} = {size}")
    if "latent" in named and (num_heads != 1 or size_v > head_size):
        raise ValueError(
            f"layout '{pattern}' needs num_heads = 1 and head_size_v of at most head_size = {head_size} along axis "
            f"latent, got {num_heads} and {size_v}"
        )
    if len(arrays) == 1 and named.isdisjoint(("k+v", "latent")) and size_v != head_size:
        raise ValueError(
            f"layout '{pattern}' needs head_size_v = head_size along axis dim, got {size_v} and {head_size}"
        )
    sizes: dict[str, int] = {name: size for name, size in of_axis.items() if size is not None}
    out = []
    for axes, dim in zip(arrays, (head_size, size_v), strict=False):
        sizes |= {"dim": dim, "dim/x": dim // (x or 1), "kv": 2, "k+v": head_size + size_v, "latent": head_size}
        out.append(tuple(math.prod(sizes[name] for name in axis) for axis in axes))
    return tuple(out)


def place(
    pattern: str,
    arrays: Sequence[tuple[Axis, ...]],
    shapes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int] | None] | None,
    head_size: int | None,
    head_size_v: int | None,
    names: Sequence[str] | None,
    apart: bool,
) -> Placement:
    """Finds K and V in arrays of these shapes: `CacheLayout.place`, where the arguments are described.

    Args:
        pattern: What errors call the layout.
        arrays: Its axes, of each array.
        shapes: A shape for each array.
        strides: Strides of each array, in elements; None means C order.
        head_size: Elements of a key head, or None.
        head_size_v: Elements of a value head, or None.
        names: What errors call the arrays.
        apart: Whether the strides are known to keep elements apart.

    Raises:
        ValueError: a rank or an extent does not fit, or elements overlap; the message names the axis.
    """
    names = names or array_names(len(arrays))
    if len(shapes) != len(arrays):
        raise ValueError(f"layout '{pattern}' describes {len(arrays)} arrays, got {len(shapes)} shapes")
    tables = [
        axis_table(name, axes, tuple(shape), tuple(stride or contiguous_strides(shape)), apart or stride is None)
        for name, axes, shape, stride in zip(names, arrays, shapes, strides or [None] * len(shapes), strict=True)
    ]
    key_sizes, key = tables[0]
    value_sizes, value = tables[-1]
    dims = [sizes["dim"] if "dim" in sizes else sizes["dim/x"] * sizes["x"] for sizes in (key_sizes, value_sizes)]
    offset_v = 0
    if ("k+v",) in arrays[0]:
        if head_size is None:
            raise ValueError(f"layout '{pattern}' needs head_size to split axis k+v, got None")
        if head_size < 1:
            raise ValueError(f"head_size must be positive, got {head_size}")
        if head_size >= dims[0]:
            raise ValueError(f"{names[0]} axis k+v must have a size above head_size = {head_size}, got {dims[0]}")
        offset_v = head_size * key["dim"]
        dims = [head_size, dims[0] - head_size]
    elif ("latent",) in arrays[0]:
        if head_size_v is None:
            raise ValueError(f"layout '{pattern}' needs head_size_v, the part of axis latent that is V, got None")
        if not 1 <= head_size_v <= dims[0]:
            raise ValueError(f"head_size_v must be from 1 to {dims[0]}, {names[0]}'s axis latent, got {head_size_v}")
        dims[1] = head_size_v
    elif len(arrays) == 1:
        offset_v = key["kv"]
    for axis in ("layer", "block", "slot", "head"):
        if key_sizes.get(axis) != value_sizes.get(axis):
            raise ValueError(
                f"{names[-1]} axis {axis} must have size {key_sizes[axis]}, as in {names[0]}, got {value_sizes[axis]}"
            )
    extents = Extents(key_sizes.get("layer"), key_sizes["block"], key_sizes["slot"], key_sizes["head"], *dims)
    return Placement(extents, address_of(key_sizes, key, 0), address_of(value_sizes, value, offset_v))


def axis_table(
    name: str, axes: tuple[Axis, ...], shape: tuple[int, ...], strides: tuple[int, ...], apart: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and strides by axis name, with joined axes taken apart, and `k+v` and `latent` called dim."""
    if len(shape) != len(axes):
        raise ValueError(f"{name} must have {len(axes)} axes ({spell(axes)}), got shape {shape}")
    sizes: dict[str, int] = {}
    steps: dict[str, int] = {}
    for axis, size, stride in zip(axes, shape, strides, strict=True):
        if len(axis) == 2:
            if size % 2:
                raise ValueError(f"{name} axis {spell((axis,))} must have an even size, got {size}")
            slow, fast = axis
            sizes |= {slow: 2, fast: size // 2} if slow == "kv" else {slow: size // 2, fast: 2}
            steps |= {slow: stride * sizes[fast], fast: stride}
        else:
            key = "dim" if axis[0] in ("k+v", "latent") else axis[0]
            sizes[key], steps[key] = size, stride
    if ("latent",) in axes:
        sizes["head"], steps["head"] = 1, 0
    if sizes.get("kv", 2) != 2:
        raise ValueError(f"{name} axis kv must have size 2, got {sizes['kv']}")
    if not apart and 0 not in sizes.values():
        _check_no_overlap(name, sizes, steps)
    return sizes, steps


def _check_no_overlap(name: str, sizes: dict[str, int], steps: dict[str, int]) -> None:
    """Raises unless every axis steps over all that the axes inside it reach."""
    inner = 1  # elements that the faster axes reach
    for axis in sorted(sizes, key=lambda n: (steps[n], sizes[n])):
        size, step = sizes[axis], steps[axis]
        if size > 1 and step == 0:
            raise ValueError(f"{name} axis {axis} with stride 0 puts its {size} elements in one place")
        if size > 1 and step < inner:
            raise ValueError(
                f"{name} axis {axis} with stride {step} overlaps the axes inside it, which reach {inner} elements"
            )
        inner += (size - 1) * step


def address_of(sizes: dict[str, int], steps: dict[str, int], offset: int) -> Address:
    """The address of K or V, from sizes and strides by axis name, and where it begins."""
    packed = "x" in steps
    return Address(
        offset=offset,
        layer=steps.get("layer", 0),
        block=steps["block"],
        slot=steps["slot"],
        head=steps["head"],
        dim=steps["dim/x" if packed else "dim"],
        x=sizes["x"] if packed else 1,
        x_stride=steps["x"] if packed else 0,
    )
