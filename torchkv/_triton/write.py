"""The kernels that write: how they are prepared and run."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kvcore.contract.write import Write
from kvcore.plan import write as plan_write
from kvcore.plan.kernel import Target
from torchkv._call import WriteCall, layer_of
from torchkv._triton.launch import Load, Runner, aligned_pointers, pointees
from torchkv._triton.launches import Apart, Launch, Launches


class WriteKernel(NamedTuple):
    """The kernel of a write, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        kernel: What is launched.
        slots: Which of the call's tensors is slot_mapping.
        scalars: The kernel's last arguments, after the number of tokens.
    """

    described: Write
    plan: plan_write.WritePlan
    kernel: Any
    slots: int
    scalars: tuple[int, ...]

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[()]:
        """Starts the kernel, unless there is nothing to write."""
        num_tokens = tensors[self.slots].shape[0]
        if num_tokens:
            runner.start(self.kernel, self.plan.grid(num_tokens), (*pointers, num_tokens, *self.scalars))
        return ()


class Writes(Launches[WriteKernel]):
    """Launches of an op whose tensors begin with key, value, those that are written to, and slot_mapping."""

    any_length: ClassVar[Mapping[str, int]] = {"key": 0, "value": 0, "slot_mapping": 0}

    def tensors(self, call: WriteCall) -> list[Tensor]:
        v_scale = None if call.v_scale is call.k_scale else call.v_scale
        tensors = call.key, call.value, *call.written, call.slot_mapping, call.k_scale, v_scale, call.layer_index
        return [tensor for tensor in tensors if tensor is not None]

    def fits(self, kernels: WriteKernel, tensors: Sequence[Tensor]) -> bool:
        return tensors[kernels.slots].shape[0] <= tensors[0].shape[0] == tensors[1].shape[0]

    def pointers(self, described: Write, call: WriteCall) -> list[Any]:
        arguments = plan_write.arguments(
            described, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale,
            call.v_scale, layer_of(call), num_tokens=0,
        )  # fmt: skip
        return arguments[: -len(plan_write.SCALARS)]

    def prepare(self, call: WriteCall, described: Write, target: Target, load: Load) -> Launch[WriteKernel]:
        plan = plan_write.plan_write(described, target, layer_is_pointer=call.layer_index is not None)
        names, values = plan_write.pointers(described), self.pointers(described, call)
        # Scales and layer count as unaligned, so that those of all layers are alike.
        aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
        kernel, slots = load(plan.kernel, pointees(names, values), aligned), 2 + len(call.written)
        return Launch(
            WriteKernel(described, plan, kernel, slots, plan_write.scalars(described, 0)[1:]),
            call.device,
            described.cache.extents.num_layers,
            aligned=slots + 1,
            any_length=(0, 1, slots),
            written=range(2, slots),
            apart=Apart([*combinations(range(2, slots), 2)]),
        )
