"""The kernel of `swap_blocks`: how it is prepared and run."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.swap import Swap
from kvcore.plan import swap as plan_swap
from kvcore.plan.kernel import Target
from torchkv._memory import address_of
from torchkv._swap import SwapCall, check_pinned
from torchkv._triton.launch import Load, Runner, aligned_pointers, pointees
from torchkv._triton.launches import Apart, Launch, Launches


class SwapKernel(NamedTuple):
    """The kernel of a call, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        kernel: What copies.
        device: Where it runs.
    """

    described: Swap
    plan: plan_swap.SwapPlan
    kernel: Any
    device: torch.device

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[()]:
        """Starts the kernel, unless there is nothing to do.

        Raises:
            ValueError: memory of the host is not pinned. It is looked at each time: nothing else that is known of a
                tensor tells, and a kernel that reads what it cannot reach ends the process's use of the device.
        """
        *memory, pairs = tensors
        grid = self.plan.grid(pairs.shape[0])
        check_pinned(None, tuple(memory), self.device)
        if 0 in grid:
            return ()
        described = self.described
        scalars = pairs.shape[0], described.num_source, described.num_destination
        runner.start(self.kernel, grid, (*pointers, *scalars))
        if self.device.type != "cpu":
            _keep_until_done(memory, self.device)
        return ()


def _keep_until_done(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Has torch hand out none of the host's memory again before the current stream has come to here.

    Nobody may wait for the kernel, and torch knows which streams use pinned memory from its own copies only: so one
    element of each tensor is copied. What a CUDA graph uses must be kept anyway.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    for tensor in tensors:
        if tensor.is_cpu and tensor.numel():
            first = tensor.as_strided((1,), (1,), tensor.storage_offset())
            torch.empty(1, dtype=tensor.dtype, device=device).copy_(first, non_blocking=True)


class Swaps(Launches[SwapKernel]):
    """Launches of an op whose tensors are those that are read, those that are written to, and pairs."""

    any_length: ClassVar[Mapping[str, int]] = {"pairs": 0}

    def __init__(self) -> None:
        super().__init__(k_scale=None)

    def tensors(self, call: SwapCall) -> list[Tensor]:
        return [*call.read, *call.written, call.pairs]

    def pointers(self, described: Swap, call: SwapCall) -> list[Any]:
        arguments = plan_swap.arguments(described, call.read, call.written, call.pairs, n=0)
        return arguments[: len(plan_swap.POINTERS)]

    def prepare(self, call: SwapCall, described: Swap, target: Target, load: Load) -> Launch[SwapKernel]:
        aligned = tuple(
            address_of(old) % 16 == 0 == address_of(new) % 16 for old, new in zip(call.read, call.written, strict=True)
        )
        plan, values = plan_swap.plan_swap(described, target, aligned), self.pointers(described, call)
        names = plan_swap.POINTERS
        kernel = load(plan.kernel, pointees(names, values), aligned_pointers(names, values))
        count = len(call.written)
        return Launch(
            SwapKernel(described, plan, kernel, call.device),
            call.device,
            num_layers=None,
            aligned=2 * count + 1,
            any_length=(2 * count,),
            written=range(count, 2 * count),
            apart=Apart(call.pairs_apart()),
        )
