"""A call that moves whole blocks: its arguments by name, and what the contract says of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.arrays import array_names
from kvcore.contract.blocks import Blocks, check_blocks
from torchkv._arguments import spec_of
from torchkv._memory import check_apart


class BlocksCall(NamedTuple):
    """Arguments of `copy_blocks`, or of `zero_blocks`.

    Attributes:
        caches: The key and the value cache, or the one with both.
        scale_caches: Those of key and value, or none.
        pairs: Source and destination; None where blocks are filled with zeros.
        blocks: None where blocks are copied.
        layout: A pattern.
        scale_layout: A pattern.
        backend: None, "triton", "torch" or "interpret".
    """

    caches: tuple[Tensor, ...]
    scale_caches: tuple[Tensor, ...]
    pairs: Tensor | None
    blocks: Tensor | None
    layout: str | None
    scale_layout: str | None
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

    @property
    def indices(self) -> Tensor:
        """Pairs, or blocks."""
        indices = self.blocks if self.pairs is None else self.pairs
        assert indices is not None  # one of the two is always given
        return indices

    def check(self) -> Blocks:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit, or a tensor overlaps itself.
            TypeError: a dtype does not fit.
        """
        name = "blocks" if self.pairs is None else "pairs"
        caches, scale_caches = ([spec_of(t) for t in tensors] for tensors in (self.caches, self.scale_caches))
        return check_blocks(name, spec_of(self.indices), caches, scale_caches, self.layout, self.scale_layout)

    def check_memory(self, described: Blocks) -> None:
        """Raises a ValueError unless written tensors share no memory."""
        del described
        check_apart(array_names(len(self.caches), len(self.scale_caches)), self.written)
