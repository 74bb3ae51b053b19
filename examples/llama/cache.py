"""The cache's plain description, which both twins share: shapes, storage, and how to read it back.

Nothing here touches an array. Writing is the library's part; reading gathers blocks through the block table
until the library has a paged attention kernel, and has to know the layout for it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from kvcore.layout import CacheLayout

from .gguf_model import LlamaConfig
from .paging import BLOCK_SIZE

FP8_FORMATS = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
KV_CACHE_DTYPES = ("auto", *FP8_FORMATS)
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


class Reading(NamedTuple):
    """How to gather the keys, or the values, of one layer from an array.

    Split the array's axes to `shape`; index axis `layer` (and `kv`, if any) with a number and axis `block`
    with a block table [num_sequences, blocks]. What comes out has the two axes of the table, then those
    that are left, slowest first: transpose them by `order` to (sequence, block, slot, head, dim parts), merge
    blocks and slots, and dim parts, and keep elements `start` to `stop` of each head.
    """

    shape: tuple[int, ...]
    layer_axis: int
    kv_axis: int | None
    kv: int
    block_axis: int
    order: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class CacheSpec:
    """A paged cache of all layers. Hashable, so that a compiled program can be found by it."""

    layout: CacheLayout
    num_layers: int
    num_blocks: int
    block_size: int
    num_heads: int
    head_size: int
    head_size_v: int
    dtype: str
    kv_cache_dtype: str

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        num_blocks: int,
        *,
        layout: str | CacheLayout = "NHD",
        block_size: int = BLOCK_SIZE,
        dtype: str = "float32",
        kv_cache_dtype: str = "auto",
    ) -> "CacheSpec":
        """A cache for a model. An fp8 cache is stored as uint8, which XLA updates in place on a CPU too."""
        return cls(
            CacheLayout.of(layout).with_layer(),
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_size,
            config.head_size_v,
            "uint8" if kv_cache_dtype in FP8_FORMATS else dtype,
            kv_cache_dtype,
        )

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each array: key and value cache, or one for both."""
        packs = any("x" in axis for axes in self.layout.arrays for axis in axes)
        return self.layout.shapes(
            num_layers=self.num_layers,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_heads=self.num_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            # 16 bytes, or as much of it as divides a head.
            x=math.gcd(16 // ITEM_SIZES[self.dtype], self.head_size) if packs else None,
        )

    @property
    def num_bytes(self) -> int:
        return sum(map(math.prod, self.shapes)) * ITEM_SIZES[self.dtype]

    @cached_property
    def readings(self) -> tuple[Reading, Reading]:
        """How to read K, and V."""
        return self._reading(0), self._reading(1)

    def _reading(self, which: int) -> Reading:
        array = 0 if self.layout.single_array else which
        names: list[str] = []
        sizes: list[int] = []
        for axis, size in zip(self.layout.arrays[array], self.shapes[array], strict=True):
            for name in axis:
                names.append(name)
                sizes.append(size if len(axis) == 1 else 2 if name == "kv" else size // 2)
        rest = [name for name in names if name not in ("layer", "kv", "block")]
        dims = [name for name in ("dim", "k+v", "dim/x", "x") if name in rest]
        start = self.head_size if which and self.layout.packed else 0
        return Reading(
            shape=tuple(sizes),
            layer_axis=names.index("layer"),
            kv_axis=names.index("kv") if "kv" in names else None,
            kv=which,
            block_axis=names.index("block"),
            order=(0, 1, *(2 + rest.index(name) for name in ("slot", "head", *dims))),
            start=start,
            stop=start + (self.head_size_v if which else self.head_size),
        )
