"""Compile and launch the kernel of `gather_kv` on CUDA and ROCm tensors, and interpret it on CPU tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.read import Gather
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import INTERPRETER
from torchkv._call import GatherCall, Results, layer_of
from torchkv._triton.launch import INTERPRETED, Empty, Runner, aligned_pointers, empty, load, pointees, target
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
        return _pointers(described, call)

    def prepare(self, call: GatherCall, described: Gather) -> Launch[GatherKernel]:
        with torch.cuda.device(call.device):
            plan = plan_gather.plan_gather(described, target(), call.layer_index is not None)
            arguments = _pointers(described, call)
            results = dict.fromkeys(("key_ptr", "value_ptr"), described.format.name)
            aligned = aligned_pointers(plan_gather.POINTERS, arguments) - {"layer"}  # one of many in an array
            # New tensors are multiples of 16.
            aligned |= frozenset(results) if call.results is None else aligned_pointers([*results], call.results)
            kernel = load(plan.kernel, pointees(plan_gather.POINTERS, arguments) | results, aligned)
        return self.launch_of(_kernel(described, call, plan, kernel), call)


def interpret_gather(described: Gather, call: GatherCall) -> Results:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_gather.plan_gather(described, INTERPRETER, call.layer_index is not None)
    kernel = _kernel(described, call, plan, plan.kernel)
    return kernel.run(INTERPRETED, _pointers(described, call), call.results or ())


def _kernel(described: Gather, call: GatherCall, plan: plan_gather.GatherPlan, kernel: Any) -> GatherKernel:
    key, value = (empty(shape, described.format.name) for shape in described.shapes)
    return GatherKernel(described, plan, kernel, call.results is not None, key, value)


def _pointers(described: Gather, call: GatherCall) -> list[Any]:
    """All arguments of the kernel except its results."""
    return plan_gather.arguments(
        described, call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, layer_of(call)
    )
