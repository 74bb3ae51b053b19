"""Compile and launch the kernels that write on CUDA and ROCm tensors, and interpret them on CPU tensors."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.write import Write
from kvcore.plan import write as plan_write
from kvcore.plan.kernel import INTERPRETER
from torchkv._call import WriteCall, layer_of
from torchkv._triton.launch import INTERPRETED, Runner, aligned_pointers, load, pointees, target
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

    any_length = {"key": 0, "value": 0, "slot_mapping": 0}

    def again(self, arguments: Sequence[Any]) -> tuple[()] | None:
        found = self._known.find(arguments)
        if found is None:
            return None
        (launch, pointers, mark), tensors, addresses = found
        if not self.fits(launch.kernels, tensors) or launch.apart.unseen(tensors, addresses):
            return None
        launch.run(pointers(addresses), tensors)
        mark(tensors)
        return ()

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        return arguments

    def tensors(self, call: WriteCall) -> list[Tensor]:
        return _tensors(call)

    def fits(self, kernels: WriteKernel, tensors: Sequence[Tensor]) -> bool:
        return tensors[kernels.slots].shape[0] <= tensors[0].shape[0] == tensors[1].shape[0]

    def pointers(self, described: Write, call: WriteCall) -> list[Any]:
        return _pointers(described, call)

    def prepare(self, call: WriteCall, described: Write) -> Launch[WriteKernel]:
        names, values = plan_write.pointers(described), _pointers(described, call)
        # Scales and layer count as unaligned: what is known of a call does not say how they are aligned.
        aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
        with torch.cuda.device(call.device):
            plan = plan_write.plan_write(described, target(), layer_is_pointer=call.layer_index is not None)
            kernel = load(plan.kernel, pointees(names, values), aligned)
        slots = 2 + len(call.written)
        return Launch(
            _kernel(described, call, plan, kernel),
            call.device,
            described.cache.extents.num_layers,
            aligned=slots + 1,
            any_length=(0, 1, slots),
            written=range(2, slots),
            apart=Apart([*combinations(range(2, slots), 2)]),
        )


def interpret_write(described: Write, call: WriteCall) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_write.plan_write(described, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    kernel = _kernel(described, call, plan, plan.kernel)
    kernel.run(INTERPRETED, _pointers(described, call), _tensors(call))


def _kernel(described: Write, call: WriteCall, plan: plan_write.WritePlan, kernel: Any) -> WriteKernel:
    return WriteKernel(described, plan, kernel, 2 + len(call.written), plan_write.scalars(described, 0)[1:])


def _tensors(call: WriteCall) -> list[Tensor]:
    v_scale = None if call.latent else call.v_scale  # else it is k_scale
    tensors = call.key, call.value, *call.written, call.slot_mapping, call.k_scale, v_scale, call.layer_index
    return [tensor for tensor in tensors if tensor is not None]


def _pointers(described: Write, call: WriteCall) -> list[Any]:
    """The kernel's arguments before its scalars."""
    arguments = plan_write.arguments(
        described, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale, call.v_scale,
        layer_of(call), num_tokens=0,
    )  # fmt: skip
    return arguments[: -len(plan_write.SCALARS)]
