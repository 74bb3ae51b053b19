"""`relayout` as vectorised torch: for devices without Triton, and to compare with."""

import torch
from torch import Tensor

from kvcore.contract.cache import Cache
from kvcore.contract.relayout import Relayout
from kvcore.placement import Address
from torchkv._call import GatherCall, WriteCall
from torchkv._relayout import RelayoutCall
from torchkv._torch.access import view_of
from torchkv._torch.formats import BITS
from torchkv._torch.read import gather
from torchkv._torch.write import write


def relayout(described: Relayout, call: RelayoutCall) -> None:
    """Moves with advanced indexing. Numbers are read a chunk of slots at a time, and written."""
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
    if described.requantise:
        for layer in [None] if here.num_layers is None else range(here.num_layers):
            for some, places in zip(slots.split(described.chunk), targets.split(described.chunk), strict=True):
                _requantise(described, call, some, places, layer)
        return
    for run in described.runs:

        def view(array: Tensor, address: Address, cache: Cache) -> Tensor:
            return view_of(array, BITS[run.bits], address, cache.extents, run.units)  # noqa: B023

        old = view(call.source[run.arrays[0]], run.addresses[0], described.source)
        new = view(call.written[run.arrays[1]], run.addresses[1], described.destination)
        rows = old[:, slots // here.block_size, slots % here.block_size]
        new[:, targets // there.block_size, targets % there.block_size] = rows.reshape(*rows.shape[:3], *new.shape[4:])


def _requantise(described: Relayout, call: RelayoutCall, slots: Tensor, targets: Tensor, layer: int | None) -> None:
    """Reads slots of a layer, and writes them to others."""
    caches, scale_caches = call.source_caches
    k_scale, v_scale = scale_caches or (call.source_k_scale, call.source_v_scale)
    reading = GatherCall(
        list(caches), slots, None, 0, described.between, str(call.source_kv_cache_dtype), k_scale, v_scale,
        call.source_layout, layer, None, call.head_size, call.head_size_v, call.backend, call.source_scale_layout,
    )  # fmt: skip
    key, value = gather(reading.check(), reading)
    writing = WriteCall(
        key, value, call.caches, call.scale_caches, targets, call.kv_cache_dtype, call.k_scale, call.v_scale,
        call.layout, layer, None, call.backend, call.scale_layout,
    )  # fmt: skip
    write(writing.check(), writing)
