"""What `PagedKVCache` is in both frameworks, without its arrays: extents, storage, how it is printed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

from kvcore.arrays import ArraySpec, array_names, check_integers, python_integers
from kvcore.contract.checks import check_kv_cache_dtype, either
from kvcore.formats import DS_MLA_LATENT, FLOATS, FP8_DS_MLA, KV_CACHE_DTYPES, PER_TOKEN_HEAD, stored_size
from kvcore.layout import CacheLayout
from kvcore.nbytes import bytes_of, readable
from kvcore.scales import place_stored, scale_layout_of


@dataclass(frozen=True)
class CacheSpec:
    """A paged cache without its memory. Hashable.

    Attributes:
        layout: With an axis `layer` exactly where num_layers is not None.
        num_layers: Layers, or None for one layer without an axis of its own.
        num_blocks: Blocks, per layer.
        block_size: Slots per block.
        num_heads: KV heads.
        head_size: Elements of a key head.
        head_size_v: Elements of a value head.
        dtype: Of the arrays; uint8 for quantised caches, which every framework and device can update in place.
        kv_cache_dtype: What they hold.
        scale_layout: Of the scale caches, where each token's head has a scale of its own; else None.
    """

    layout: CacheLayout
    num_layers: int | None
    num_blocks: int
    block_size: int
    num_heads: int
    head_size: int
    head_size_v: int
    dtype: str
    kv_cache_dtype: str
    scale_layout: CacheLayout | None = None

    def __post_init__(self) -> None:
        _ = self.reading  # now, not when first asked for: torch.compile guards that it is missing, as in CacheLayout

    @classmethod
    def create(
        cls,
        num_layers: int | None,
        num_blocks: int | None,
        block_size: int,
        num_heads: int | None,
        head_size: int,
        head_size_v: int | None,
        dtype: str,
        layout: str | CacheLayout,
        kv_cache_dtype: str,
        per_token_head: bool = False,
        scale_layout: str | None = None,
        num_kv_heads: int | None = None,
        memory: int | str | None = None,
    ) -> "CacheSpec":
        """The description that `PagedKVCache.create` asks for.

        Raises:
            ValueError: an extent, layout or choice does not fit, or memory has no room for a block.
            TypeError: dtype is no float, layout no layout, an extent no integer, or num_heads, or num_blocks or memory,
                given twice or not.
        """
        room = None if memory is None else bytes_of("memory", memory)
        if (num_blocks is None) == (memory is None):
            got = "neither" if memory is None else f"both: {num_blocks!r} and {memory!r}"
            raise TypeError(f"num_blocks or memory must be given, and not both, got {got}")
        check_kv_cache_dtype(kv_cache_dtype)
        if dtype not in FLOATS:
            formats = (n for n, f in KV_CACHE_DTYPES.items() if f is not None and dtype in (n, f.name))
            stores = next(formats, None)
            hint = "" if stores is None else f": what a quantised cache holds is kv_cache_dtype={stores!r}"
            raise TypeError(f"dtype must be {either(FLOATS)}, the type of elements, got {dtype}{hint}")
        if num_kv_heads is not None and num_heads is not None:
            raise TypeError(
                f"num_heads must be given once, also as num_kv_heads, got both: {num_heads!r} and {num_kv_heads!r}"
            )
        heads = num_kv_heads if num_heads is None else num_heads
        if heads is None:
            raise TypeError("num_heads must be given, got None")
        check_integers(
            num_layers=num_layers, num_blocks=num_blocks, block_size=block_size, num_heads=heads,
            head_size=head_size, head_size_v=head_size_v,
        )  # fmt: skip
        num_layers, num_blocks, block_size, heads, head_size, head_size_v = python_integers(
            num_layers, num_blocks, block_size, heads, head_size, head_size_v
        )
        chosen = CacheLayout.of(layout)
        if num_layers is None and chosen.has_layer:
            raise ValueError(f"num_layers must be given for layout '{chosen}', got None")
        if num_layers is not None:
            chosen = chosen.with_layer()
        if per_token_head and (kv_cache_dtype not in PER_TOKEN_HEAD or chosen.latent):
            raise ValueError(
                f"per_token_head needs kv_cache_dtype {either(map(repr, PER_TOKEN_HEAD))} and a layout with a place "
                f"for K and for V, got {kv_cache_dtype!r} and '{chosen}'"
            )
        if scale_layout is not None and not per_token_head:
            raise ValueError(f"scale_layout must be None without per_token_head, got {scale_layout!r}")
        stored = KV_CACHE_DTYPES[kv_cache_dtype]
        spec = cls(
            chosen,
            num_layers,
            1 if num_blocks is None else num_blocks,
            block_size,
            heads,
            head_size,
            head_size if head_size_v is None else head_size_v,
            dtype if stored is None else "uint8",
            kv_cache_dtype,
            scale_layout_of(scale_layout, chosen.has_layer) if per_token_head else None,
        )
        arrays = [ArraySpec(shape, spec.dtype) for shape in spec.shapes]  # raises where an extent does not fit
        names = array_names(len(arrays))
        place_stored(chosen, arrays, stored, head_size, spec.head_size_v if chosen.latent else None, names)
        return spec if room is None else spec._filling(room)

    def _filling(self, room: int) -> "CacheSpec":
        """This spec, of one block, with as many as fit into so many bytes: each has as many as the first."""
        if room < self.nbytes:
            raise ValueError(f"memory must be at least {self.nbytes} bytes, which one block has, got {room}")
        return replace(self, num_blocks=room // self.nbytes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each array: key and value cache, or one for both."""
        packs = any("x" in axis for axes in self.layout.arrays for axis in axes)
        stored = KV_CACHE_DTYPES[self.kv_cache_dtype]
        size = stored_size(stored, self.head_size)
        size_v = DS_MLA_LATENT if stored == FP8_DS_MLA else stored_size(stored, self.head_size_v)
        return self.layout.shapes(
            num_layers=self.num_layers,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_heads=self.num_heads,
            head_size=size,
            head_size_v=size_v,
            # 16 bytes, or as much of it as divides a head.
            x=math.gcd(16 // self._itemsize, size) if packs else None,
        )

    def check_scales(self, k_scale: Any, v_scale: Any) -> None:
        """Raises where a static scale is passed that this cache has no use for.

        Raises:
            ValueError: scales are computed for each head of a token; or v_scale is passed where K and V are the same
                elements, for which k_scale is enough.
        """
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if self.scale_layout is not None and scale is not None:
                raise ValueError(f"{name} must be None with per_token_head, which computes scales, got {scale!r}")
        if self.layout.latent and v_scale is not None:
            raise ValueError(
                f"v_scale must be None for layout '{self.layout}', where k_scale is for both, got {v_scale!r}"
            )

    def check_rows(self, key: Sequence[int], value: Sequence[int]) -> None:
        """Raises unless the shapes of a write's key and value are as this cache splits its rows.

        Where K and V share an axis, of the two sizes only the sum shows in the caches.
        """
        latent = self.layout.latent
        if not latent and not self.layout.packed:
            return
        front = () if latent else (self.num_heads,)
        sizes = (self.head_size_v, self.head_size - self.head_size_v) if latent else (self.head_size, self.head_size_v)
        for name, shape, size in zip(("key", "value"), (key, value), sizes, strict=True):
            if tuple(shape[1:]) != (*front, size):
                wanted = ", ".join(map(str, ("num_tokens", *front, size)))
                raise ValueError(f"{name} must have shape ({wanted}), got {tuple(shape)}")

    def check_query(self, query: Sequence[int]) -> None:
        """Raises unless a query of this shape has heads like the keys: an axis `k+v` is split where query's heads end.

        As `check_rows`.
        """
        if self.layout.packed and (len(query) != 3 or query[2] != self.head_size):
            raise ValueError(f"query must have shape (num_tokens, num_q_heads, {self.head_size}), got {tuple(query)}")

    @property
    def scale_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of k's and v's scale cache, of float32; empty without scales for each token and head."""
        if self.scale_layout is None:
            return ()
        shapes = self.scale_layout.shapes(
            num_layers=self.num_layers,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_heads=self.num_heads,
            head_size=1,
        )
        return tuple(shape[:-1] for shape in shapes)

    def plain(self) -> dict[str, int | str | None]:
        """The attributes by name, layouts as patterns: what can be saved, and compared with what was."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.pattern if isinstance(value, CacheLayout) else value for name, value in values.items()}

    def check_plain(self, saved: Any) -> None:
        """Raises unless `saved` is `plain` of a spec like this one.

        Raises:
            TypeError: it is no dict.
            ValueError: an attribute differs; the message names it.
        """
        if not isinstance(saved, Mapping):
            raise TypeError(f"state's spec must be a dict, got {type(saved).__name__}")
        for name, value in self.plain().items():
            if name not in saved or saved[name] != value:
                raise ValueError(f"state's {name} must be {value!r}, as in this cache, got {saved.get(name)!r}")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(map(math.prod, self.shapes)) * self._itemsize + 4 * sum(map(math.prod, self.scale_shapes))

    @cached_property
    def reading(self) -> dict[str, Any]:
        """The arguments that say how to read the arrays."""
        return {
            "kv_cache_dtype": self.kv_cache_dtype, "layout": self.layout, "scale_layout": self.scale_layout,
            "head_size_v": self.head_size_v if self.layout.latent else None,
        }  # fmt: skip

    @property
    def _itemsize(self) -> int:
        return FLOATS[self.dtype].bits // 8 if self.dtype in FLOATS else 1

    def __str__(self) -> str:
        layers = "" if self.num_layers is None else f"{self.num_layers} layers × "
        sizes = str(self.head_size) if self.head_size == self.head_size_v else f"{self.head_size}/{self.head_size_v}"
        holds = self.dtype if self.kv_cache_dtype == "auto" else f"{self.kv_cache_dtype} in {self.dtype}"
        holds += "" if self.scale_layout is None else " with scales"
        return (
            f"{layers}{self.num_blocks} blocks × {self.block_size} slots, {self.num_heads} heads × {sizes}, {holds}, "
            f"'{self.layout}', {readable(self.nbytes)}"
        )


class Described:
    """The extents of a cache that has a `spec`, as properties. In JAX they are those of all devices' parts together."""

    spec: CacheSpec

    @property
    def num_layers(self) -> int | None:
        """Layers, or None for one layer without an axis of its own."""
        return self.spec.num_layers

    @property
    def num_blocks(self) -> int:
        """Blocks, per layer."""
        return self.spec.num_blocks

    @property
    def block_size(self) -> int:
        """Slots per block."""
        return self.spec.block_size

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self.spec.num_heads

    @property
    def head_size(self) -> int:
        """Elements of a key head."""
        return self.spec.head_size

    @property
    def head_size_v(self) -> int:
        """Elements of a value head."""
        return self.spec.head_size_v

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.spec.nbytes


class AnyCache(Protocol):
    """`PagedKVCache` of either framework."""

    @property
    def spec(self) -> CacheSpec:
        """What the arrays are."""
        ...

    @property
    def caches(self) -> tuple[Any, ...]:
        """The arrays."""
        ...

    @property
    def k_scale(self) -> Any:
        """Scales of keys, or None."""
        ...

    @property
    def v_scale(self) -> Any:
        """Scales of values, or None."""
        ...


def check_any_cache(cache: Any) -> None:
    """Raises unless `cache` is a PagedKVCache of either framework.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(cache, Described):
        raise TypeError(f"cache must be a PagedKVCache of jaxkv or torchkv, got {type(cache).__name__}")
