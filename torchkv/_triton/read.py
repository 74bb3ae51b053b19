"""Launch the kernels that read a cache on CUDA and ROCm tensors, and interpret them on CPU tensors.

Contract, plan and compilation run once for tensors that agree in all but their addresses.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.read import Attention, Gather
from kvcore.plan import attention as plan_attention
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import INTERPRETER
from torchkv._arguments import dtype_name
from torchkv._memory import check_address, check_results_apart
from torchkv._read_call import (
    ATTENTION_RESULTS,
    GATHER_RESULTS,
    AttentionCall,
    GatherCall,
    Results,
    attention_inputs,
    check_attention_results,
    check_gather_results,
    describe_attention,
    describe_gather,
    gather_inputs,
)
from torchkv._triton.launch import Kernel, interpret, load, signature, start, target

_Start = Callable[[tuple[int, int, int], Sequence[Any]], None]
"""Starts a kernel: given its grid and its arguments."""


class _AttentionLaunch(NamedTuple):
    call: Attention
    plan: plan_attention.AttentionPlan
    attend: _Start
    merge: _Start | None
    apart: set[tuple[int, ...]]  # addresses of results and inputs that were seen to share nothing


class _GatherLaunch(NamedTuple):
    call: Gather
    plan: plan_gather.GatherPlan
    gather: _Start
    apart: set[tuple[int, ...]]


_MOST_LAUNCHES = 4096
_launches: dict[tuple[Any, ...], Any] = {}


def _find(wanted: tuple[Any, ...], layer: int | None, prepare: Callable[[], Any]) -> Any:
    """The launch for such tensors and options. A number for the layer is not among them: its range is."""
    found = _launches.get(wanted)
    if found is None or not (layer is None or 0 <= layer < found.call.cache.extents.num_layers):
        found = prepare()  # raises where the contract does
        if len(_launches) >= _MOST_LAUNCHES:  # shapes that never come back
            _launches.clear()
        _launches[wanted] = found
    return found


def _check_apart(
    apart: set[tuple[int, ...]], names: Sequence[str], given: Results, inputs: dict[str, Tensor | None]
) -> None:
    """Checks that results share no memory, but for addresses that were seen before."""
    addresses = tuple(0 if t is None else t.data_ptr() for t in (*given, *inputs.values()))
    if addresses not in apart:
        check_results_apart(names, given, inputs)
        if len(apart) >= _MOST_LAUNCHES:
            apart.clear()
        apart.add(addresses)


# ---- attention


def attention(call: AttentionCall, given: Results | None = None) -> Results:
    """Launches `paged_attention` on the current stream of the caches' device; result and log-sum-exp.

    They are new tensors, or those given for them.
    """
    tensors = (
        call.query, *call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks, call.k_scale,
        call.v_scale, call.layer_index,
    )  # fmt: skip
    wanted = (
        "attention", *signature(tensors), given and signature(given), call.scale, call.causal,
        call.sliding_window, call.soft_cap, call.kv_cache_dtype, call.layout, call.layer is None, call.head_size_v,
        call.scale_layout,
    )  # fmt: skip
    found = _find(wanted, call.layer, lambda: _prepare_attention(call, given))
    if given is not None:
        _check_apart(found.apart, ATTENTION_RESULTS, given, attention_inputs(call))
    with _current(call.query.device):
        return _run_attention(found, call, given)


def interpret_attention(described: Attention, call: AttentionCall, given: Results | None = None) -> Results:
    """Runs the kernels in Triton's interpreter, on the tensors' own memory."""
    plan = plan_attention.plan_attention(described, INTERPRETER, call.layer_index is not None)
    kernels = (partial(interpret, kernel) for kernel in (plan.attend, plan.merge))
    found = _AttentionLaunch(described, plan, *kernels, apart=set())
    return _run_attention(found, call, given)


def _attention_arguments(described: Attention, call: AttentionCall) -> list[Any]:
    """What the kernel is launched with, but for its results."""
    return plan_attention.arguments(
        described, call.query, call.caches, call.block_tables, call.seq_lens, call.query_start_loc, call.sinks,
        call.k_scale, call.v_scale, call.layer if call.layer_index is None else call.layer_index,
    )  # fmt: skip


def _prepare_attention(call: AttentionCall, given: Results | None) -> _AttentionLaunch:
    described = describe_attention(call)
    if given is not None:
        check_attention_results(described, given)
    check_address(call.caches[0], described.cache.format)
    with torch.cuda.device(call.query.device):
        even = all(c.data_ptr() % 2 == 0 for c in call.caches)
        plan = plan_attention.plan_attention(described, target(), call.layer_index is not None, even)
        arguments = _attention_arguments(described, call)
        pointees = _pointees(plan_attention.POINTERS, arguments)
        aligned = _aligned(plan_attention.POINTERS, arguments)
        result: dict[str, str | None] = {"out_ptr": dtype_name(call.query), "lse_ptr": "float32"}
        parts: dict[str, str | None] = {"part_ptr": "float32", "part_lse_ptr": "float32"}
        aligned_result = frozenset(result) if given is None else _aligned(tuple(result), given)
        merge = None
        if plan.splits > 1:
            merged = {**parts, "sinks_ptr": pointees["sinks_ptr"], **result}
            merge = partial(_start, load(plan.merge, merged, (aligned & {"sinks_ptr"}) | {*parts} | aligned_result))
            result["out_ptr"], aligned_result = "float32", frozenset(result)  # the parts, which are new
        attend = partial(_start, load(plan.attend, pointees | result, aligned | aligned_result))
    return _AttentionLaunch(described, plan, attend, merge, set())


def _run_attention(found: _AttentionLaunch, call: AttentionCall, given: Results | None) -> Results:
    shape, plan, query = found.call.out_shape, found.plan, call.query
    out, lse = given or (query.new_empty(shape), query.new_empty(shape[:2], dtype=torch.float32))
    if 0 in shape[:2]:
        return out, lse
    arguments = _attention_arguments(found.call, call)
    if plan.splits == 1:
        found.attend(plan.grid, [*arguments, out, lse])
        return out, lse
    assert found.merge is not None
    parts = query.new_empty((*shape[:2], plan.splits, shape[2]), dtype=torch.float32)
    part_lse = query.new_empty((*shape[:2], plan.splits), dtype=torch.float32)
    found.attend(plan.grid, [*arguments, parts, part_lse])
    merged = plan_attention.merge_arguments(parts, part_lse, call.sinks, plan.splits)
    found.merge(plan.merge_grid, [*merged, out, lse])
    return out, lse


# ---- gather


def gather(call: GatherCall, given: Results | None = None) -> Results:
    """Launches `gather_kv` on the current stream of the caches' device; into new tensors, or those given."""
    tensors = (*call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, call.layer_index)
    wanted = (
        "gather", *signature(tensors), given and signature(given), call.max_len, call.dtype,
        call.kv_cache_dtype, call.layout, call.layer is None, call.head_size, call.head_size_v, call.scale_layout,
    )  # fmt: skip
    found = _find(wanted, call.layer, lambda: _prepare_gather(call, given))
    if given is not None:
        _check_apart(found.apart, GATHER_RESULTS, given, gather_inputs(call))
    with _current(call.caches[0].device):
        return _run_gather(found, call, given)


def interpret_gather(described: Gather, call: GatherCall, given: Results | None = None) -> Results:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_gather.plan_gather(described, INTERPRETER, call.layer_index is not None)
    found = _GatherLaunch(described, plan, partial(interpret, plan.kernel), set())
    return _run_gather(found, call, given)


def _gather_arguments(described: Gather, call: GatherCall) -> list[Any]:
    """What the kernel is launched with, but for its results."""
    return plan_gather.arguments(
        described, call.caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale,
        call.layer if call.layer_index is None else call.layer_index,
    )  # fmt: skip


def _prepare_gather(call: GatherCall, given: Results | None) -> _GatherLaunch:
    described = describe_gather(call)
    if given is not None:
        check_gather_results(described, given)
    check_address(call.caches[0], described.cache.format)
    with torch.cuda.device(call.caches[0].device):
        plan = plan_gather.plan_gather(described, target(), call.layer_index is not None)
        arguments = _gather_arguments(described, call)
        pointees = _pointees(plan_gather.POINTERS, arguments)
        result = dict.fromkeys(("key_ptr", "value_ptr"), described.format.name)
        aligned = _aligned(plan_gather.POINTERS, arguments)
        aligned |= frozenset(result) if given is None else _aligned(tuple(result), given)
        kernel = load(plan.kernel, pointees | result, aligned)
    return _GatherLaunch(described, plan, partial(_start, kernel), set())


def _run_gather(found: _GatherLaunch, call: GatherCall, given: Results | None) -> Results:
    dtype = getattr(torch, found.call.format.name)
    key, value = given or (call.caches[0].new_empty(shape, dtype=dtype) for shape in found.call.shapes)
    if 0 not in found.plan.grid:
        found.gather(found.plan.grid, [*_gather_arguments(found.call, call), key, value])
    return key, value


# ---- both


def _pointees(names: Sequence[str], arguments: Sequence[Any]) -> dict[str, str | None]:
    """What each pointer argument points to; "scalar" for a number in its place."""
    return {
        name: dtype_name(a) if isinstance(a, Tensor) else None if a is None else "scalar"
        for name, a in zip(names, arguments, strict=False)
    }


def _aligned(names: Sequence[str], arguments: Sequence[Any]) -> frozenset[str]:
    """Pointers that are multiples of 16."""
    named = zip(names, arguments, strict=False)
    return frozenset(name for name, a in named if isinstance(a, Tensor) and a.data_ptr() % 16 == 0)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device current. A guard costs more than the question whether it is needed."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _start(kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    start(kernel, grid, torch.cuda.current_device(), addresses)
