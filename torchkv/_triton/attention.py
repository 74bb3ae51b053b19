"""The kernels of `paged_attention`: how they are prepared and run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvcore.contract.read import Attention
from kvcore.plan import attention as plan_attention
from kvcore.plan.kernel import Target
from kvcore.run.gluon import launches_gluon
from torchkv._arguments import dtype_name
from torchkv._call import AttentionCall, Results, layer_of
from torchkv._memory import address_of
from torchkv._triton.launch import Empty, Load, Runner, aligned_pointers, empty, pointees
from torchkv._triton.launches import Launch
from torchkv._triton.read import Reads


class AttentionKernels(NamedTuple):
    """The kernels of `paged_attention`, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How they are launched.
        attend: The first kernel.
        merge: The second one, or None where positions are not split.
        given: Whether the call's first tensors are for the results.
        out: The result.
        lse: Its log-sum-exp.
        parts: Results of the parts.
        part_lse: Their log-sum-exps.
    """

    described: Attention
    plan: plan_attention.AttentionPlan
    attend: Any
    merge: Any
    given: bool
    out: Empty
    lse: Empty
    parts: Empty
    part_lse: Empty

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Results:
        """Starts the kernels, unless the results are empty."""
        plan, address = self.plan, runner.address
        out, lse = tensors[:2] if self.given else (runner.empty(*self.out), runner.empty(*self.lse))
        if 0 in self.lse[0]:
            return out, lse
        if plan.splits == 1:
            runner.start(self.attend, plan.grid, (*pointers, address(out), address(lse)))
            return out, lse
        parts, part_lse = runner.empty(*self.parts), runner.empty(*self.part_lse)
        partial = address(parts), address(part_lse)
        runner.start(self.attend, plan.grid, (*pointers, *partial))
        merged = plan_attention.merge_arguments(*partial, pointers[_SINKS], plan.splits)
        runner.start(self.merge, plan.merge_grid, (*merged, address(out), address(lse)))
        return out, lse


_SINKS = plan_attention.POINTERS.index("sinks_ptr")


class Attentions(Reads[AttentionKernels]):
    """Launches of `paged_attention`, or of `paged_attention_out`."""

    fields = AttentionCall._fields[:-1]

    def pointers(self, described: Attention, call: AttentionCall) -> list[Any]:
        return plan_attention.arguments(
            described, call.query, call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks,
            call.k_scale, call.v_scale, layer_of(call),
        )  # fmt: skip

    def prepare(
        self, call: AttentionCall, described: Attention, target: Target, load: Load
    ) -> Launch[AttentionKernels]:
        even = all(address_of(c) % 2 == 0 for c in call.caches)
        descriptors = launches_gluon(target) and all(address_of(c) % 16 == 0 for c in call.caches)
        plan = plan_attention.plan_attention(described, target, call.layer_index is not None, even, descriptors)
        arguments = self.pointers(described, call)
        inputs = pointees(plan_attention.POINTERS, arguments)
        aligned = aligned_pointers(plan_attention.POINTERS, arguments) - {"layer"}  # one of many in an array
        results: dict[str, str | None] = {"out_ptr": dtype_name(call.query), "lse_ptr": "float32"}
        # New tensors are multiples of 16.
        aligned_results = frozenset(results) if call.results is None else aligned_pointers([*results], call.results)
        merge = None
        if plan.splits > 1:
            parts: dict[str, str | None] = {"part_ptr": "float32", "part_lse_ptr": "float32"}
            merged = parts | {"sinks_ptr": inputs["sinks_ptr"]} | results
            merge = load(plan.merge, merged, (aligned & {"sinks_ptr"}) | {*parts} | aligned_results)
            results["out_ptr"], aligned_results = "float32", frozenset(results)  # partial results, in new tensors
        attend = load(plan.attend, inputs | results, aligned | aligned_results)
        rows, size = described.out_shape[:2], described.out_shape[2]
        kernels = AttentionKernels(
            described,
            plan,
            attend,
            merge,
            given=call.results is not None,
            out=empty((*rows, size), described.query.dtype),
            lse=empty(rows, "float32"),
            parts=empty((*rows, plan.splits, size), "float32"),
            part_lse=empty((*rows, plan.splits), "float32"),
        )
        return self.launch_of(kernels, call)
