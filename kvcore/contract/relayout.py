"""The contract of `relayout`: what is stored in slots of one cache, in slots of another one with another layout.

Where formats are the same nothing is decoded: a slot is some units of K, of V, and of their scales. Else it is
requantised: read as floats, and written.
"""

from typing import NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import Cache, CacheArguments, check_cache
from kvcore.contract.checks import check_devices, check_indices
from kvcore.formats import DS_MLA_ROW, FLOATS, FloatFormat
from kvcore.layout import CacheLayout
from kvcore.placement import Address, Placement

_CHUNK_ELEMENTS = 2**23
"""About as many elements of keys and values are read at once: 32 MiB of float32."""


class Run(NamedTuple):
    """Units of each head of a slot that move together: those of K, of V, or of their scales. Hashable.

    Attributes:
        arrays: Which array has them, of the source and of the destination: caches, then scale caches.
        addresses: Where they are there.
        num_heads: KV heads.
        units: Of a head: elements of the arrays.
        bits: Of a unit.
    """

    arrays: tuple[int, int]
    addresses: tuple[Address, Address]
    num_heads: int
    units: int
    bits: int


class Relayout(NamedTuple):
    """A call that fulfils the contract; hashable.

    Attributes:
        source: What is read.
        destination: What is written.
        pairs: The spec of pairs of slots; None for all slots of the source.
        requantise: Whether keys and values are read and written; else bits move.
    """

    source: Cache
    destination: Cache
    pairs: ArraySpec | None
    requantise: bool = False

    @property
    def num_pairs(self) -> int:
        """How many slots are moved, of each layer."""
        return self.source.extents.num_slots if self.pairs is None else self.pairs.shape[0]

    @property
    def num_layers(self) -> int:
        """Layers, 1 where there is no axis for them."""
        return self.source.extents.num_layers or 1

    @property
    def between(self) -> str:
        """The dtype of keys and values on their way, where they are read and written."""
        return between(self.source.format, self.destination.format)

    @property
    def chunk(self) -> int:
        """Pairs that are read at once, where no kernel writes them as it reads them."""
        return chunk_of(self.source.extents.num_heads, self.source.head_size, self.source.head_size_v, self.num_pairs)

    @property
    def runs(self) -> tuple[Run, ...]:
        """What a slot consists of, where bits move: K, then V unless it is a part of K, then their scales."""
        both, extents = (self.source, self.destination), self.source.extents
        bits, sides = 8 if self.source.format.bits <= 8 else self.source.format.bits, (0, 1)
        if self.source.layout.latent:
            sides = (0,)
        runs = []
        for side in sides:
            addresses = tuple(_address(cache.placement, side) for cache in both)
            units = (extents.head_units, extents.head_units_v)[side] if self.source.rope is None else DS_MLA_ROW
            runs.append(self._run(tuple(_array(cache, side) for cache in both), addresses, units, bits))
        if self.source.scales is None or self.source.rope is not None:
            return tuple(runs)
        for side in sides:
            scales = [cache.scales for cache in both if cache.scales is not None]
            addresses = tuple(_address(s.placement, side) for s in scales)
            units = (scales[0].placement.extents.head_units, scales[0].placement.extents.head_units_v)[side]
            arrays = tuple(
                _array(cache, side) if s.inside else len(cache.layout.arrays) + side
                for cache, s in zip(both, scales, strict=True)
            )
            runs.append(self._run(arrays, addresses, units, scales[0].format.bits))
        return tuple(runs)

    def _run(self, arrays: tuple[int, ...], addresses: tuple[Address, ...], units: int, bits: int) -> Run:
        (first, second), (source, target) = arrays, addresses
        return Run((first, second), (source, target), self.source.extents.num_heads, units, bits)


def check_relayout(
    source: CacheArguments,
    destination: CacheArguments,
    pairs: ArraySpec | None,
    head_size: int | None,
    head_size_v: int | None,
    requantise: bool = False,
) -> Relayout:
    """Checks the arguments of a call.

    Args:
        source: What is read; where k_scale and v_scale have more than two axes, they are scale caches.
        destination: What is written, of that kind.
        pairs: `(n, 2)`, or None.
        head_size: Elements of a key head, where a layout does not tell.
        head_size_v: Elements of a value head, where a layout does not tell.
        requantise: Whether keys and values are read and written, of caches whose layouts are not latent.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    if pairs is not None:
        check_indices("pairs", pairs, ("n", 2))
    caches = [check_cache(_in_layer(arguments), head_size, head_size_v) for arguments in (source, destination)]
    ours, theirs = caches
    same = [
        ("num_layers", theirs.extents.num_layers, ours.extents.num_layers),
        ("num_heads", theirs.extents.num_heads, ours.extents.num_heads),
        ("head_size", theirs.head_size, ours.head_size),
        ("head_size_v", theirs.head_size_v, ours.head_size_v),
        ("latent layout", theirs.layout.latent, ours.layout.latent),
    ]
    if requantise and ours.layout.latent:
        raise ValueError(f"source's layout must not be latent where slots are requantised, got '{ours.layout}'")
    if not requantise:
        same = [("format", theirs.format.name, ours.format.name), *same]
        same.append(("scales", _scale_kind(theirs), _scale_kind(ours)))
    for name, got, wanted in same:
        if got != wanted:
            raise ValueError(f"destination must have {name} {wanted}, as source, got {got}")
    check_room(ours.extents.num_slots, theirs.extents.num_slots, pairs is None)
    named = [("pairs", pairs)] if pairs is not None else []
    named += [("source's arrays", spec) for spec in source.caches]
    for whose, arguments in (("source's ", source), ("destination's ", destination)):
        named += [(whose + name, spec) for name, spec in arguments.static_scales]
    check_devices(named, "destination's arrays", destination.caches[0])
    return Relayout(ours, theirs, pairs, requantise)


def chunk_of(num_heads: int, head_size: int, head_size_v: int, num_pairs: int) -> int:
    """Slots of a layer that are read at once, where no kernel writes them as it reads them."""
    return max(1, min(num_pairs, _CHUNK_ELEMENTS // max(num_heads * (head_size + head_size_v), 1)))


def between(source: FloatFormat, destination: FloatFormat) -> str:
    """The dtype of keys and values on their way from a cache to another one: the narrowest that loses none.

    Args:
        source: What is read; its own dtype where it is not quantised, and the destination is.
        destination: What is written; its own dtype where it is not quantised, as writing takes no other.
    """
    if destination.name in FLOATS:
        return destination.name
    return source.name if source.name in FLOATS else "float32"


def check_room(slots: int, room: int, every: bool) -> None:
    """Checks that all slots of a source have a place, where all are meant.

    Raises:
        ValueError: the destination has fewer.
    """
    if every and slots > room:
        raise ValueError(
            f"pairs must be given where destination has fewer slots than source, {room} for {slots}, got None"
        )


def _in_layer(arguments: CacheArguments) -> CacheArguments:
    """The arguments of one layer, which all that is checked has in common with the others."""
    layout = CacheLayout.of(arguments.layout or "NHD")
    return arguments._replace(layout=layout, layer=0 if layout.has_layer else None)


def _scale_kind(cache: Cache) -> str:
    if cache.scales is None:
        return "of tensors or heads"
    return "among elements" if cache.scales.inside else "of each token and head"


def _address(placement: Placement, side: int) -> Address:
    return placement.value if side else placement.key


def _array(cache: Cache, side: int) -> int:
    return 0 if cache.layout.single_array else side
