"""Swaps of whole blocks as vectorised torch: for devices without Triton, and to compare with."""

from kvcore.contract.swap import Swap
from torchkv._swap import SwapCall
from torchkv._torch.blocks import blocks_of


def swap_blocks(described: Swap, call: SwapCall) -> None:
    """Gathers blocks where they are, moves them to where they are written, and scatters them there."""
    pairs = call.pairs.long()
    source, destination = pairs.unbind(1)
    exists = (source >= 0) & (source < described.num_source)
    exists &= (destination >= 0) & (destination < described.num_destination)
    source, destination = pairs[exists].unbind(1)
    for old, new, read, written in zip(call.read, call.written, described.source, described.destination, strict=True):
        blocks = blocks_of(old, read)[source.to(old.device)]
        blocks_of(new, written)[destination.to(new.device)] = blocks.to(new.device)
