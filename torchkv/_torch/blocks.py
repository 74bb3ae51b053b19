"""Copies and zeros of whole blocks as vectorised torch: for devices without Triton, and to compare with."""

from torch import Tensor

from kvcore.contract.blocks import BlockArray, Blocks
from torchkv._blocks import BlocksCall
from torchkv._torch.formats import BITS


def move_blocks(described: Blocks, call: BlocksCall) -> None:
    """Moves with advanced indexing, which reads all before it writes."""
    indices = call.indices.long()
    exists = (indices >= 0) & (indices < described.num_blocks)
    indices = indices[exists.all(1) if described.copies else exists]
    for tensor, array in zip(call.written, described.arrays, strict=True):
        blocks = blocks_of(tensor, array)
        if described.copies:
            source, destination = indices.unbind(1)
            blocks[destination] = blocks[source]
        else:
            blocks[indices] = 0


def blocks_of(tensor: Tensor, array: BlockArray) -> Tensor:
    """The memory as integers, with the axis of blocks in front."""
    bits = tensor.view(BITS[8 * tensor.element_size()])
    return bits.as_strided(array.shape, array.steps, bits.storage_offset()).movedim(array.axis, 0)
