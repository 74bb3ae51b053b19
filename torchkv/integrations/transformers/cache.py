"""PagedCache: a cache of transformers whose keys and values lie in `torchkv.PagedKVCache`s, one for each layer."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcore.cache_spec import CacheSpec
from kvcore.choices import KVCacheDtype, Layout, TorchBackend
from kvcore.contract.checks import check_backend
from kvcore.integers import integer
from torchkv._arguments import BACKENDS
from torchkv.integrations.transformers.config import layer_windows
from torchkv.integrations.transformers.handle import ATTENTION, UnsupportedError
from torchkv.integrations.transformers.layer import PagedLayer
from torchkv.integrations.transformers.tables import FixedTables, GrowingTables


class PagedCache(Cache):
    """A cache for `generate` and for a model's forward, in blocks, quantised if you like.

    It is passed as `cache=`, before transformers 5.24 as `past_key_values=`. The model's attention has to be "torchkv";
    `for_model` sees to it. Sequences take blocks as they grow, and the beams
    of a search share those that they have in common. A cache serves one batch at a time; `reset` empties it.

    Args:
        config: The model's config, `model.config`.
        max_tokens: Tokens that a sequence may have, prompt and answer together, without padding.
        batch_size: Sequences at a time: prompts times beams, or times sequences that each prompt is answered with.
        num_blocks: Blocks of each layer; None: for batch_size sequences of max_tokens tokens.
        block_size: Tokens of a block.
        kv_cache_dtype: "auto" for the model's dtype, or a format that `torchkv.PagedKVCache` knows: "fp8", "int8", ….
        per_token_head: Whether each head of a token has a scale of its own, as is best for "int8".
        k_scale: Otherwise, what quantised keys are divided by: a number, or float32 of one element or `[num_heads]`, or
            for each layer `[num_layers, 1]` or `[num_layers, num_heads]`; None means 1.
        v_scale: The same for values.
        layout: The layout of each layer's memory.
        compileable: Whether compiled code may change the cache: sequences have all their blocks from the beginning, no
            length is read on the host, and padding is on the left only. `generate` compiles then, on a GPU by itself.
        backend: None, "triton", "torch" or "interpret".

    Raises:
        UnsupportedError: the model has layers of another kind than attention, with or without a sliding window.
        ValueError: a number is too small, or a choice or a scale's shape does not fit.
        TypeError: a number is no integer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torchkv.integrations.transformers import PagedCache
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> cache = PagedCache.for_model(model, max_tokens=64, kv_cache_dtype="int8", per_token_head=True)
        >>> exactly = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
        >>> text = model.generate(torch.tensor([[1, 2, 3]]), cache=cache, **exactly)
        >>> text.shape, cache.get_seq_length(), cache.blocks_in_use
        (torch.Size([1, 7]), 6, 1)
    """

    def __init__(
        self,
        config: Any,
        *,
        max_tokens: int,
        batch_size: int = 1,
        num_blocks: int | None = None,
        block_size: int = 16,
        kv_cache_dtype: KVCacheDtype = "auto",
        per_token_head: bool = False,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        layout: Layout = "NHD",
        compileable: bool = False,
        backend: TorchBackend | None = None,
    ) -> None:
        self._config, windows = layer_windows(config)
        max_tokens, block_size = integer("max_tokens", max_tokens, 1), integer("block_size", block_size, 1)
        batch_size = integer("batch_size", batch_size, 1)
        if num_blocks is None:
            num_blocks = batch_size * -(-max_tokens // block_size)
        kind = FixedTables if compileable else GrowingTables
        self._tables = kind(integer("num_blocks", num_blocks, 1), block_size, max_tokens, backend)
        check_backend(backend, BACKENDS)
        # What does not fit is said here, not by the first forward. A head of 128 stands for those of the model.
        spec = CacheSpec.create(
            num_layers=None, num_blocks=1, block_size=block_size, num_heads=1, head_size=128, head_size_v=None,
            dtype="float32", layout=layout, kv_cache_dtype=kv_cache_dtype, per_token_head=per_token_head,
        )  # fmt: skip
        spec.check_scales(k_scale, v_scale)
        check_scales_of_layers(len(windows), k_scale=k_scale, v_scale=v_scale)
        options = {"kv_cache_dtype": kv_cache_dtype, "per_token_head": per_token_head, "layout": layout}
        self._layers = [
            PagedLayer(
                self._tables,
                (i, len(windows)),
                window,
                {**options, "k_scale": of_layer(k_scale, i), "v_scale": of_layer(v_scale, i)},
            )
            for i, window in enumerate(windows)
        ]
        super().__init__(layers=[*self._layers])

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> "PagedCache":
        """A cache for a model, whose attention becomes "torchkv".

        Args:
            model: A model of transformers, for text.
            options: Those of `PagedCache`, of which max_tokens is needed.

        Raises:
            UnsupportedError: as for PagedCache.
            ValueError: a number is too small, a choice does not fit, or the model's attention cannot be chosen.
        """
        cache = cls(model.config, **options)
        model.set_attn_implementation(ATTENTION)
        if cache._config._attn_implementation != ATTENTION:
            raise UnsupportedError(f'attn_implementation must be "{ATTENTION}", which {type(model).__name__} ignores')
        return cache

    @property
    def blocks_in_use(self) -> int:
        """Blocks of each layer that sequences have."""
        return self._tables.blocks_in_use

    @property
    def batch_size(self) -> int:
        """Sequences in the cache; -1 before the first."""
        return self._tables.batch or -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new keys and values, `[batch, heads, tokens, size]`, and returns them as they are.

        Raises:
            UnsupportedError: the model's attention is not "torchkv".
        """
        if self._config._attn_implementation != ATTENTION:
            raise UnsupportedError(
                f'attn_implementation must be "{ATTENTION}" with a PagedCache, got '
                f'"{self._config._attn_implementation}"; call model.set_attn_implementation("{ATTENTION}")'
            )
        return self._layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens of each sequence.

        Args:
            tokens_to_remove: How many, as a negative number, or 0.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative, or 0, got {tokens_to_remove}")
        self._tables.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Has each sequence go on from what another one is, as in beam search.

        Args:
            beam_idx: `[batch]` of integers: which one.
        """
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Has each sequence be there several times, side by side."""
        self._reorder([i for i in range(self._tables.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only some sequences.

        Args:
            indices: Which, as a tensor indexes a tensor of `[batch]`.
        """
        self._reorder(torch.arange(self._tables.batch)[indices.cpu()].tolist())

    def reset(self) -> None:
        """Empties the cache, whose memory stays where it is."""
        self._tables.reset()

    def _reorder(self, indices: list[int]) -> None:
        if self._tables.batch:
            pairs = self._tables.reorder(indices)
            if pairs is not None:
                for layer in self._layers:
                    layer.copy_blocks(pairs)

    def __repr__(self) -> str:
        return (
            f"PagedCache({len(self._layers)} layers, {self.blocks_in_use} of {self._tables.num_blocks} blocks in use)"
        )


def of_layer(scale: Any, layer: int) -> Any:
    """The scale of one layer, of those that a user gave."""
    return scale[layer] if len(_shape(scale)) == 2 else scale


def check_scales_of_layers(layers: int, **scales: Any) -> None:
    """Raises a ValueError unless scales, by their names, that have two axes have a row for each layer."""
    for name, scale in scales.items():
        shape = _shape(scale)
        if len(shape) == 2 and shape[0] != layers:
            raise ValueError(f"{name} must have a row for each of the {layers} layers, got shape {tuple(shape)}")


def _shape(scale: Any) -> tuple[int, ...]:
    return tuple(getattr(scale, "shape", ()))
