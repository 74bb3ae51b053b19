"""Addresses: where K and V lie in arrays of given shapes and strides.

Every layout is affine, so eight integers say where all elements of K, or of V, are, to all kernels and both frameworks.
"""

from typing import NamedTuple

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
