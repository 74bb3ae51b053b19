"""PagedLayer: the part of a `PagedCache` that one layer of a model has."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from torchkv.cache import PagedKVCache
from torchkv.integrations.transformers.handle import ATTENTION, Handle, UnsupportedError, pass_on
from torchkv.integrations.transformers.masks import COUNTS
from torchkv.integrations.transformers.tables import FixedTables, GrowingTables


class PagedLayer(CacheLayerMixin):
    """The part of a `PagedCache` that one layer of a model has.

    Attributes:
        store: Its `torchkv.PagedKVCache`; None before the first keys.
        sliding_window: How many of the last positions a query sees; None: all.
    """

    is_croppable = True

    def __init__(
        self,
        tables: GrowingTables | FixedTables,
        place: tuple[int, int],
        sliding_window: int | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.index, self._count = place
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.is_compileable = isinstance(tables, FixedTables)
        self.store: PagedKVCache | None = None
        self._tables, self._options = tables, options

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates, for keys and values of these shapes, `[batch, heads, tokens, size]`."""
        self.store = PagedKVCache.create(
            num_blocks=self._tables.num_blocks, block_size=self._tables.block_size, num_heads=key_states.shape[1],
            head_size=key_states.shape[3], head_size_v=value_states.shape[3],
            dtype=torch.promote_types(key_states.dtype, value_states.dtype), device=key_states.device, **self._options,
        )  # fmt: skip
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in (*self.store.caches, self.store.k_scale, self.store.v_scale):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)
        self._tables.prepare(key_states.shape[0], key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, kwargs: dict[str, Any] | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Leaves the new keys and values to the attention that comes next, which writes them and attends."""
        tables = self._tables
        if tables.pending is not None:
            raise UnsupportedError(
                f'attn_implementation must be "{ATTENTION}" with a PagedCache: layer {tables.pending} attended without '
                f'it; call model.set_attn_implementation("{ATTENTION}")'
            )
        tables.pending = self.index
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pass_on(Handle(self, key_states), kwargs)
        return key_states, value_states

    def arrived(self) -> None:
        """Says that the attention that `update` left keys to is the right one."""
        self._tables.pending = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        window: int | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Writes the new keys and values, and attends: `[batch, tokens, num_q_heads, head_size_v]`."""
        tables, store, backend = self._tables, self.store, self._tables.backend
        assert store is not None
        if window is not None and window != self.sliding_window:
            raise UnsupportedError(
                f"sliding_window must be {self.sliding_window} in layer {self.index}, as in the config, got {window}"
            )
        batch, _, tokens, _ = key.shape
        if query.shape[2] != tokens:
            raise UnsupportedError(f"query must have {tokens} tokens, as key, got {query.shape[2]}")
        if mask is not None and (mask.dtype != torch.int32 or mask.shape != (batch, 1, 1, COUNTS + tokens)):
            raise UnsupportedError(
                "attention_mask must have shape (batch, tokens), nonzero where a token is real: masks of other shapes "
                f"cannot be read from a paged cache, got {tuple(mask.shape)} of {mask.dtype}"
            )
        step = tables.begin(mask, batch, tokens, key.device) if self.index == 0 else tables.step(key.device)
        if step.pairs is not None:
            store.copy_blocks(step.pairs, backend=backend)
        query, key, value = (_rows(tensor, step.order) for tensor in (query, key, value))
        if key.dtype != value.dtype:  # under autocast, where keys are rotated in float32, and values are not
            dtype = torch.promote_types(key.dtype, value.dtype)
            key, value = key.to(dtype), value.to(dtype)
        store.write(key, value, step.slots, backend=backend)
        out = store.attend(
            query, step.block_tables, step.seq_lens, query_start_loc=step.query_start_loc,
            sliding_window=self.sliding_window, backend=backend, **options,
        ).view(batch, tokens, query.shape[1], value.shape[2])  # fmt: skip
        if step.order is not None:
            out = torch.empty_like(out).scatter_(1, step.order[:, :, None, None].expand_as(out), out)
        if self.index == self._count - 1:
            tables.end()
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask, of which `paged_mask` makes no use, and where they begin."""
        length = self._tables.length
        return (self._tables.max_tokens if isinstance(length, Tensor) else length + query_length), 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Tokens of each sequence, padding among them."""
        return self._tables.length

    def get_max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self._tables.max_tokens

    get_max_cache_shape = get_max_length

    def copy_blocks(self, pairs: Tensor) -> None:
        """Copies blocks to other blocks, `[n, 2]` of source and destination."""
        if self.store is not None:
            self.store.copy_blocks(pairs.to(self.store.caches[0].device), backend=self._tables.backend)

    def __repr__(self) -> str:
        return f"PagedLayer({self.store})"


def _rows(states: Tensor, order: Tensor | None) -> Tensor:
    """`[batch, heads, tokens, size]` as `[batch * tokens, heads, size]`, tokens in another order."""
    states = states.transpose(1, 2)
    if order is not None:
        states = states.gather(1, order[:, :, None, None].expand_as(states))
    return states.flatten(0, 1)
