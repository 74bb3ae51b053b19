"""The slot mapping as vectorised torch: for devices without Triton, and to compare with."""

import torch
from torch import Tensor

from kvcore.contract.slots import SlotMapping
from torchkv._slots import SlotCall

_LONGEST = 2**31 - 1


def slot_mapping(described: SlotMapping, call: SlotCall) -> Tensor:
    """The slot of each token; in the tensor that a call brings for it, or in a new one."""
    out = call.block_tables.new_empty(described.num_tokens, dtype=torch.int32) if call.result is None else call.result
    (num_seqs, max_blocks), block_size = described.block_tables.shape, described.block_size
    if 0 in (num_seqs, max_blocks):
        return out.fill_(-1)
    token = torch.arange(described.num_tokens, device=call.device)
    if call.query_start_loc is None:
        after = end = token + 1
    else:
        starts = call.query_start_loc.long()
        # Starts that descend are passed over: each sequence begins where the ones before it do, or later.
        after = torch.searchsorted(starts.cummax(0).values, token, right=True)
        end = starts[after.clamp(max=num_seqs)].clamp(max=_LONGEST)
    mapped = (after > 0) & (after <= num_seqs)
    seq = (after - 1).where(mapped, 0)
    position = call.seq_lens.long().clamp(0, _LONGEST)[seq] - end + token
    column = position.div(block_size, rounding_mode="floor")
    mapped &= (position >= 0) & (column < max_blocks)
    block = call.block_tables[seq, column.where(mapped, 0)].long()
    mapped &= (block >= 0) & (block <= _LONGEST // block_size)
    slot = block.where(mapped, 0) * block_size + position.where(mapped, 0) % block_size
    return out.copy_(slot.where(mapped & (slot <= _LONGEST), -1))
