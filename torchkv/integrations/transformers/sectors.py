"""The cache of continuous batching in transformers from 5.18 on: sectors of bytes, dealt out to layers of either kind.

A block of transformers has a page for each layer of its kind; a page is what torchkv calls a block of that layer's
cache. Who has which block stays transformers' affair, with sharing of prefixes, forks and swaps; what lies in a page is
torchkv's.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvcore.cache_spec import CacheSpec
from torchkv.cache import PagedKVCache
from torchkv.integrations.transformers.kind import CacheKind, Group, PagedSteps, ring_blocks
from torchkv.integrations.transformers.rebinding import with_globals

_theirs: Any = import_module("transformers.generation.continuous_batching.cache")

_ALIGNMENT = 16
"""Bytes: what each part of a page begins at a multiple of, for kernels that load as many at once."""


def _parts(spec: CacheSpec) -> list[tuple[int, Sequence[int], torch.dtype]]:
    """Where each part of a page of this spec begins, in bytes, its shape, and its type; last, where the page ends."""
    element = getattr(torch, spec.dtype)
    parts, offset = [], 0
    for shapes, dtype in ((spec.shapes, element), (spec.scale_shapes, torch.float32)):
        for shape in shapes:
            parts.append((offset, shape[1:], dtype))
            size = torch.Size(shape[1:]).numel() * dtype.itemsize
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return [*parts, (offset, (), torch.uint8)]


def bytes_per_page(kind: CacheKind, num_heads: int, head_size: int, dtype: torch.dtype, page_size: int) -> int:
    """Bytes of K and V, and of their scales, of page_size tokens of a layer."""
    return _parts(kind.spec(page_size, num_heads, head_size, dtype))[-1][0]


class _Pages:
    """What both allocators do in another way than transformers' own."""

    layer_indices: list[int]
    pages_per_block: int
    tokens_per_page: int
    bytes_per_page: int
    bytes_per_block: int
    num_key_value_heads: int
    head_dim: int
    cache_dtype: torch.dtype
    block_table: dict[str, list[int]]
    index: int
    layer_type: str
    _after_cache_tensor_init: Any

    def __init__(self, kind: CacheKind, layer_type: str, **options: Any) -> None:
        self.torchkv_kind, self.layer_type = kind, layer_type
        super().__init__(**options)
        self.block_physical_stride = self.tokens_per_page  # a layer's slots of a block, in a view of that layer

    def get_bytes_per_page(self, *sizes: Any) -> int:
        """Bytes of a page."""
        return bytes_per_page(self.torchkv_kind, *sizes)

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any
    ) -> None:
        """Lays each layer's cache into the memory."""
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        kind, num_blocks = self.torchkv_kind, cache_tensor.numel() // self.bytes_per_block
        sizes = self.tokens_per_page, self.num_key_value_heads, self.head_dim, self.cache_dtype
        spec = kind.spec(*sizes, num_blocks)
        self.torchkv_stores: dict[int, PagedKVCache] = {}
        for page, layer in enumerate(self.layer_indices):
            views = []
            for offset, shape, dtype in _parts(spec)[:-1]:
                strides = torch.empty(shape, device="meta").stride()
                views.append(
                    cache_tensor.view(dtype).as_strided(
                        (num_blocks, *shape),
                        (self.bytes_per_block // dtype.itemsize, *strides),
                        (page * self.bytes_per_page + offset) // dtype.itemsize,
                    )
                )
            self.torchkv_stores[layer] = kind.store(layer, spec, self.cache_dtype, views[:2], views[2:])
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        self.torchkv_group = Group(self.index, self.layer_type, self.layer_indices, self.block_table)

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Positions that new tokens may see, from the beginning of a block on."""
        return self.torchkv_group.seen(past_length, query_length, self.tokens_per_page)


class _FullPages(_Pages, _theirs.FullAttentionCacheAllocator):
    pass


class _SlidingPages(_Pages, _theirs.SlidingAttentionCacheAllocator):
    def set_ring(self, max_batch_tokens: int) -> None:
        """Has a request keep, beside the window, as many tokens as a step may write."""
        group = self.torchkv_group
        group.window = self.sliding_window
        group.ring = ring_blocks(group.window, max_batch_tokens, self.tokens_per_page)
        self.sliding_window = group.ring * self.tokens_per_page  # of which transformers counts the blocks


class _Memory(_theirs.PagedAttentionMemoryHandler):
    """How many blocks fit, where there are no masks, and nothing of the cache is copied to be read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_attention_masks = 0
        self.kv_heads_at_peak = 0


class SectorCache(PagedSteps, _theirs.PagedAttentionCache):
    """`PagedAttentionCache` of transformers from 5.18 on over torchkv's caches."""

    def __init__(self, kind: CacheKind, **options: Any) -> None:
        self.torchkv_kind = kind
        kinds = {"full_attention": _FullPages, "sliding_attention": _SlidingPages}
        initialise = with_globals(
            _theirs.PagedAttentionCache.__init__,
            ATTN_TYPE_TO_ALLOCATOR={name: partial(made, kind, name) for name, made in kinds.items()},
            FullAttentionCacheAllocator=SimpleNamespace(get_bytes_per_page=partial(bytes_per_page, kind)),
            PagedAttentionMemoryHandler=_Memory,
        )
        initialise(self, **options)
        allocators: list[Any] = list(self.cache_allocators.values())
        for allocator in allocators:
            if isinstance(allocator, _SlidingPages):
                allocator.set_ring(self.max_batch_tokens)
        self.torchkv_begin(
            [allocator.torchkv_group for allocator in allocators],
            {layer: store for allocator in allocators for layer, store in allocator.torchkv_stores.items()},
            allocators[0].tokens_per_page,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Leaves the new keys and values to the attention that comes next, which writes them and attends."""
        kwargs["cache"] = self
        return key_states, value_states
