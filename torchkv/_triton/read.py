"""Launch the kernels that read a cache on CUDA and ROCm tensors, and interpret them on CPU tensors.

Contract, plan and compilation run once for tensors that agree in all but their addresses.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.cache import check_cache_address
from kvcore.contract.read import Attention, Gather
from kvcore.plan import attention as plan_attention
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import INTERPRETER
from torchkv._arguments import dtype_name
from torchkv._call import ATTENTION_RESULTS, GATHER_RESULTS, AttentionCall, GatherCall, Results, layer_of
from torchkv._memory import check_results_apart
from torchkv._triton.launch import (
    MOST_LAUNCHES,
    Kernel,
    aligned_pointers,
    interpret,
    load,
    pointees,
    signature,
    start,
    target,
)

_Start = Callable[[tuple[int, int, int], Sequence[Any]], None]
"""Starts a kernel: given its grid and its arguments."""


class _AttentionKernels(NamedTuple):
    """The kernels of `paged_attention`, ready to be started."""

    described: Attention
    plan: plan_attention.AttentionPlan
    attend: _Start
    merge: _Start | None


class _GatherKernel(NamedTuple):
    """The kernel of `gather_kv`, ready to be started."""

    described: Gather
    plan: plan_gather.GatherPlan
    gather: _Start


@dataclass(slots=True)
class _Launch[Kernels: (_AttentionKernels, _GatherKernel)]:
    """What calls have in common whose tensors differ in their addresses only.

    Attributes:
        kernels: What is launched.
        apart: Addresses of results and inputs that were seen to share no memory.
    """

    kernels: Kernels
    apart: set[tuple[int, ...]] = field(default_factory=set)


_launches: dict[tuple[Any, ...], Any] = {}


def _launch_for(key: tuple[Any, ...], layer: int | None, prepare: Callable[[], Any]) -> Any:
    """The launch for a key. A static layer is no part of the key; it is checked here that the cache has it."""
    launch = _launches.get(key)
    if launch is None or not (layer is None or 0 <= layer < launch.kernels.described.cache.extents.num_layers):
        launch = _Launch(prepare())  # raises where the contract does
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    return launch


def _check_apart(
    apart: set[tuple[int, ...]], names: Sequence[str], results: Results, inputs: dict[str, Tensor | None]
) -> None:
    """Checks that results share no memory with one another or with inputs, unless `apart` has their addresses."""
    addresses = tuple(0 if t is None else t.data_ptr() for t in (*results, *inputs.values()))
    if addresses not in apart:
        check_results_apart(names, results, inputs)
        if len(apart) >= MOST_LAUNCHES:
            apart.clear()
        apart.add(addresses)


# ---- attention


def attention(call: AttentionCall) -> Results:
    """Launches `paged_attention` on the current stream of the caches' device.

    Returns:
        Result and log-sum-exp: new tensors, or those that the call brings for them.
    """
    tensors = (
        call.query, *call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks, call.k_scale,
        call.v_scale, call.layer_index,
    )  # fmt: skip
    key = (
        "attention", *signature(tensors), call.results and signature(call.results), call.scale, call.causal,
        call.sliding_window, call.soft_cap, call.kv_cache_dtype, call.layout, call.layer is None, call.head_size_v,
        call.scale_layout,
    )  # fmt: skip
    launch = _launch_for(key, call.layer, lambda: _prepare_attention(call))
    if call.results is not None:
        _check_apart(launch.apart, ATTENTION_RESULTS, call.results, call.inputs)
    with _current(call.query.device):
        return _run_attention(launch.kernels, call)


def interpret_attention(described: Attention, call: AttentionCall) -> Results:
    """Runs the kernels in Triton's interpreter, on the tensors' own memory."""
    plan = plan_attention.plan_attention(described, INTERPRETER, call.layer_index is not None)
    kernels = _AttentionKernels(described, plan, partial(interpret, plan.attend), partial(interpret, plan.merge))
    return _run_attention(kernels, call)


def _attention_arguments(described: Attention, call: AttentionCall) -> list[Any]:
    """All arguments of the kernel except its results."""
    return plan_attention.arguments(
        described, call.query, call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks,
        call.k_scale, call.v_scale, layer_of(call),
    )  # fmt: skip


def _prepare_attention(call: AttentionCall) -> _AttentionKernels:
    described = call.check()
    check_cache_address(described.cache.format, call.caches[0].data_ptr())
    with torch.cuda.device(call.query.device):
        even = all(c.data_ptr() % 2 == 0 for c in call.caches)
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
            merge = partial(_start, load(plan.merge, merged, (aligned & {"sinks_ptr"}) | {*parts} | aligned_results))
            results["out_ptr"], aligned_results = "float32", frozenset(results)  # partial results, in new tensors
        attend = partial(_start, load(plan.attend, inputs | results, aligned | aligned_results))
    return _AttentionKernels(described, plan, attend, merge)


def _run_attention(kernels: _AttentionKernels, call: AttentionCall) -> Results:
    shape, plan, query = kernels.described.out_shape, kernels.plan, call.query
    out, lse = call.results or (query.new_empty(shape), query.new_empty(shape[:2], dtype=torch.float32))
    if 0 in shape[:2]:
        return out, lse
    arguments = _attention_arguments(kernels.described, call)
    if plan.splits == 1:
        kernels.attend(plan.grid, [*arguments, out, lse])
        return out, lse
    assert kernels.merge is not None
    parts = query.new_empty((*shape[:2], plan.splits, shape[2]), dtype=torch.float32)
    part_lse = query.new_empty((*shape[:2], plan.splits), dtype=torch.float32)
    kernels.attend(plan.grid, [*arguments, parts, part_lse])
    merged = plan_attention.merge_arguments(parts, part_lse, call.sinks, plan.splits)
    kernels.merge(plan.merge_grid, [*merged, out, lse])
    return out, lse


# ---- gather


def gather(call: GatherCall) -> Results:
    """Launches `gather_kv` on the current stream of the caches' device.

    Returns:
        Key and value: new tensors, or those that the call brings for them.
    """
    tensors = (*call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, call.layer_index)
    key = (
        "gather", *signature(tensors), call.results and signature(call.results), call.max_len, call.dtype,
        call.kv_cache_dtype, call.layout, call.layer is None, call.head_size, call.head_size_v, call.scale_layout,
    )  # fmt: skip
    launch = _launch_for(key, call.layer, lambda: _prepare_gather(call))
    if call.results is not None:
        _check_apart(launch.apart, GATHER_RESULTS, call.results, call.inputs)
    with _current(call.caches[0].device):
        return _run_gather(launch.kernels, call)


def interpret_gather(described: Gather, call: GatherCall) -> Results:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_gather.plan_gather(described, INTERPRETER, call.layer_index is not None)
    return _run_gather(_GatherKernel(described, plan, partial(interpret, plan.kernel)), call)


def _gather_arguments(described: Gather, call: GatherCall) -> list[Any]:
    """All arguments of the kernel except its results."""
    return plan_gather.arguments(
        described, call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, layer_of(call)
    )


def _prepare_gather(call: GatherCall) -> _GatherKernel:
    described = call.check()
    check_cache_address(described.cache.format, call.caches[0].data_ptr())
    with torch.cuda.device(call.caches[0].device):
        plan = plan_gather.plan_gather(described, target(), call.layer_index is not None)
        arguments = _gather_arguments(described, call)
        results = dict.fromkeys(("key_ptr", "value_ptr"), described.format.name)
        aligned = aligned_pointers(plan_gather.POINTERS, arguments)
        # New tensors are multiples of 16.
        aligned |= frozenset(results) if call.results is None else aligned_pointers([*results], call.results)
        kernel = load(plan.kernel, pointees(plan_gather.POINTERS, arguments) | results, aligned)
    return _GatherKernel(described, plan, partial(_start, kernel))


def _run_gather(kernel: _GatherKernel, call: GatherCall) -> Results:
    described, plan = kernel.described, kernel.plan
    dtype = getattr(torch, described.format.name)
    key, value = call.results or (call.caches[0].new_empty(shape, dtype=dtype) for shape in described.shapes)
    if 0 not in plan.grid:
        kernel.gather(plan.grid, [*_gather_arguments(described, call), key, value])
    return key, value


# ---- both


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device current. A guard costs more than the question whether it is needed."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _start(kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    start(kernel, grid, torch.cuda.current_device(), addresses)
