"""The kernel of `relayout`: how it is prepared and run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvcore.contract.relayout import Relayout
from kvcore.plan import relayout as plan_relayout
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
        kernel: What copies.
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
    """Launches of an op whose tensors are those that are written to, those of the source, and pairs."""

    def __init__(self) -> None:
        # The guards let lengths of one tensor vary, not of one in a list: shapes say it all.
        super().__init__(k_scale=None, varies=lambda tensors: tuple([tensor.shape for tensor in tensors]))

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        return (*arguments[:_SOURCE], *arguments[_SOURCE], *arguments[_SOURCE + 1 :])

    def tensors(self, call: RelayoutCall) -> list[Tensor]:
        return [*call.written, *call.source, *(() if call.pairs is None else (call.pairs,))]

    def pointers(self, described: Relayout, call: RelayoutCall) -> list[Any]:
        arguments = plan_relayout.arguments(described, call.source, call.written, call.pairs)
        return arguments[: len(plan_relayout.POINTERS)]

    def prepare(self, call: RelayoutCall, described: Relayout, target: Target, load: Load) -> Launch[RelayoutKernel]:
        plan, values = plan_relayout.plan_relayout(described, target), self.pointers(described, call)
        names = plan_relayout.POINTERS
        kernel = load(plan.kernel, pointees(names, values), aligned_pointers(names, values))
        count = len(call.written)
        return Launch(
            RelayoutKernel(described, plan, kernel),
            call.device,
            num_layers=None,
            aligned=len(self.tensors(call)),
            any_length=(),
            written=range(count),
            apart=Apart(call.pairs_apart()),
        )
