"""Launch the kernels that read a cache on CUDA and ROCm tensors, and interpret them on CPU tensors.

Contract, plan and compilation run once for tensors that agree in all but their addresses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kvcore.contract.cache import check_cache_address
from kvcore.contract.read import Attention, Gather
from kvcore.plan import attention as plan_attention
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import INTERPRETER
from torchkv._arguments import dtype_name
from torchkv._call import ATTENTION_RESULTS, GATHER_RESULTS, AttentionCall, GatherCall, Results, layer_of
from torchkv._memory import check_results_apart
from torchkv._triton.known import KnownCalls, distinct, picker
from torchkv._triton.launch import (
    INTERPRETED,
    MOST_LAUNCHES,
    ON_GPU,
    Empty,
    Runner,
    aligned_pointers,
    empty,
    load,
    on,
    pointees,
    signature,
    target,
)

Call = AttentionCall | GatherCall


@dataclass(slots=True)
class _Launch[Kernels]:
    """What calls have in common whose tensors differ in their addresses only.

    Attributes:
        kernels: What is launched.
        device: Where.
        num_layers: Layers of the cache, where it has an axis of them.
        apart: Addresses of results and inputs that were seen to share no memory.
    """

    kernels: Kernels
    device: torch.device
    num_layers: int | None
    apart: set[tuple[int, ...]] = field(default_factory=set)


class _Op[Kernels](NamedTuple):
    """What attention and gather differ in.

    Attributes:
        call: What its calls are.
        key: All of a call that its kernels depend on, except a static layer.
        prepare: Checks a call and compiles its kernels.
        arguments: What the first kernel is launched with, except the results.
        run: Runs the kernels, given that, and tensors for the results or None.
        results: What errors call the results.
    """

    call: type[AttentionCall] | type[GatherCall]
    key: Callable[[Any], tuple[Any, ...]]
    prepare: Callable[[Any], Kernels]
    arguments: Callable[[Any, Any], list[Any]]
    run: Callable[[Runner, Kernels, Sequence[Any], Results | None], Results]
    results: tuple[str, str]


_launches: dict[tuple[Any, ...], Any] = {}


def _launch(op: _Op[Any], call: Call) -> tuple[_Launch[Any], Results]:
    """Launches a call on the current stream of its device."""
    key = op.key(call)
    launch = _launches.get(key)
    if launch is None or not (call.layer is None or 0 <= call.layer < launch.num_layers):
        kernels = op.prepare(call)  # raises where the contract does
        launch = _Launch(kernels, call.device, kernels.described.cache.extents.num_layers)
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    if call.results is not None:
        _check_apart(launch.apart, op.results, call.results, call.inputs)
    arguments = op.arguments(launch.kernels.described, call)
    pointers = [ON_GPU.address(a) if isinstance(a, Tensor) else a for a in arguments]
    return launch, _run(op, launch, pointers, call.results)


def _check_apart(
    apart: set[tuple[int, ...]], names: Sequence[str], results: Results, inputs: dict[str, Tensor | None]
) -> None:
    """Checks that results share no memory with one another or with inputs, unless `apart` has their addresses."""
    addresses = tuple(t.data_ptr() for t in (*results, *inputs.values()) if t is not None)
    if addresses not in apart:
        check_results_apart(names, results, inputs)
        if len(apart) >= MOST_LAUNCHES:
            apart.clear()
        apart.add(addresses)


def _run(op: _Op[Any], launch: _Launch[Any], arguments: Sequence[Any], results: Results | None) -> Results:
    """Runs kernels on their device."""
    with on(launch.device):
        return op.run(ON_GPU, launch.kernels, arguments, results)


class _Known(NamedTuple):
    """What is done again for calls that are alike: what is launched, and what makes its arguments of addresses."""

    launch: _Launch[Any]
    arguments: Callable[[Sequence[int]], tuple[Any, ...]]


class _Reads:
    """Launches of an op whose arguments begin with tensors for the results or none, query or not, and a list of caches.

    Args:
        op: Attention or gather.
        results: Whether there are tensors for the results.
        caches: Which of the arguments is the list of caches. The next one is block_tables.
    """

    def __init__(self, op: _Op[Any], results: bool, caches: int) -> None:
        self._op, self._results, self._caches = op, results, caches
        names = op.call._fields
        self._scale = caches + names.index("k_scale") - names.index("caches")  # then comes v_scale
        self._has_query = "query" in names
        self._known: KnownCalls[_Known] = KnownCalls()

    def first(self, call: Call, arguments: Sequence[Any]) -> Results:
        """Launches a call, and remembers it by the op's arguments."""
        launch, results = _launch(self._op, call)

        def known(tensors: Sequence[Tensor]) -> _Known:
            return _Known(launch, picker(self._op.arguments(launch.kernels.described, call), tensors))

        flat, by_shape = self._flat(arguments)
        self._known.add(flat, known, by_shape)
        return results

    def again(self, arguments: Sequence[Any]) -> Results | None:
        """Launches a call like an earlier one; None where there was none, or where this one must be checked itself."""
        if forward_ad._current_level >= 0:  # tangents are asked for
            return None
        flat, by_shape = self._flat(arguments)
        found = self._known.find(flat, *by_shape)
        if found is None:
            return None
        (launch, make), _, addresses = found
        if not self._results:
            return _run(self._op, launch, make(addresses), None)
        if tuple(addresses) not in launch.apart:
            return None
        return _run(self._op, launch, make(addresses), (arguments[0], arguments[1]))

    def _flat(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Arguments as `KnownCalls` wants them, and which of the tensors have other shapes from call to call."""
        i, caches = self._caches, arguments[self._caches]
        arguments, tables = distinct(arguments, self._scale), i + len(caches)
        by_shape = (i - 1, tables) if self._has_query else (tables,)
        return (*arguments[:i], *caches, *arguments[i + 1 :]), by_shape


# ---- attention


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


_SINKS = plan_attention.POINTERS.index("sinks_ptr")


def attention(call: AttentionCall) -> Results:
    """Launches `paged_attention` on the current stream of the caches' device.

    Returns:
        Result and log-sum-exp: new tensors, or those that the call brings for them.
    """
    return _launch(_ATTENTION, call)[1]


def attention_launches() -> _Reads:
    """What launches the op `paged_attention`."""
    return _Reads(_ATTENTION, results=False, caches=1)


def attention_out_launches() -> _Reads:
    """What launches the op `paged_attention_out`."""
    return _Reads(_ATTENTION, results=True, caches=3)


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


_ATTENTION = _Op(
    AttentionCall, _attention_key, _prepare_attention, _attention_arguments, _run_attention, ATTENTION_RESULTS
)


# ---- gather


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


def gather(call: GatherCall) -> Results:
    """Launches `gather_kv` on the current stream of the caches' device.

    Returns:
        Key and value: new tensors, or those that the call brings for them.
    """
    return _launch(_GATHER, call)[1]


def gather_launches() -> _Reads:
    """What launches the op `gather_kv`."""
    return _Reads(_GATHER, results=False, caches=0)


def gather_out_launches() -> _Reads:
    """What launches the op `gather_kv_out`."""
    return _Reads(_GATHER, results=True, caches=2)


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
    check_cache_address(described.cache.format, call.caches[0].data_ptr())
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


_GATHER = _Op(GatherCall, _gather_key, _prepare_gather, _gather_arguments, _run_gather, GATHER_RESULTS)
