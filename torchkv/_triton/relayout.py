"""The kernels of `relayout`: how they are prepared and run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvcore.contract.relayout import Relayout
from kvcore.plan import relayout as plan_relayout
from kvcore.plan import requantise as plan_requantise
from kvcore.plan.kernel import Target
from torchkv._relayout import RelayoutCall
from torchkv._triton.launch import Load, Runner, aligned_pointers, pointees
from torchkv._triton.launches import Apart, Launch, Launches

_SOURCE = 4
"""The place of source, a list, among the op's arguments."""


class RelayoutKernel(NamedTuple):
    """The kernel of a call, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        kernel: What copies, or reads and writes.
    """

    described: Relayout
    plan: plan_relayout.RelayoutPlan
    kernel: Any

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[()]:
        """Starts the kernel, unless there is nothing to do."""
        del tensors
        if 0 not in self.plan.grid:
            runner.start(self.kernel, self.plan.grid, (*pointers, *plan_relayout.scalars(self.described)))
        return ()


class Relayouts(Launches[RelayoutKernel]):
    """Launches of an op whose tensors are those that are written to, those of the source, pairs, and static scales."""

    def __init__(self) -> None:
        # The guards let lengths of one tensor vary, not of one in a list: shapes say it all.
        super().__init__(k_scale=None, varies=lambda tensors: tuple([tensor.shape for tensor in tensors]))

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        return (*arguments[:_SOURCE], *arguments[_SOURCE], *arguments[_SOURCE + 1 :])

    def tensors(self, call: RelayoutCall) -> list[Tensor]:
        return [t for t in (*call.written, *call.source, call.pairs, *call.static_scales) if t is not None]

    def pointers(self, described: Relayout, call: RelayoutCall) -> list[Any]:
        memory = call.source, call.written, call.pairs
        if described.requantise:
            return plan_requantise.arguments(described, *memory, call.static_scales)
        return plan_relayout.arguments(described, *memory)[: len(plan_relayout.POINTERS)]

    def prepare(self, call: RelayoutCall, described: Relayout, target: Target, load: Load) -> Launch[RelayoutKernel]:
        values = self.pointers(described, call)
        if described.requantise:
            plan, names = plan_requantise.plan_requantise(described, target), plan_requantise.POINTERS
        else:
            plan, names = plan_relayout.plan_relayout(described, target), plan_relayout.POINTERS
        # Static scales count as unaligned.
        aligned = aligned_pointers(names, values) - {*plan_requantise.STATIC_SCALES}
        kernel = load(plan.kernel, pointees(names, values), aligned)
        count, static = len(call.written), sum(scale is not None for scale in call.static_scales)
        return Launch(
            RelayoutKernel(described, plan, kernel),
            call.device,
            num_layers=None,
            aligned=len(self.tensors(call)) - static,
            any_length=(),
            written=range(count),
            apart=Apart(call.pairs_apart()),
        )
