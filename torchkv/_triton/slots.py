"""The kernel of `slot_mapping`: how it is prepared and run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvcore.contract.slots import SlotMapping
from kvcore.plan import slots as plan_slots
from kvcore.plan.kernel import Target
from torchkv._slots import SlotCall
from torchkv._triton.launch import Empty, Load, Runner, aligned_pointers, empty, pointees
from torchkv._triton.launches import Apart, Launch, Launches


class SlotKernel(NamedTuple):
    """The kernel of `slot_mapping`, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        kernel: What is launched.
        new: The result; None where the call's first tensor is for it.
    """

    described: SlotMapping
    plan: plan_slots.SlotMappingPlan
    kernel: Any
    new: Empty | None

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
        """Starts the kernel, unless there is no token."""
        slots = tensors[0] if self.new is None else runner.empty(*self.new)
        if self.described.num_tokens:
            runner.start(self.kernel, self.plan.grid, (*pointers, runner.address(slots)))
        return slots


class Slots(Launches[SlotKernel]):
    """Launches of `slot_mapping`, or of `slot_mapping_out`, whose first argument is the tensor for the result."""

    def __init__(self) -> None:
        super().__init__(k_scale=None)

    def tensors(self, call: SlotCall) -> list[Tensor]:
        tensors = call.result, call.block_tables, call.query_start_loc, call.seq_lens
        return [tensor for tensor in tensors if tensor is not None]

    def pointers(self, described: SlotMapping, call: SlotCall) -> list[Any]:
        return plan_slots.arguments(described, call.block_tables, call.query_start_loc, call.seq_lens)

    def prepare(self, call: SlotCall, described: SlotMapping, target: Target, load: Load) -> Launch[SlotKernel]:
        plan, values = plan_slots.plan_slot_mapping(described), self.pointers(described, call)
        # A new tensor is a multiple of 16.
        aligned = aligned_pointers(plan_slots.POINTERS, values)
        aligned |= {"slots_ptr"} if call.result is None else aligned_pointers(["slots_ptr"], [call.result])
        kernel = load(plan.kernel, pointees(plan_slots.POINTERS, values) | {"slots_ptr": "int32"}, aligned)
        given, count = call.result is not None, len(self.tensors(call))
        return Launch(
            SlotKernel(described, plan, kernel, None if given else empty((described.num_tokens,), "int32")),
            call.device,
            num_layers=None,
            aligned=count,
            any_length=(),
            written=(0,) if given else (),
            apart=Apart([(0, i) for i in range(1, count)]) if given else None,
        )
