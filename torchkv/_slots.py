"""Calls of `slot_mapping`: see `torchkv._call`."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.contract.checks import check_devices, check_result
from kvcore.contract.slots import SlotMapping, check_slot_mapping
from torchkv._arguments import maybe_spec, spec_of
from torchkv._memory import check_results_apart


class SlotCall(NamedTuple):
    """Arguments of `slot_mapping`, in the order of its schema. `result` is what `slot_mapping_out` writes to."""

    block_tables: Tensor
    query_start_loc: Tensor | None
    seq_lens: Tensor
    block_size: int
    num_tokens: int | None
    backend: str | None
    result: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the op runs."""
        return self.block_tables.device

    @property
    def layer(self) -> None:
        """There is no cache, and no layer of one."""

    def check(self) -> SlotMapping:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, number or device does not fit, or the tensor for the result is not contiguous.
            TypeError: a dtype does not fit.
        """
        tables = spec_of(self.block_tables)
        slots = check_slot_mapping(
            tables, maybe_spec(self.query_start_loc), spec_of(self.seq_lens), self.block_size, self.num_tokens
        )
        if self.result is not None:
            out = spec_of(self.result)
            check_result("out", out, (slots.num_tokens,), "int32")
            check_devices([("out", out)], "block_tables", tables)
        return slots

    def check_memory(self, _: SlotMapping) -> None:
        """Raises a ValueError unless the result shares no memory with inputs."""
        if self.result is not None:
            inputs = self._asdict()
            names = ("block_tables", "query_start_loc", "seq_lens")
            check_results_apart(["out"], [self.result], {name: inputs[name] for name in names})
