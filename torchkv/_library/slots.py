"""The op that finds the slots of new tokens, as torch.library knows it.

`slot_mapping_out` writes its result to the tensor which is its first argument.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcore.contract.slots import SlotMapping
from torchkv._library.base import Backends, call_each, define
from torchkv._slots import SlotCall
from torchkv._torch import slots as torch_slots
from torchkv._triton.slots import Slots

_ARGUMENTS = (
    "Tensor block_tables, Tensor? query_start_loc, Tensor seq_lens, int block_size, SymInt? num_tokens, str? backend"
)


def _out_call(out: Tensor, *args: Any) -> SlotCall:
    return SlotCall(*args, result=out)


def _fake(described: SlotMapping, call: SlotCall) -> Tensor:
    if call.result is not None:
        return call.result
    return call.block_tables.new_empty(described.num_tokens, dtype=torch.int32)


def _one_by_one(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Tensor, int]:
    """vmap: a call for each item of a batch."""
    return torch.stack(call_each(op, batch_size, in_dims, args)), 0


def _one_by_one_out(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[None, None]:
    """vmap: a call for each item of a batch, into that item's tensor for the result."""
    if in_dims[0] is None:
        raise ValueError("vmap must map the tensors that are given for results")
    call_each(op, batch_size, in_dims, args)
    return None, None


_BACKENDS = Backends(torch_slots.slot_mapping, _fake)

slot_mapping = define(f"slot_mapping({_ARGUMENTS}) -> Tensor", SlotCall, Slots(), _BACKENDS, _one_by_one)
slot_mapping_out = define(
    f"slot_mapping_out(Tensor(a!) out, {_ARGUMENTS}) -> ()", _out_call, Slots(), _BACKENDS, _one_by_one_out
)
