"""A call of `relayout`: its arguments by name, and what the contract says of them."""

from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.arrays import ArraySpec, array_names
from kvcore.contract.cache import CacheArguments
from kvcore.contract.checks import overlap_error
from kvcore.contract.relayout import Relayout, check_relayout
from torchkv._arguments import maybe_spec, spec_of
from torchkv._memory import check_apart, share_elements


class RelayoutCall(NamedTuple):
    """Arguments of the op, in the order of its schema.

    Attributes:
        caches: The key and the value cache of the destination, or the one with both.
        scale_caches: Those of key and value, or none.
        source: Caches, then scale caches, of the source.
        pairs: Slots of source and destination; None for all slots.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`; of the destination, if source_kv_cache_dtype is given.
        layout: A pattern.
        scale_layout: A pattern, or None.
        source_layout: A pattern.
        source_scale_layout: A pattern, or None.
        head_size: Elements of a key head.
        head_size_v: Elements of a value head where the layout does not tell; else None.
        backend: None, "triton", "torch" or "interpret".
        source_kv_cache_dtype: A name of `KV_CACHE_DTYPES`: keys and values are read and written. None: bits move.
        source_k_scale: Static scale of the source's keys, as the contract has it; None for 1, and where bits move.
        source_v_scale: Of its values, like the next ones.
        k_scale: Of the destination.
        v_scale: Of the destination.
    """

    caches: tuple[Tensor, ...]
    scale_caches: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    pairs: Tensor | None
    kv_cache_dtype: str
    layout: str
    scale_layout: str | None
    source_layout: str
    source_scale_layout: str | None
    head_size: int
    head_size_v: int | None
    backend: str | None
    source_kv_cache_dtype: str | None = None
    source_k_scale: Tensor | None = None
    source_v_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def requantise(self) -> bool:
        """Whether keys and values are read and written; else bits move."""
        return self.source_kv_cache_dtype is not None

    @property
    def static_scales(self) -> tuple[Tensor | None, ...]:
        """Those of the source, then of the destination."""
        return self.source_k_scale, self.source_v_scale, self.k_scale, self.v_scale

    @property
    def source_caches(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Caches, and scale caches, of the source."""
        count = len(self.source) - (2 if self.source_scale_layout is not None else 0)
        return self.source[:count], self.source[count:]

    @property
    def layer(self) -> None:
        """All layers are meant."""
        return

    @property
    def device(self) -> torch.device:
        """Where the op runs."""
        return self.caches[0].device

    @property
    def written(self) -> tuple[Tensor, ...]:
        """All tensors that are written to."""
        return self.caches + self.scale_caches

    def check(self) -> Relayout:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit.
            TypeError: a dtype does not fit.
        """
        source = CacheArguments(
            [spec_of(cache) for cache in self.source_caches[0]], self.source_kv_cache_dtype or self.kv_cache_dtype,
            *_scales(self.source_caches[1], self.source_k_scale, self.source_v_scale), self.source_layout,
            scale_layout=self.source_scale_layout,
        )  # fmt: skip
        destination = CacheArguments(
            [spec_of(cache) for cache in self.caches], self.kv_cache_dtype,
            *_scales(self.scale_caches, self.k_scale, self.v_scale), self.layout, scale_layout=self.scale_layout,
        )  # fmt: skip
        rest = maybe_spec(self.pairs), self.head_size, self.head_size_v, self.requantise
        return check_relayout(source, destination, *rest)

    def check_memory(self, described: Relayout) -> None:
        """Raises a ValueError unless written tensors share no memory, with each other and with what is read."""
        del described
        names = array_names(len(self.caches), len(self.scale_caches))
        check_apart(names, self.written)
        for (name, tensor), other in product(zip(names, self.written, strict=True), self.source):
            if share_elements(tensor, other):
                raise overlap_error(f"destination's {name}", "source")

    def pairs_apart(self) -> list[tuple[int, int]]:
        """Which of the tensors, written ones first, then source, must share no memory."""
        count = len(self.written)
        others = range(count, count + len(self.source))
        return [*combinations(range(count), 2), *product(range(count), others)]


def _scales(
    scale_caches: tuple[Tensor, ...], k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[ArraySpec | None, ArraySpec | None]:
    """Specs of scale caches, or of static scales, as readers are told of them."""
    of_keys, of_values = scale_caches or (k_scale, v_scale)
    return maybe_spec(of_keys), maybe_spec(of_values)
