"""The cache of continuous batching in transformers 5.17: groups of as many layers each, which share tensors.

Layer i of each group has tensor i, and no two groups have the same block. Who has which block stays transformers'
affair, with sharing of prefixes and forks; what lies in a block is torchkv's.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from torchkv.integrations.transformers.handle import UnsupportedError
from torchkv.integrations.transformers.kind import CacheKind, Group, PagedSteps, ring_blocks
from torchkv.integrations.transformers.rebinding import with_globals

_theirs: Any = import_module("transformers.generation.continuous_batching.cache")


def _memory(kind: CacheKind, dtype: torch.dtype) -> type[Any]:
    """What finds how many blocks fit, where there are no masks, and nothing of the cache is copied to be read."""

    class Memory(_theirs.PagedAttentionMemoryHandler):
        def __init__(self, *, config: Any, **options: Any) -> None:
            super().__init__(config=config, **options)
            self.num_attention_masks = 0
            self.activation_dtype = dtype
            block = kind.spec(
                self.block_size, _theirs.find_num_kv_heads(config), _theirs.find_head_dim(config), dtype
            ).nbytes
            self.page_size = -(-block // (2 * self.block_size * self.cache_dtype.itemsize))  # scales among it

        @property
        def activation_peak(self) -> dict[str, tuple[int, ...]]:
            peaks = super().activation_peak
            return {name: (each_token, 0, *rest) for name, (each_token, _, *rest) in peaks.items()}

    return Memory


class GroupCache(PagedSteps, _theirs.PagedAttentionCache):
    """`PagedAttentionCache` of transformers 5.17 over torchkv's caches."""

    def __init__(self, kind: CacheKind, *, dtype: torch.dtype, **options: Any) -> None:
        self.torchkv_kind = kind
        config, settings = options["config"], options["continuous_batching_config"]
        if kind.per_token_head and settings.cpu_offload_space != 0:
            raise UnsupportedError(
                "cpu_offload_space must be 0 with per_token_head in transformers before 5.18, which does not swap "
                f"scales, got {settings.cpu_offload_space}"
            )
        head_size = _theirs.find_head_dim(config)
        small = kind.spec(settings.block_size, _theirs.find_num_kv_heads(config), head_size, dtype)
        element = getattr(torch, small.dtype)
        initialise = with_globals(
            _theirs.PagedAttentionCache.__init__,
            PagedAttentionMemoryHandler=_memory(kind, dtype),
            find_head_dim=lambda config: small.shapes[0][-1],  # of a tensor, bytes where two elements share one
        )
        initialise(self, dtype=element, **options)
        total = self.num_blocks + 2  # two that no request has
        spec = kind.spec(self.block_size, self.num_key_value_heads, head_size, dtype, total)
        self._scale_caches = [
            [torch.zeros(shape, dtype=torch.float32, device=self.device) for shape in spec.scale_shapes]
            for _ in self.key_cache
        ]
        for tensor in (*self.key_cache, *self.value_cache):
            tensor.zero_()
        stores = {}
        for layer, (_, place) in self.layer_index_to_group_indices.items():
            caches = [self.key_cache[place].view(spec.shapes[0]), self.value_cache[place].view(spec.shapes[1])]
            stores[layer] = kind.store(layer, spec, dtype, caches, self._scale_caches[place])
        groups = []
        layers_of, types = _theirs.group_layers_by_attn_type(config)
        for index, (layers, layer_type) in enumerate(zip(layers_of, types, strict=True)):
            manager: Any = self.group_cache_managers[index]
            group = Group(index, layer_type, layers, manager.block_table)
            if layer_type == "sliding_attention":
                group.window = config.sliding_window
                group.ring = ring_blocks(config.sliding_window, self.max_batch_tokens, self.block_size)
                manager._max_blocks_per_request = self.max_sliding_window_blocks_per_request = group.ring
            groups.append(group)
        self.torchkv_begin(groups, stores, self.block_size)

    def get_seqlens_k(self, past_length: int, query_length: int) -> dict[str, int]:
        """Positions that new tokens may see, from the beginning of a block on, by the type of the layer."""
        return {
            group.layer_type: group.seen(past_length, query_length, self.torchkv_block_size)
            for group in self.torchkv_groups
        }

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not called by the attention that this cache is for.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError('attn_implementation must be "torchkv_continuous" with this cache')

    def copy_cache(self, list_source_blocks: list[int], list_forked_blocks: list[int]) -> None:
        """Copies blocks, with their scales."""
        super().copy_cache(list_source_blocks, list_forked_blocks)
        for scales in self._scale_caches:
            for tensor in scales:
                tensor[list_forked_blocks] = tensor[list_source_blocks]
