"""The kernel of `gather_kv`: how it is prepared and run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvcore.contract.read import Gather
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import Target
from torchkv._call import GatherCall, Results, layer_of
from torchkv._triton.launch import Empty, Load, Runner, aligned_pointers, empty, pointees
from torchkv._triton.launches import Launch
from torchkv._triton.read import Reads


class GatherKernel(NamedTuple):
    """The kernel of `gather_kv`, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        gather: The kernel.
        given: Whether the call's first tensors are for the results.
        key: The first result.
        value: The second one.
    """

    described: Gather
    plan: plan_gather.GatherPlan
    gather: Any
    given: bool
    key: Empty
    value: Empty

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Results:
        """Starts the kernel, unless the results are empty."""
        key, value = tensors[:2] if self.given else (runner.empty(*self.key), runner.empty(*self.value))
        if 0 not in self.plan.grid:
            runner.start(self.gather, self.plan.grid, (*pointers, runner.address(key), runner.address(value)))
        return key, value


class Gathers(Reads[GatherKernel]):
    """Launches of `gather_kv`, or of `gather_kv_out`."""

    fields = GatherCall._fields[:-1]

    def pointers(self, described: Gather, call: GatherCall) -> list[Any]:
        return plan_gather.arguments(
            described, call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, layer_of(call)
        )

    def prepare(self, call: GatherCall, described: Gather, target: Target, load: Load) -> Launch[GatherKernel]:
        plan = plan_gather.plan_gather(described, target, call.layer_index is not None)
        arguments = self.pointers(described, call)
        results = dict.fromkeys(("key_ptr", "value_ptr"), described.format.name)
        aligned = aligned_pointers(plan_gather.POINTERS, arguments) - {"layer"}  # one of many in an array
        # New tensors are multiples of 16.
        aligned |= frozenset(results) if call.results is None else aligned_pointers([*results], call.results)
        kernel = load(plan.kernel, pointees(plan_gather.POINTERS, arguments) | results, aligned)
        key, value = (empty(shape, described.format.name) for shape in described.shapes)
        return self.launch_of(GatherKernel(described, plan, kernel, call.results is not None, key, value), call)
