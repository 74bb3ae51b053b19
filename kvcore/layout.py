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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

from kvcore.drawing import Picture, draw
from kvcore.pattern import (
    CONSTANTS,
    Axis,
    MeshAxes,
    constant,
    from_json,
    from_vllm,
    mesh_axes,
    parse,
    spell,
    to_json,
    validate,
)
from kvcore.placement import Placement, place, shapes_of
from kvcore.strips import describe, small


@dataclass(frozen=True)
class CacheLayout:
    """Order of the axes of a paged KV cache, as a pattern from slowest to fastest, such as `block slot head dim`.

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
        for name in ("single_array", "has_layer", "packed", "latent"):  # now: torch.compile guards that one is missing,
            getattr(self, name)  # and then fails, or compiles again, when it is there

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

        Example:
            >>> CacheLayout.from_vllm("BLHNC")
            CacheLayout('block layer head slot k+v')
        """
        return _from_pattern(from_vllm(name))

    def to_json(self) -> str:
        """The layout as JSON, for other programs, and for `from_json`.

        An object of two keys. `version` is 1; what that means will not change. `arrays` has a list for the one array of
        K and V, or one for the key and one for the value cache: their axes from the slowest to the fastest, each a list
        of names. An axis of two names is two joined ones, the second varies faster. The names are those of patterns.

        Example:
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

        Example:
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

        Example:
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
        return shapes_of(
            self.pattern, self.arrays, num_blocks=num_blocks, block_size=block_size, num_heads=num_heads,
            head_size=head_size, head_size_v=head_size_v, num_layers=num_layers, x=x,
        )  # fmt: skip

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
        self, *, num_blocks: int, block_size: int, num_heads: int, head_size: int, head_size_v: int | None = None,
        num_layers: int | None = None, x: int | None = None,
    ) -> str:  # fmt: skip
        """What memory looks like for these extents (the arguments of `shapes`), one line an array.

        Each axis is `name size × stride`, slowest first; strides count elements.

        Example:
            >>> print(CacheLayout.HND.describe(num_blocks=1024, block_size=16, num_heads=8, head_size=128))
            key_cache    block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1
            value_cache  block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1
        """
        shapes = self.shapes(
            num_blocks=num_blocks, block_size=block_size, num_heads=num_heads, head_size=head_size,
            head_size_v=head_size_v, num_layers=num_layers, x=x,
        )  # fmt: skip
        return "\n".join(describe(self.arrays, shapes))

    def draw(
        self, *, num_blocks: int = 2, block_size: int = 2, num_heads: int | None = None, head_size: int = 4,
        head_size_v: int | None = None, num_layers: int | None = None, x: int | None = None, slot: int | None = None,
    ) -> Picture:  # fmt: skip
        """A picture of the memory of small arrays: a cell for each element, in the order in which they lie there.

        Notebooks show it as SVG, terminals as text: `.svg` and `str()` are these. Offsets are from the array's first.

        Args:
            num_blocks: Blocks, per layer.
            block_size: Slots per block.
            num_heads: KV heads; None: 2, or 1 where the layout has an axis `latent`.
            head_size: Elements of a key head.
            head_size_v: Elements of a value head; None: `head_size`.
            num_layers: Layers; None: 2 where the layout has the axis.
            x: Elements of a packed run; None: 2 where the layout has the axis.
            slot: A slot to point out, `block * block_size + place`: which elements are its token's, in each layer.

        Raises:
            ValueError: an extent does not fit, as in `shapes`; an array has more than 1,024 elements; no such slot.
            TypeError: an extent, or slot, is no integer.

        Example:
            >>> print(CacheLayout.MLA.draw(head_size=4, head_size_v=3, slot=2))
            MLA: block slot latent   (slot 2: place 0 of block 1)
            <BLANKLINE>
            kv_cache  block 2 × 8 | slot 2 × 4 | latent 4 × 1
            block  │0              │1              │
            slot   │0      │1      │0      │1      │
            kv     │KV   │K│KV   │K│KV   │K│KV   │K│
            dim    │0 1 2│3│0 1 2│3│0 1 2│3│0 1 2│3│
            token  │· · ·│·│· · ·│·│■ ■ ■│■│· · ·│·│
            offset  0       4       8       12
            slot 2: 4 elements in 1 run: 8–11
        """
        num_heads, num_layers, x = small(self.arrays, num_heads, num_layers, x)
        shapes = self.shapes(
            num_blocks=num_blocks, block_size=block_size, num_heads=num_heads, head_size=head_size,
            head_size_v=head_size_v, num_layers=num_layers, x=x,
        )  # fmt: skip
        place = self.place(shapes, head_size=head_size, head_size_v=head_size_v or head_size)
        return draw(self.pattern, self.arrays, shapes, place, slot)


@lru_cache
def _from_pattern(pattern: str) -> CacheLayout:
    name = constant(pattern)
    return getattr(CacheLayout, name) if name else CacheLayout(pattern)


for _name, _pattern in CONSTANTS.items():
    setattr(CacheLayout, _name, CacheLayout(_pattern))
