"""A call of `swap_blocks`: its arguments by name, and what the contract says of them."""

from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvcore.arrays import array_names
from kvcore.contract.checks import overlap_error
from kvcore.contract.swap import Swap, check_swap, unpinned_error
from torchkv._arguments import spec_of
from torchkv._memory import check_apart, share_elements


class SwapCall(NamedTuple):
    """Arguments of the op.

    Attributes:
        source: The key and the value cache that are read, or the one with both.
        source_scales: Their scale caches, or none.
        caches: Those that are written.
        scale_caches: Their scale caches, or none.
        pairs: Blocks of source and of destination.
        layout: A pattern.
        scale_layout: A pattern.
        backend: None, "triton", "torch" or "interpret".
    """

    source: tuple[Tensor, ...]
    source_scales: tuple[Tensor, ...]
    caches: tuple[Tensor, ...]
    scale_caches: tuple[Tensor, ...]
    pairs: Tensor
    layout: str | None
    scale_layout: str | None
    backend: str | None

    @property
    def layer(self) -> None:
        """All layers are meant."""
        return

    @property
    def device(self) -> torch.device:
        """Where the op runs: of the two devices, the one that is not the host."""
        source, destination = self.source[0].device, self.caches[0].device
        return source if destination.type == "cpu" else destination

    @property
    def read(self) -> tuple[Tensor, ...]:
        """Caches and scale caches of source."""
        return self.source + self.source_scales

    @property
    def written(self) -> tuple[Tensor, ...]:
        """All tensors that are written to."""
        return self.caches + self.scale_caches

    def check(self) -> Swap:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit, or a tensor overlaps itself.
            TypeError: a dtype does not fit.
        """
        source, destination = (
            ([spec_of(t) for t in caches], [spec_of(t) for t in scales])
            for caches, scales in ((self.source, self.source_scales), (self.caches, self.scale_caches))
        )
        return check_swap(spec_of(self.pairs), source, destination, self.layout, self.scale_layout)

    def check_memory(self, described: Swap) -> None:
        """Raises a ValueError unless written tensors share no memory, and a kernel reaches the host's."""
        del described
        names = array_names(len(self.caches), len(self.scale_caches))
        ours, theirs = ([f"{side}'s {name}" for name in names] for side in ("source", "destination"))
        check_apart(theirs, self.written)
        for (name, tensor), (other, read) in product(
            zip(theirs, self.written, strict=True), zip(ours, self.read, strict=True)
        ):
            if tensor.device == read.device and share_elements(tensor, read):
                raise overlap_error(name, other)
        if self.backend != "torch":  # whose copies take pageable memory, too
            check_pinned([*ours, *theirs], (*self.read, *self.written), self.device)

    def pairs_apart(self) -> list[tuple[int, int]]:
        """Which of the tensors, read ones first, then written ones, must share no memory."""
        count = len(self.written)
        written = range(count, 2 * count)
        same = self.source[0].device == self.caches[0].device
        return [*combinations(written, 2), *(product(range(count), written) if same else ())]


def check_pinned(names: list[str] | None, tensors: tuple[Tensor, ...], device: torch.device) -> None:
    """Raises a ValueError if a tensor in the host's memory is one that the device cannot reach.

    Args:
        names: What errors call the tensors; None: by their places, as `SwapCall` has read and written ones.
        tensors: Read ones, then written ones.
        device: Where a kernel is to run.
    """
    if device.type == "cpu":
        return
    for i, tensor in enumerate(tensors):
        if tensor.is_cpu and not isinstance(tensor, FakeTensor) and not tensor.is_pinned():
            if names is None:
                count = len(tensors) // 2
                found = array_names(2 - count % 2, 0 if count < 3 else 2)
                names = [f"{side}'s {name}" for side in ("source", "destination") for name in found]
            raise unpinned_error(names[i], device)
