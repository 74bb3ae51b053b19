"""`relayout` where bits move, as vectorised torch: for devices without Triton, and to compare with."""

import torch
from torch import Tensor

from kvcore.contract.cache import Cache
from kvcore.contract.relayout import Relayout
from kvcore.placement import Address
from torchkv._relayout import RelayoutCall
from torchkv._torch.access import view_of
from torchkv._torch.formats import BITS


def relayout(described: Relayout, call: RelayoutCall) -> None:
    """Moves with advanced indexing."""
    here, there = described.source.extents, described.destination.extents
    device = call.caches[0].device
    if 0 in (here.num_slots, there.num_slots, described.num_pairs, described.num_layers):
        return
    if call.pairs is None:
        slots = targets = torch.arange(described.num_pairs, device=device)
    else:
        slots, targets = call.pairs.long().unbind(1)
        exists = (slots >= 0) & (slots < here.num_slots) & (targets >= 0) & (targets < there.num_slots)
        slots, targets = slots[exists], targets[exists]
    for run in described.runs:

        def view(array: Tensor, address: Address, cache: Cache) -> Tensor:
            return view_of(array, BITS[run.bits], address, cache.extents, run.units)  # noqa: B023

        old = view(call.source[run.arrays[0]], run.addresses[0], described.source)
        new = view(call.written[run.arrays[1]], run.addresses[1], described.destination)
        rows = old[:, slots // here.block_size, slots % here.block_size]
        new[:, targets // there.block_size, targets % there.block_size] = rows.reshape(*rows.shape[:3], *new.shape[4:])
