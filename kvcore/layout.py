"""CacheLayout: where every element of a paged KV cache lives.

A layout is a pattern that names an array's axes from the slowest to the fastest::

    block slot head dim                               NHD: one array for K, one of the same shape for V
    block head dim/x slot x, block head dim slot      head-major: K packed in runs of x, V with slots innermost
    kv block slot head dim                            one array, K at kv = 0 and V at kv = 1
    block slot head k+v                               one array, K's head_size elements, then V's head_size_v
    block slot (head kv) dim                          one array, heads of K and V alternate
    block slot latent                                 MLA: one head; K is the whole row, V its first elements
    layer block slot head dim                         any of these for all layers at once

Every one of them is affine, so an `Address` of nine integers serves all kernels and both frameworks.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

_NAMES = ("layer", "block", "slot", "head", "kv", "dim", "dim/x", "x", "k+v", "latent")
_TOKEN = re.compile(r"\(\s*([^()]*?)\s*\)|(\S+)")

Axis = tuple[str, ...]
"""One axis of an array: a single name, or `kv` and another name in the order in which they vary."""


class Extents(NamedTuple):
    """Sizes of a cache. `num_layers` is None without a `layer` axis."""

    num_layers: int | None
    num_blocks: int
    block_size: int
    num_heads: int
    head_size: int
    head_size_v: int

    @property
    def num_slots(self) -> int:
        """Slots of one layer: `num_blocks * block_size`."""
        return self.num_blocks * self.block_size


class Address(NamedTuple):
    """Where K, or V, lives in its array. All numbers count elements.

    Element (layer, block, slot, head, dim) is at
    `offset + layer·L + block·B + slot·S + head·H + (dim // x)·D + (dim % x)·X`.
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
        """Position of one element, in elements from the array's first."""
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


@dataclass(frozen=True)
class CacheLayout:
    """Order of the axes of a paged KV cache, as a pattern (see the module's docstring).

    Frozen, hashable and comparable; patterns that differ in white space only are equal.

    A shape does not tell NHD from HND where num_heads is block_size: with the wrong one of the two nothing fails, and
    tokens lie where other programs do not look for them. Name the layout of caches that come from elsewhere.

    Args:
        pattern: One pattern, for one array with a `kv` axis, a `(head kv)` axis or a `k+v` axis, or for two
            arrays of like order; or two patterns separated by a comma, for the key and the value cache.

    Raises:
        TypeError: `pattern` is no string.
        ValueError: an axis is unknown, missing, or named twice; the message names it.
    """

    pattern: str

    NHD: ClassVar["CacheLayout"]
    HND: ClassVar["CacheLayout"]
    HEAD_MAJOR: ClassVar["CacheLayout"]
    PALLAS: ClassVar["CacheLayout"]
    KV_NHD: ClassVar["CacheLayout"]
    BLOCK_KV_NHD: ClassVar["CacheLayout"]
    BLOCK_KV_HND: ClassVar["CacheLayout"]
    PACKED_NHD: ClassVar["CacheLayout"]
    PACKED_HND: ClassVar["CacheLayout"]
    INTERLEAVED: ClassVar["CacheLayout"]
    MLA: ClassVar["CacheLayout"]

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"layout must be a pattern string or a CacheLayout, got {self.pattern!r}")
        normal = ", ".join(_spell(_parse(p)) for p in self.pattern.split(","))
        object.__setattr__(self, "pattern", normal)
        _validate(normal, self.arrays)

    @classmethod
    def of(cls, layout: "str | CacheLayout") -> "CacheLayout":
        """The layout that a pattern or a constant's name (`"HND"`, in any case) stands for; layouts pass through."""
        if isinstance(layout, CacheLayout):
            return layout
        return _from_pattern(layout) if isinstance(layout, str) else cls(layout)

    @cached_property
    def arrays(self) -> tuple[tuple[Axis, ...], ...]:
        """Axes of each array, slowest first: one entry for a single array, two for key and value cache."""
        parsed = tuple(_parse(p) for p in self.pattern.split(","))
        names = [name for axis in parsed[0] for name in axis]
        return parsed if len(parsed) > 1 or not {"kv", "k+v", "latent"}.isdisjoint(names) else parsed * 2

    @property
    def single_array(self) -> bool:
        """Whether K and V share one array."""
        return len(self.arrays) == 1

    @property
    def has_layer(self) -> bool:
        """Whether the arrays hold all layers."""
        return any("layer" in axis for axis in self.arrays[0])

    @property
    def packed(self) -> bool:
        """Whether K and V lie side by side along one axis (`k+v`), so that their head sizes may differ."""
        return any("k+v" in axis for axis in self.arrays[0])

    @property
    def latent(self) -> bool:
        """Whether V is the first elements of K (`latent`), of a single head."""
        return any("latent" in axis for axis in self.arrays[0])

    def with_layer(self) -> "CacheLayout":
        """The same layout for all layers at once: `layer` in front; itself if it has the axis already."""
        if self.has_layer:
            return self
        return CacheLayout(", ".join(f"layer {p.strip()}" for p in self.pattern.split(",")))

    def shapes(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_size: int,
        head_size_v: int | None = None,
        num_layers: int | None = None,
        x: int | None = None,
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arrays: `(key_cache, value_cache)`, or `(kv_cache,)` for a single array.

        Args:
            num_blocks: Blocks, per layer.
            block_size: Slots per block.
            num_heads: KV heads.
            head_size: Elements of a key head.
            head_size_v: Elements of a value head; None means `head_size`.
            num_layers: Layers; needed exactly with a `layer` axis.
            x: Elements of a packed run; needed exactly with an `x` axis. 16 bytes' worth is usual: 8 for
                bfloat16.

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
        given = {"layer": num_layers, "block": num_blocks, "slot": block_size, "head": num_heads, "x": x}
        named = {name for axes in self.arrays for axis in axes for name in axis}
        for name, size in (*given.items(), ("dim", head_size), ("dim", size_v)):
            if size is None and name in named:
                raise ValueError(f"layout '{self}' needs the size of axis {name}, got None")
            if size is not None and name not in named and name in ("layer", "x"):
                raise ValueError(f"layout '{self}' has no axis {name}, got size {size} for it")
            if size is not None and size < 1:
                raise ValueError(f"axis {name} must have a positive size, got {size}")
        dims = {"head_size": head_size, "head_size_v": size_v}
        for axes, (name, size) in zip(self.arrays, dims.items(), strict=False):
            if x is not None and ("x",) in axes and size % x:
                raise ValueError(f"axis x of size {x} must divide {name} = {size}")
        if self.latent and (num_heads != 1 or size_v > head_size):
            raise ValueError(
                f"layout '{self}' needs num_heads = 1 and head_size_v of at most head_size = {head_size} along axis "
                f"latent, got {num_heads} and {size_v}"
            )
        if self.single_array and not (self.packed or self.latent) and size_v != head_size:
            raise ValueError(
                f"layout '{self}' needs head_size_v = head_size along axis dim, got {size_v} and {head_size}"
            )
        sizes: dict[str, int] = {name: size for name, size in given.items() if size is not None}
        out = []
        for axes, dim in zip(self.arrays, (head_size, size_v), strict=False):
            sizes |= {"dim": dim, "dim/x": dim // (x or 1), "kv": 2, "k+v": head_size + size_v, "latent": head_size}
            out.append(tuple(math.prod(sizes[name] for name in axis) for axis in axes))
        return tuple(out)

    def place(
        self,
        shapes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int] | None] | None = None,
        *,
        head_size: int | None = None,
        head_size_v: int | None = None,
        names: Sequence[str] | None = None,
        apart: bool = False,
    ) -> Placement:
        """Finds K and V in arrays of these shapes.

        Args:
            shapes: A shape for each array, as from `shapes`.
            strides: Strides of each array, in elements; None, for one or for all, means C order (as JAX
                arrays have).
            head_size: Elements of a key head; needed for a `k+v` axis, which does not tell where V begins.
            head_size_v: Elements of a value head; needed for a `latent` axis, which does not tell where V ends.
            names: What errors call the arrays.
            apart: Whether the strides are known to keep elements apart, as those of C order are.

        Returns:
            The extents, and the addresses of K and of V.

        Raises:
            ValueError: a rank or an extent does not fit, or elements overlap; the message names the axis.
        """
        names = names or array_names(len(self.arrays))
        if len(shapes) != len(self.arrays):
            raise ValueError(f"layout '{self}' describes {len(self.arrays)} arrays, got {len(shapes)} shapes")
        found = [
            _axis_table(name, axes, tuple(shape), tuple(stride or contiguous_strides(shape)), apart or stride is None)
            for name, axes, shape, stride in zip(
                names, self.arrays, shapes, strides or [None] * len(shapes), strict=True
            )
        ]
        key_sizes, key = found[0]
        value_sizes, value = found[-1]
        dims = [sizes["dim"] if "dim" in sizes else sizes["dim/x"] * sizes["x"] for sizes in (key_sizes, value_sizes)]
        offset_v = 0
        if self.packed:
            if head_size is None:
                raise ValueError(f"layout '{self}' needs head_size to split axis k+v, got None")
            if head_size < 1:
                raise ValueError(f"head_size must be positive, got {head_size}")
            if head_size >= dims[0]:
                raise ValueError(f"{names[0]} axis k+v must have a size above head_size = {head_size}, got {dims[0]}")
            offset_v = head_size * key["dim"]
            dims = [head_size, dims[0] - head_size]
        elif self.latent:
            if head_size_v is None:
                raise ValueError(f"layout '{self}' needs head_size_v, the part of axis latent that is V, got None")
            if not 1 <= head_size_v <= dims[0]:
                raise ValueError(
                    f"head_size_v must be from 1 to {dims[0]}, {names[0]}'s axis latent, got {head_size_v}"
                )
            dims[1] = head_size_v
        elif self.single_array:
            offset_v = key["kv"]
        for axis in ("layer", "block", "slot", "head"):
            if key_sizes.get(axis) != value_sizes.get(axis):
                raise ValueError(
                    f"{names[-1]} axis {axis} must have size {key_sizes[axis]}, as in {names[0]}, "
                    f"got {value_sizes[axis]}"
                )
        extents = Extents(key_sizes.get("layer"), key_sizes["block"], key_sizes["slot"], key_sizes["head"], *dims)
        return Placement(extents, _address(key_sizes, key, 0), _address(value_sizes, value, offset_v))

    def __str__(self) -> str:
        return self.pattern

    def __repr__(self) -> str:
        name = next((n for n in _CONSTANTS if getattr(CacheLayout, n) == self), None)
        return f"CacheLayout.{name}" if name else f"CacheLayout({self.pattern!r})"

    def describe(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_size: int,
        head_size_v: int | None = None,
        num_layers: int | None = None,
        x: int | None = None,
    ) -> str:
        """What memory looks like for these extents (the arguments of `shapes`), one line an array.

        >>> print(CacheLayout.HND.describe(num_blocks=1024, block_size=16, num_heads=8, head_size=128))
        key_cache    block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1
        value_cache  block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1

        Each axis is `name size × stride`, slowest first; strides count elements.
        """
        shapes = self.shapes(
            num_blocks=num_blocks, block_size=block_size, num_heads=num_heads, head_size=head_size,
            head_size_v=head_size_v, num_layers=num_layers, x=x,
        )  # fmt: skip
        names = ("kv_cache",) if self.single_array else ("key_cache  ", "value_cache")
        return "\n".join(
            f"{name}  "
            + " | ".join(
                f"{_spell((axis,))} {size} × {stride}"
                for axis, size, stride in zip(axes, shape, contiguous_strides(shape), strict=True)
            )
            for name, axes, shape in zip(names, self.arrays, shapes, strict=True)
        )


def check_integers(**sizes: Any) -> None:
    """Integers of Python, of NumPy, or as a framework traces them; None is left out."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, (bool, np.bool_)) or not hasattr(size, "__index__")):
            raise TypeError(f"{name} must be an int, got {size!r}")


def python_integers(*sizes: Any) -> tuple[Any, ...]:
    """The same sizes, with Python's integers for NumPy's, whose products would overflow."""
    return tuple(int(size) if isinstance(size, np.integer) else size for size in sizes)


def array_names(num_caches: int, num_scale_caches: int = 0) -> tuple[str, ...]:
    """What schemas and errors call caches, and the scale caches that follow them."""
    caches = ("key_cache", "value_cache") if num_caches == 2 else ("kv_cache",)
    return (*caches, *("k_scale_cache", "v_scale_cache")[:num_scale_caches])


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """C-order strides, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@lru_cache
def _from_pattern(pattern: str) -> CacheLayout:
    name = pattern.strip().upper()
    if name in _CONSTANTS:
        return getattr(CacheLayout, name)
    if name.isidentifier() and name.lower() not in _NAMES:
        raise ValueError(
            f"layout must be one of {', '.join(_CONSTANTS)}, or a pattern of the axes {', '.join(_NAMES)}, "
            f"got '{pattern}'"
        )
    return CacheLayout(pattern)


def _parse(pattern: str) -> tuple[Axis, ...]:
    return tuple(tuple((group or name).split()) for group, name in _TOKEN.findall(pattern))


def _spell(axes: Sequence[Axis]) -> str:
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def _validate(pattern: str, arrays: tuple[tuple[Axis, ...], ...]) -> None:
    if len(pattern.split(",")) > 2:
        raise ValueError(f"layout must have one pattern or two, got {len(pattern.split(','))}: '{pattern}'")
    for axes in arrays:
        flat = [name for axis in axes for name in axis]
        for name in flat:
            if name not in _NAMES:
                raise ValueError(f"layout '{pattern}' has an unknown axis '{name}'; known are {', '.join(_NAMES)}")
            if flat.count(name) > 1:
                raise ValueError(f"layout '{pattern}' must name axis {name} once, got it {flat.count(name)} times")
        for name in ("block", "slot") if "latent" in flat else ("block", "slot", "head"):
            if name not in flat:
                raise ValueError(f"layout '{pattern}' must name axis {name}")
        if "latent" in flat and not {"head", "kv", "k+v", "dim", "dim/x", "x"}.isdisjoint(flat):
            raise ValueError(f"layout '{pattern}' may name only axes layer, block and slot beside latent")
        if sum(name in flat for name in ("dim", "dim/x", "k+v", "latent")) != 1:
            raise ValueError(f"layout '{pattern}' must name exactly one of the axes dim, dim/x and k+v")
        if ("dim/x" in flat) != ("x" in flat):
            raise ValueError(f"layout '{pattern}' must name axes dim/x and x together")
        for name in ("kv", "k+v", "latent"):
            if len(arrays) == 2 and name in flat:
                raise ValueError(f"layout '{pattern}' has two arrays, so neither may have axis {name}")
        if "kv" in flat and "k+v" in flat:
            raise ValueError(f"layout '{pattern}' must name only one of the axes kv and k+v")
        for axis in axes:
            if len(axis) != 1 and (len(axis) != 2 or "kv" not in axis):
                raise ValueError(f"layout '{pattern}' may join only kv with one other axis, got ({' '.join(axis)})")
    if len({"layer" in [name for axis in axes for name in axis] for axes in arrays}) > 1:
        raise ValueError(f"layout '{pattern}' must name axis layer for both arrays or for none")


def _axis_table(
    name: str, axes: tuple[Axis, ...], shape: tuple[int, ...], strides: tuple[int, ...], apart: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and strides by axis name, with joined axes taken apart, and `k+v` and `latent` called dim."""
    if len(shape) != len(axes):
        raise ValueError(f"{name} must have {len(axes)} axes ({_spell(axes)}), got shape {shape}")
    sizes: dict[str, int] = {}
    steps: dict[str, int] = {}
    for axis, size, stride in zip(axes, shape, strides, strict=True):
        if len(axis) == 2:
            if size % 2:
                raise ValueError(f"{name} axis {_spell((axis,))} must have an even size, got {size}")
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
        _check_apart(name, sizes, steps)
    return sizes, steps


def _check_apart(name: str, sizes: dict[str, int], steps: dict[str, int]) -> None:
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


def _address(sizes: dict[str, int], steps: dict[str, int], offset: int) -> Address:
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


_CONSTANTS = {
    "NHD": "block slot head dim",
    "HND": "block head slot dim",
    "HEAD_MAJOR": "block head dim/x slot x, block head dim slot",
    "PALLAS": "head block slot dim",
    "KV_NHD": "kv block slot head dim",
    "BLOCK_KV_NHD": "block kv slot head dim",
    "BLOCK_KV_HND": "block kv head slot dim",
    "PACKED_NHD": "block slot head k+v",
    "PACKED_HND": "block head slot k+v",
    "INTERLEAVED": "block slot (head kv) dim",
    "MLA": "block slot latent",
}
for _name, _pattern in _CONSTANTS.items():
    setattr(CacheLayout, _name, CacheLayout(_pattern))
