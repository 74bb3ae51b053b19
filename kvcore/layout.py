"""CacheLayout: where every element of a paged KV cache lives.

A layout is a pattern that names an array's axes from the slowest to the fastest::

    block slot head dim                               NHD: one array for K, one of the same shape for V
    block head dim/x slot x, block head dim slot      head-major: K packed in runs of x, V with slots innermost
    kv block slot head dim                            one array, K at kv = 0 and V at kv = 1
    block slot head k+v                               one array, K's head_size elements, then V's head_size_v
    block slot (head kv) dim                          one array, heads of K and V alternate
    block slot latent                                 MLA: one head; K is the whole row, V its first elements
    layer block slot head dim                         any of these for all layers at once

"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

from kvcore.arrays import check_integers, contiguous_strides, python_integers
from kvcore.pattern import AXES, CONSTANTS, VLLM, Axis, MeshAxes, from_json, mesh_axes, parse, spell, to_json, validate
from kvcore.placement import Placement, place


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
        patterns = [spell(parse(p)) for p in self.pattern.split(",")]
        normal = ", ".join(patterns)
        object.__setattr__(self, "pattern", normal)
        validate(normal, self.arrays)
        if patterns[1:] == patterns[:1]:  # said twice of two arrays, which one pattern means too
            object.__setattr__(self, "pattern", patterns[0])

    @classmethod
    def of(cls, layout: "str | CacheLayout") -> "CacheLayout":
        """The layout that a pattern or a constant's name (`"HND"`, in any case) stands for; layouts pass through."""
        if isinstance(layout, CacheLayout):
            return layout
        return _from_pattern(layout) if isinstance(layout, str) else cls(layout)

    @classmethod
    def from_vllm(cls, name: str) -> "CacheLayout":
        """The layout that vLLM calls so: one array for all layers, with K and V side by side along its last axis.

        Args:
            name: The order of layers (L), blocks (B), heads (H), slots (N) and K and V (C): "LBHNC", which is vLLM's
                default, "LBNHC", "LHBNC", "BLHNC", "BLNHC" or "BHLNC", in any case.

        Raises:
            ValueError: vLLM has no layout of that name.
            TypeError: `name` is no string.

        >>> CacheLayout.from_vllm("BLHNC")
        CacheLayout('block layer head slot k+v')
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        if name.strip().upper() not in VLLM:
            raise ValueError(f"name must be one of {', '.join(VLLM)}, got {name!r}")
        return _from_pattern(VLLM[name.strip().upper()])

    def to_json(self) -> str:
        """The layout as JSON, for other programs, and for `from_json`.

        An object of two keys. `version` is 1; what that means will not change. `arrays` has a list for the one array of
        K and V, or one for the key and one for the value cache: their axes from the slowest to the fastest, each a list
        of names. An axis of two names is two joined ones, the second varies faster. The names are those of patterns.

        >>> CacheLayout.INTERLEAVED.to_json()
        '{"version": 1, "arrays": [[["block"], ["slot"], ["head", "kv"], ["dim"]]]}'
        """
        return to_json(self.arrays)

    @classmethod
    def from_json(cls, text: str | bytes) -> "CacheLayout":
        """The layout that `to_json` gave the JSON of.

        Raises:
            ValueError: it is no JSON, or of no layout, or of another version.
            TypeError: `text` is no text.

        >>> CacheLayout.from_json('{"version": 1, "arrays": [[["block"], ["slot"], ["latent"]]]}')
        CacheLayout.MLA
        """
        return cls(from_json(text))

    @cached_property
    def arrays(self) -> tuple[tuple[Axis, ...], ...]:
        """Axes of each array, slowest first: one entry for a single array, two for key and value cache."""
        parsed = tuple(parse(p) for p in self.pattern.split(","))
        names = [name for axis in parsed[0] for name in axis]
        return parsed if len(parsed) > 1 or not {"kv", "k+v", "latent"}.isdisjoint(names) else parsed * 2

    @cached_property
    def single_array(self) -> bool:
        """Whether K and V share one array."""
        return len(self.arrays) == 1

    @cached_property
    def has_layer(self) -> bool:
        """Whether the arrays hold all layers."""
        return any("layer" in axis for axis in self.arrays[0])

    @cached_property
    def packed(self) -> bool:
        """Whether K and V lie side by side along one axis (`k+v`), so that their head sizes may differ."""
        return any("k+v" in axis for axis in self.arrays[0])

    @cached_property
    def latent(self) -> bool:
        """Whether V is the first elements of K (`latent`), of a single head."""
        return any("latent" in axis for axis in self.arrays[0])

    def with_layer(self) -> "CacheLayout":
        """The same layout for all layers at once: `layer` in front; itself if it has the axis already."""
        if self.has_layer:
            return self
        return CacheLayout(", ".join(f"layer {p.strip()}" for p in self.pattern.split(",")))

    def partition_spec(
        self, *, heads: MeshAxes = None, blocks: MeshAxes = None, layers: MeshAxes = None
    ) -> tuple[tuple[MeshAxes, ...], ...]:
        """The mesh axes over which each array is split: of each axis, as `jax.sharding.PartitionSpec(*spec)` takes it.

        Arguments are mesh axes, by name; None: not split. A latent row has no heads, and every device has the whole.

        Raises:
            ValueError: the layout has no such axis, or has it joined with another that varies slower.

        >>> CacheLayout.HND.with_layer().partition_spec(heads="tp", layers="pp")[0]
        ('pp', None, 'tp', None, None)
        """
        return tuple(mesh_axes(self.pattern, axes, head=heads, block=blocks, layer=layers) for axes in self.arrays)

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
        of_axis = {"layer": num_layers, "block": num_blocks, "slot": block_size, "head": num_heads, "x": x}
        named = {name for axes in self.arrays for axis in axes for name in axis}
        for name, size in (*of_axis.items(), ("dim", head_size), ("dim", size_v)):
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
        sizes: dict[str, int] = {name: size for name, size in of_axis.items() if size is not None}
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
        return place(self.pattern, self.arrays, shapes, strides, head_size, head_size_v, names, apart)

    def __str__(self) -> str:
        return self.pattern

    def __repr__(self) -> str:
        name = next((n for n in CONSTANTS if getattr(CacheLayout, n) == self), None)
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
                f"{spell((axis,))} {size} × {stride}"
                for axis, size, stride in zip(axes, shape, contiguous_strides(shape), strict=True)
            )
            for name, axes, shape in zip(names, self.arrays, shapes, strict=True)
        )


@lru_cache
def _from_pattern(pattern: str) -> CacheLayout:
    name = pattern.strip().upper()
    if name in CONSTANTS:
        return getattr(CacheLayout, name)
    if name.isidentifier() and name.lower() not in AXES:
        raise ValueError(
            f"layout must be one of {', '.join(CONSTANTS)}, or a pattern of the axes {', '.join(AXES)}, got '{pattern}'"
        )
    return CacheLayout(pattern)


for _name, _pattern in CONSTANTS.items():
    setattr(CacheLayout, _name, CacheLayout(_pattern))
