"""What a cache of continuous batching is to hold, and what both versions of it have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.cache_spec import CacheSpec
from kvcore.choices import KVCacheDtype, TorchBackend
from torchkv.cache import PagedKVCache
from torchkv.integrations.transformers.cache import of_layer
from torchkv.integrations.transformers.handle import UnsupportedError


@dataclass(frozen=True, eq=False)
class CacheKind:
    """What `continuous_batching` was asked for."""

    kv_cache_dtype: KVCacheDtype
    per_token_head: bool
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    backend: TorchBackend | None

    def spec(
        self, block_size: int, num_heads: int, head_size: int, dtype: torch.dtype, num_blocks: int = 1
    ) -> CacheSpec:
        """The cache of one layer."""
        return CacheSpec.create(
            None, num_blocks, block_size, num_heads, head_size, None, str(dtype).removeprefix("torch."), "NHD",
            self.kv_cache_dtype, self.per_token_head,
        )  # fmt: skip

    def create(self, layer: int, block_size: int, num_heads: int, head_size: int, **options: Any) -> PagedKVCache:
        """The cache of one layer, of one block.

        Raises:
            ValueError: a choice or a scale's shape does not fit.
        """
        return PagedKVCache.create(
            num_blocks=1, block_size=block_size, num_heads=num_heads, head_size=head_size,
            kv_cache_dtype=self.kv_cache_dtype, per_token_head=self.per_token_head,
            k_scale=of_layer(self.k_scale, layer), v_scale=of_layer(self.v_scale, layer), **options,
        )  # fmt: skip

    def store(
        self, layer: int, spec: CacheSpec, dtype: torch.dtype, caches: Sequence[Tensor], scale_caches: Sequence[Tensor]
    ) -> PagedKVCache:
        """The cache of one layer, in memory that is there already."""
        sizes = spec.block_size, spec.num_heads, spec.head_size
        small = self.create(layer, *sizes, dtype=dtype, device=caches[0].device)
        scales = scale_caches or (small.k_scale, small.v_scale)
        return PagedKVCache(tuple(caches), replace(small.spec, num_blocks=spec.num_blocks), *scales)


@dataclass
class Group:
    """Layers that have their blocks together.

    Attributes:
        index: Which of the lists of slots and of blocks that a forward is given is theirs.
        layer_type: "full_attention" or "sliding_attention".
        layers: Which layers, in the order in which a forward comes to them.
        tables: The blocks of each request.
        window: How many of the last positions a query sees; None: all.
        ring: With a window, blocks that a request has at most: it takes them again in turn. None: no limit.
    """

    index: int
    layer_type: str
    layers: list[int]
    tables: dict[str, list[int]]
    window: int | None = None
    ring: int | None = None

    def start(self, past: int, block_size: int) -> int:
        """The first position that new tokens see, rounded down to where a block begins."""
        return 0 if self.window is None else max(0, past - self.window + 1) // block_size * block_size

    def seen(self, past: int, tokens: int, block_size: int) -> int:
        """Positions that a request's new tokens may see, from the beginning of a block on."""
        return past + tokens - self.start(past, block_size)

    def blocks(self, request: str, start: int, end: int, block_size: int) -> list[int]:
        """The blocks that hold positions from start to below end, of which start begins one."""
        table, first, last = self.tables[request], start // block_size, -(-end // block_size)
        if self.ring is None:
            return table[first:last]
        return [table[j % self.ring] for j in range(first, last)]


def ring_blocks(window: int, max_batch_tokens: int, block_size: int) -> int:
    """Blocks of a request in a layer with a window, such that what a step writes is not what it still has to read."""
    return -(-(window - 1 + max_batch_tokens) // block_size) + 1


class _Step(NamedTuple):
    block_tables: Tensor  # [num_seqs, max_blocks]
    seq_lens: Tensor  # [num_seqs]


class PagedSteps:
    """What reads and writes for continuous batching, in place, by blocks: the part of a cache that is torchkv's.

    transformers' own cache is given the slot of each token that is read, and copies them out. This one is given blocks
    in their place: `extend_read_and_write_indices` puts them where the slots were.
    """

    torchkv_kind: CacheKind
    torchkv_groups: list[Group]
    torchkv_stores: list[PagedKVCache]  # of each layer
    torchkv_block_size: int

    def torchkv_begin(self, groups: list[Group], stores: dict[int, PagedKVCache], block_size: int) -> None:
        """Takes what the cache consists of."""
        self.torchkv_groups, self.torchkv_block_size = groups, block_size
        self.torchkv_stores = [stores[layer] for layer in sorted(stores)]
        self._of_layer = {layer: group for group in groups for layer in group.layers}
        self._steps: dict[int, _Step] = {}

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Appends, for each group, a request's blocks to read_index, and the slots of its new tokens to write_index."""
        size, end = self.torchkv_block_size, past_length + query_length
        for group in self.torchkv_groups:
            first = past_length // size * size
            for block, begin in zip(group.blocks(request_id, first, end, size), range(first, end, size), strict=True):
                slots = range(max(past_length, begin) - begin, min(end, begin + size) - begin)
                write_index[group.index].extend(block * size + place for place in slots)
            if read_index is not None:
                start = group.start(past_length, size)
                read_index[group.index].extend(group.blocks(request_id, start, end, size))

    def torchkv_attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        step: dict[str, Any],
        options: dict[str, Any],
    ) -> Tensor:
        """Writes a layer's new keys and values, and attends: rows of all sequences, one behind the other."""
        group, store, backend = self._of_layer[layer], self.torchkv_stores[layer], self.torchkv_kind.backend
        if window is not None and window != group.window:
            raise UnsupportedError(
                f"sliding_window must be {group.window} in layer {layer}, as in the config, got {window}"
            )
        starts, slots = step["cu_seq_lens_q"], step["write_index"][group.index]
        if layer == group.layers[0]:
            self._steps[group.index] = self._step(group, starts, slots, step)
        found = self._steps[group.index]
        store.write(key, value, slots, backend=backend)
        return store.attend(
            query, found.block_tables, found.seq_lens, query_start_loc=starts, sliding_window=group.window,
            backend=backend, **options,
        )  # fmt: skip

    def _step(self, group: Group, starts: Tensor, slots: Tensor, step: dict[str, Any]) -> _Step:
        """Block tables and lengths, on the device, without waiting for it."""
        size, read = self.torchkv_block_size, step["read_index"][group.index]
        longest = step["max_length_k"] if "max_length_k" in step else step["max_seqlen_k"]  # in older ones
        ends = step["cu_seq_lens_k"]
        if isinstance(ends, dict):  # in older ones not with layers of one type
            longest, ends = longest[group.layer_type], ends[group.layer_type]
        seq_lens = ends.diff()
        columns = torch.arange(-(-longest // size), device=seq_lens.device)
        if read.numel():
            counts = (seq_lens + size - 1) // size
            first = counts.cumsum(0) - counts
            tables = read[(first[:, None] + columns).clamp(max=read.shape[0] - 1)]
        else:  # no request has a past: the slots of its new tokens are all that it has
            at = starts[:-1, None] + columns * size
            tables = slots[at.clamp(max=slots.shape[0] - 1)] // size
        return _Step(tables.to(torch.int32), seq_lens)
