"""A call of `relayout` that moves bits: its arguments by name, and what the contract says of them."""

from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.arrays import array_names
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
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`, for both.
        layout: A pattern.
        scale_layout: A pattern, or None.
        source_layout: A pattern.
        source_scale_layout: A pattern, or None.
        head_size: Elements of a key head.
        head_size_v: Elements of a value head where the layout does not tell; else None.
        backend: None, "triton", "torch" or "interpret".
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
        count = len(self.source) - (2 if self.source_scale_layout is not None else 0)
        source = self._arguments(self.source[:count], self.source[count:], self.source_layout, self.source_scale_layout)
        destination = self._arguments(self.caches, self.scale_caches, self.layout, self.scale_layout)
        return check_relayout(source, destination, maybe_spec(self.pairs), self.head_size, self.head_size_v)

    def _arguments(
        self,
        caches: tuple[Tensor, ...],
        scale_caches: tuple[Tensor, ...],
        layout: str,
        scale_layout: str | None,
    ) -> CacheArguments:
        k_scale, v_scale = map(spec_of, scale_caches) if scale_caches else (None, None)
        return CacheArguments(
            [spec_of(cache) for cache in caches], self.kv_cache_dtype, k_scale, v_scale, layout,
            scale_layout=scale_layout,
        )  # fmt: skip

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
