"""Launch the kernel of `gather_kv` on CUDA and ROCm tensors, and interpret it on CPU tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvcore.contract.cache import check_cache_address
from kvcore.contract.read import Gather
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import INTERPRETER
from torchkv._call import GATHER_RESULTS, GatherCall, Results, layer_of
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


class _GatherKernel(NamedTuple):
    """The kernel of `gather_kv`, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        gather: The kernel.
        key: The first result.
        value: The second one.
    """

    described: Gather
    plan: plan_gather.GatherPlan
    gather: Any
    key: Empty
    value: Empty

    @property
    def loaded(self) -> list[Any]:
        """The kernel alone."""
        return [self.gather]


def gather(call: GatherCall) -> Results:
    """Launches `gather_kv` on the current stream of the caches' device.

    Returns:
        Key and value: new tensors, or those that the call brings for them.
    """
    return launch_read(_GATHER, call)[1]


def launches(results: bool) -> Reads:
    """What launches the op `gather_kv`, or, with tensors for the results, `gather_kv_out`."""
    return Reads(_GATHER, results, caches=2 if results else 0)


def interpret_gather(described: Gather, call: GatherCall) -> Results:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_gather.plan_gather(described, INTERPRETER, call.layer_index is not None)
    kernel = _gather_kernel(described, plan, plan.kernel)
    return _run_gather(INTERPRETED, kernel, _gather_arguments(described, call), call.results)


def _gather_key(call: GatherCall) -> tuple[Any, ...]:
    tensors = (*call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, call.layer_index)
    return (
        "gather", *signature(tensors), call.results and signature(call.results), call.max_len, call.dtype,
        call.kv_cache_dtype, call.layout, call.layer is None, call.head_size, call.head_size_v, call.scale_layout,
    )  # fmt: skip


def _gather_arguments(described: Gather, call: GatherCall) -> list[Any]:
    """All arguments of the kernel except its results."""
    return plan_gather.arguments(
        described, call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, layer_of(call)
    )


def _gather_kernel(described: Gather, plan: plan_gather.GatherPlan, kernel: Any) -> _GatherKernel:
    key, value = (empty(shape, described.format.name) for shape in described.shapes)
    return _GatherKernel(described, plan, kernel, key, value)


def _prepare_gather(call: GatherCall) -> _GatherKernel:
    described = call.check()
    check_cache_address(described.cache.format, address_of(call.caches[0]))
    with torch.cuda.device(call.caches[0].device):
        plan = plan_gather.plan_gather(described, target(), call.layer_index is not None)
        arguments = _gather_arguments(described, call)
        results = dict.fromkeys(("key_ptr", "value_ptr"), described.format.name)
        aligned = aligned_pointers(plan_gather.POINTERS, arguments)
        # New tensors are multiples of 16.
        aligned |= frozenset(results) if call.results is None else aligned_pointers([*results], call.results)
        kernel = load(plan.kernel, pointees(plan_gather.POINTERS, arguments) | results, aligned)
    return _gather_kernel(described, plan, kernel)


def _run_gather(runner: Runner, kernel: _GatherKernel, arguments: Sequence[Any], results: Results | None) -> Results:
    key, value = results or (runner.empty(*kernel.key), runner.empty(*kernel.value))
    if 0 not in kernel.plan.grid:
        runner.start(kernel.gather, kernel.plan.grid, (*arguments, runner.address(key), runner.address(value)))
    return key, value


_GATHER = ReadOp(GatherCall, _gather_key, _prepare_gather, _gather_arguments, _run_gather, GATHER_RESULTS)
