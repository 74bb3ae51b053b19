"""A step: where the new tokens of one forward go, and what each of them reads. All layers share it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.choices import TorchBackend
from torchkv.integrations.transformers.masks import COUNTS
from torchkv.slots import slot_mapping


class Step(NamedTuple):
    """What `PagedKVCache.write` and `attend` take, for `tokens` new rows of each of the sequences."""

    slots: Tensor  # [batch * tokens] of int32; -1: padding
    block_tables: Tensor  # [batch, max_blocks] of int32
    seq_lens: Tensor  # [batch] of int32, real tokens, the new ones among them
    query_start_loc: Tensor | None  # [batch + 1] of int32; None: one new row each
    order: Tensor | None  # [batch, tokens] of int64: the rows with padding first; None: as they are
    pairs: Tensor | None  # [n, 2] of int32: blocks to be copied before anything is written

    def to(self, device: torch.device) -> "Step":
        """The step on a device."""
        moved: list[Any] = [None if tensor is None else tensor.to(device) for tensor in self]
        return Step(*moved)


def make_step(
    block_tables: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    tokens: int,
    block_size: int,
    *,
    order: Tensor | None = None,
    pairs: Tensor | None = None,
    backend: TorchBackend | None = None,
) -> Step:
    """A step of `tokens` new rows a sequence.

    A sequence's new real tokens are taken to be its last rows, in the order of `order`. Those before them are padding:
    they have no slot, and what they attend to has no meaning.

    Args:
        block_tables: `[batch, max_blocks]` of int32.
        seq_lens: `[batch]` of int32: real tokens, the new ones among them.
        mask: What `paged_mask` returned.
        tokens: New rows of each sequence.
        block_size: Slots of a block.
        order: `[batch, tokens]`, or None.
        pairs: `[n, 2]`, or None.
        backend: None, "triton", "torch" or "interpret".
    """
    batch, device = seq_lens.shape[0], seq_lens.device
    starts = None
    if tokens > 1:
        starts = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    slots = slot_mapping(block_tables, starts, seq_lens, block_size, batch * tokens, backend=backend)
    if mask is not None:
        padding = tokens - mask[:, 0, 0, 1:COUNTS]
        rows = torch.arange(tokens, dtype=torch.int32, device=device)
        slots = torch.where(rows >= padding, slots.view(batch, tokens), -1).flatten()
    return Step(slots, block_tables, seq_lens, starts, order, pairs)
