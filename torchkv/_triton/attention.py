"""Launch the kernels of `paged_attention` on CUDA and ROCm tensors, and interpret them on CPU tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvcore.contract.cache import check_cache_address
from kvcore.contract.read import Attention
from kvcore.plan import attention as plan_attention
from kvcore.plan.kernel import INTERPRETER
from torchkv._arguments import dtype_name
from torchkv._call import ATTENTION_RESULTS, AttentionCall, Results, layer_of
from torchkv._memory import address_of
from torchkv._triton.launch import (
    INTERPRETED,
    Empty,
    Runner,
    aligned_pointers,
    empty,
    load,
    pointees,
    signature,
    target,
)
from torchkv._triton.read import ReadOp, Reads, launch_read


class _AttentionKernels(NamedTuple):
    """The kernels of `paged_attention`, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How they are launched.
        attend: The first kernel.
        merge: The second one, or None where positions are not split.
        out: The result.
        lse: Its log-sum-exp.
        parts: Results of the parts.
        part_lse: Their log-sum-exps.
    """

    described: Attention
    plan: plan_attention.AttentionPlan
    attend: Any
    merge: Any
    out: Empty
    lse: Empty
    parts: Empty
    part_lse: Empty

    @property
    def loaded(self) -> list[Any]:
        """The kernels alone."""
        return [self.attend] if self.merge is None else [self.attend, self.merge]


_SINKS = plan_attention.POINTERS.index("sinks_ptr")


def attention(call: AttentionCall) -> Results:
    """Launches `paged_attention` on the current stream of the caches' device.

    Returns:
        Result and log-sum-exp: new tensors, or those that the call brings for them.
    """
    return launch_read(_ATTENTION, call)[1]


def launches(results: bool) -> Reads:
    """What launches the op `paged_attention`, or, with tensors for the results, `paged_attention_out`."""
    return Reads(_ATTENTION, results, caches=3 if results else 1)


def interpret_attention(described: Attention, call: AttentionCall) -> Results:
    """Runs the kernels in Triton's interpreter, on the tensors' own memory."""
    plan = plan_attention.plan_attention(described, INTERPRETER, call.layer_index is not None)
    kernels = _attention_kernels(described, plan, plan.attend, plan.merge)
    return _run_attention(INTERPRETED, kernels, _attention_arguments(described, call), call.results)


def _attention_key(call: AttentionCall) -> tuple[Any, ...]:
    tensors = (
        call.query, *call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks, call.k_scale,
        call.v_scale, call.layer_index,
    )  # fmt: skip
    return (
        "attention", *signature(tensors), call.results and signature(call.results), call.scale, call.causal,
        call.sliding_window, call.soft_cap, call.kv_cache_dtype, call.layout, call.layer is None, call.head_size_v,
        call.scale_layout,
    )  # fmt: skip


def _attention_arguments(described: Attention, call: AttentionCall) -> list[Any]:
    """All arguments of the kernel except its results."""
    return plan_attention.arguments(
        described, call.query, call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks,
        call.k_scale, call.v_scale, layer_of(call),
    )  # fmt: skip


def _attention_kernels(
    described: Attention, plan: plan_attention.AttentionPlan, attend: Any, merge: Any
) -> _AttentionKernels:
    rows, size = described.out_shape[:2], described.out_shape[2]
    return _AttentionKernels(
        described,
        plan,
        attend,
        merge,
        out=empty((*rows, size), described.query.dtype),
        lse=empty(rows, "float32"),
        parts=empty((*rows, plan.splits, size), "float32"),
        part_lse=empty((*rows, plan.splits), "float32"),
    )


def _prepare_attention(call: AttentionCall) -> _AttentionKernels:
    described = call.check()
    check_cache_address(described.cache.format, address_of(call.caches[0]))
    with torch.cuda.device(call.query.device):
        even = all(address_of(c) % 2 == 0 for c in call.caches)
        plan = plan_attention.plan_attention(described, target(), call.layer_index is not None, even)
        arguments = _attention_arguments(described, call)
        inputs = pointees(plan_attention.POINTERS, arguments)
        aligned = aligned_pointers(plan_attention.POINTERS, arguments)
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
    return _attention_kernels(described, plan, attend, merge)


def _run_attention(
    runner: Runner, kernels: _AttentionKernels, arguments: Sequence[Any], results: Results | None
) -> Results:
    plan, address = kernels.plan, runner.address
    out, lse = results or (runner.empty(*kernels.out), runner.empty(*kernels.lse))
    if 0 in kernels.lse[0]:
        return out, lse
    if plan.splits == 1:
        runner.start(kernels.attend, plan.grid, (*arguments, address(out), address(lse)))
        return out, lse
    parts, part_lse = runner.empty(*kernels.parts), runner.empty(*kernels.part_lse)
    pointers = address(parts), address(part_lse)
    runner.start(kernels.attend, plan.grid, (*arguments, *pointers))
    merged = plan_attention.merge_arguments(*pointers, arguments[_SINKS], plan.splits)
    runner.start(kernels.merge, plan.merge_grid, (*merged, address(out), address(lse)))
    return out, lse


_ATTENTION = ReadOp(
    AttentionCall, _attention_key, _prepare_attention, _attention_arguments, _run_attention, ATTENTION_RESULTS
)
