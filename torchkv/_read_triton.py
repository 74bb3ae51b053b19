"""Launch the kernels that read a cache on CUDA and ROCm tensors, and interpret them on CPU tensors.

Contract, plan and compilation run once for tensors that agree in all but their addresses.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore import plan_attention, plan_gather
from kvcore.plan import INTERPRETER
from kvcore.read_contract import Attention, Gather
from torchkv._call import dtype_name
from torchkv._launch import Kernel, address, load, signature, start, target
from torchkv._read import AttentionCall, GatherCall, describe_attention, describe_gather

_OPTIONS = {"enable_fp_fusion": True}  # results are rounded, not bits to be kept
_MOST_LAUNCHES = 4096


class _AttentionLaunch(NamedTuple):
    call: Attention
    plan: plan_attention.AttentionPlan
    scalars: tuple[int, ...]
    attend: Kernel | None
    merge: Kernel | None


class _GatherLaunch(NamedTuple):
    call: Gather
    plan: plan_gather.GatherPlan
    scalars: tuple[int, ...]
    kernel: Kernel | None


_attention_launches: dict[tuple[Any, ...], _AttentionLaunch] = {}
_gather_launches: dict[tuple[Any, ...], _GatherLaunch] = {}


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Launches `paged_attention` on the current stream of the caches' device; result and log-sum-exp."""
    tensors = _pointers(call)
    wanted = (
        *signature(tensors), call.scale, call.causal, call.sliding_window, call.soft_cap, call.kv_cache_dtype,
        call.layout, call.layer is None, call.head_size_v,
    )  # fmt: skip
    found = _attention_launches.get(wanted)
    if found is None or not _layer_fits(call.layer, found.call.cache.placement.extents.num_layers):
        described = describe_attention(call)
        with torch.cuda.device(call.query.device):
            found = _prepare_attention(described, call, tensors)
        _remember(_attention_launches, wanted, found)
    device = call.query.device.index
    if device == torch.cuda.current_device():
        return _run_attention(found, call, tensors, partial(_start, device))
    with torch.cuda.device(device):
        return _run_attention(found, call, tensors, partial(_start, device))


def interpret_attention(described: Attention, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs the kernels in Triton's interpreter, on the tensors' own memory."""
    plan = plan_attention.plan_attention(described, INTERPRETER, call.layer_index is not None)
    found = _AttentionLaunch(described, plan, plan_attention.scalars(described), None, None)
    names = {
        "attend": ("paged_attention_kernel", plan.constexprs),
        "merge": ("merge_attention_kernel", plan.merge_constexprs),
    }

    def run(which: str, _: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        from kvcore import interpreter

        kernel, constexprs = names[which]
        interpreter.run("attention", kernel, grid, _as_pointers(arguments), constexprs)

    return _run_attention(found, call, _pointers(call), run)


def _pointers(call: AttentionCall) -> list[Tensor | None]:
    """Tensors in the kernel's order."""
    caches = (call.caches[0], call.caches[-1])
    rest = (call.block_tables, call.seq_lens, call.query_start_loc, call.sinks, call.k_scale, call.v_scale)
    return [call.query, *caches, *rest, call.layer_index]


def _run_attention(
    found: _AttentionLaunch, call: AttentionCall, tensors: Sequence[Tensor | None], run: Any
) -> tuple[Tensor, Tensor]:
    shape, plan, query = found.call.out_shape, found.plan, call.query
    out = query.new_empty(shape)
    lse = query.new_empty(shape[:2], dtype=torch.float32)
    if 0 in shape[:2]:
        return out, lse
    inputs = [*tensors[:-1], call.layer if call.layer_index is None else call.layer_index]
    if not found.call.cache.scaled:
        inputs[7] = inputs[8] = None
    if plan.splits == 1:
        run("attend", found.attend, plan.grid, [*inputs, *found.scalars, out, lse])
        return out, lse
    parts = query.new_empty((*shape[:2], plan.splits, shape[2]), dtype=torch.float32)
    part_lse = query.new_empty((*shape[:2], plan.splits), dtype=torch.float32)
    run("attend", found.attend, plan.grid, [*inputs, *found.scalars, parts, part_lse])
    run("merge", found.merge, plan.merge_grid, [parts, part_lse, call.sinks, plan.splits, out, lse])
    return out, lse


def _prepare_attention(described: Attention, call: AttentionCall, tensors: Sequence[Tensor | None]) -> _AttentionLaunch:
    from kvcore.compiler import ATTENTION_SCALAR_TYPES
    from kvcore.kernels import attention as kernels

    even = all(c.data_ptr() % 2 == 0 for c in call.caches)
    plan = plan_attention.plan_attention(described, target(), call.layer_index is not None, even)
    pointers = _pointees(plan_attention.POINTERS, tensors, call.layer, described.cache.scaled)
    aligned = _aligned(plan_attention.POINTERS, tensors) | {"out_ptr", "lse_ptr"}
    out = {"out_ptr": "float32" if plan.splits > 1 else dtype_name(call.query), "lse_ptr": "float32"}
    options: dict[str, Any] = dict(_OPTIONS)
    if plan.max_registers is not None:
        options["maxnreg"] = plan.max_registers
    attend = load(
        kernels.paged_attention_kernel, pointers | out, ATTENTION_SCALAR_TYPES, plan.constexprs, plan.num_warps,
        aligned, options,
    )  # fmt: skip
    merge = None
    if plan.splits > 1:
        parts: dict[str, str | None] = {"part_ptr": "float32", "part_lse_ptr": "float32"}
        parts |= {"sinks_ptr": pointers["sinks_ptr"], "out_ptr": dtype_name(call.query), "lse_ptr": "float32"}
        merge = load(
            kernels.merge_attention_kernel, parts, {"splits": "i32"}, plan.merge_constexprs, plan.merge_warps,
            (aligned & {"sinks_ptr"}) | {"part_ptr", "part_lse_ptr", "out_ptr", "lse_ptr"}, _OPTIONS,
        )  # fmt: skip
    return _AttentionLaunch(described, plan, plan_attention.scalars(described), attend, merge)


def gather(call: GatherCall) -> tuple[Tensor, Tensor]:
    """Launches `gather_kv` on the current stream of the caches' device."""
    tensors = _gather_pointers(call)
    wanted = (
        *signature(tensors), call.max_len, call.dtype, call.kv_cache_dtype, call.layout, call.layer is None,
        call.head_size, call.head_size_v,
    )  # fmt: skip
    found = _gather_launches.get(wanted)
    if found is None or not _layer_fits(call.layer, found.call.cache.placement.extents.num_layers):
        described = describe_gather(call)
        with torch.cuda.device(call.caches[0].device):
            found = _prepare_gather(described, call, tensors)
        _remember(_gather_launches, wanted, found)
    device = call.caches[0].device.index
    if device == torch.cuda.current_device():
        return _run_gather(found, call, tensors, partial(_start, device, ""))
    with torch.cuda.device(device):
        return _run_gather(found, call, tensors, partial(_start, device, ""))


def interpret_gather(described: Gather, call: GatherCall) -> tuple[Tensor, Tensor]:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_gather.plan_gather(described, INTERPRETER, call.layer_index is not None)

    def run(_: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        from kvcore import interpreter

        interpreter.run("gather", "gather_kv_kernel", grid, _as_pointers(arguments), plan.constexprs)

    found = _GatherLaunch(described, plan, plan_gather.scalars(described), None)
    return _run_gather(found, call, _gather_pointers(call), run)


def _gather_pointers(call: GatherCall) -> list[Tensor | None]:
    caches = (call.caches[0], call.caches[-1])
    return [*caches, call.block_tables, call.seq_lens, call.k_scale, call.v_scale, call.layer_index]


def _run_gather(
    found: _GatherLaunch, call: GatherCall, tensors: Sequence[Tensor | None], run: Any
) -> tuple[Tensor, Tensor]:
    dtype = getattr(torch, found.call.format.name)
    key, value = (call.caches[0].new_empty(shape, dtype=dtype) for shape in found.call.shapes)
    if 0 not in found.plan.grid:
        inputs = [*tensors[:-1], call.layer if call.layer_index is None else call.layer_index]
        if not found.call.cache.scaled:
            inputs[4] = inputs[5] = None
        run(found.kernel, found.plan.grid, [*inputs, *found.scalars, key, value])
    return key, value


def _prepare_gather(described: Gather, call: GatherCall, tensors: Sequence[Tensor | None]) -> _GatherLaunch:
    from kvcore.compiler import EXACT, GATHER_SCALAR_TYPES
    from kvcore.kernels import gather as kernels

    plan = plan_gather.plan_gather(described, target(), call.layer_index is not None)
    pointers = _pointees(plan_gather.POINTERS, tensors, call.layer, described.cache.scaled)
    aligned = _aligned(plan_gather.POINTERS, tensors) | {"key_ptr", "value_ptr"}
    out = dict.fromkeys(("key_ptr", "value_ptr"), described.format.name)
    kernel = load(
        kernels.gather_kv_kernel, pointers | out, GATHER_SCALAR_TYPES, plan.constexprs, plan.num_warps, aligned, EXACT
    )
    return _GatherLaunch(described, plan, plan_gather.scalars(described), kernel)


def _pointees(
    names: Sequence[str], tensors: Sequence[Tensor | None], layer: int | None, scaled: bool
) -> dict[str, str | None]:
    """What each pointer argument points to."""
    pointees = {n: None if t is None else dtype_name(t) for n, t in zip(names, tensors, strict=True)}
    if not scaled:
        pointees["k_scale_ptr"] = pointees["v_scale_ptr"] = None
    if layer is not None:
        pointees["layer"] = "scalar"
    return pointees


def _aligned(names: Sequence[str], tensors: Sequence[Tensor | None]) -> frozenset[str]:
    """Pointers that are multiples of 16."""
    return frozenset(n for n, t in zip(names, tensors, strict=True) if t is not None and t.data_ptr() % 16 == 0)


def _layer_fits(layer: int | None, num_layers: int | None) -> bool:
    return layer is None or 0 <= layer < (num_layers or 0)


def _remember(launches: dict[Any, Any], wanted: Any, found: Any) -> None:
    if len(launches) >= _MOST_LAUNCHES:  # shapes that never come back
        launches.clear()
    launches[wanted] = found


def _start(device: int, _: str, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    start(kernel, grid, device, [address(a) if isinstance(a, Tensor) else a for a in arguments])


def _as_pointers(arguments: Sequence[Any]) -> list[Any]:
    from kvcore.interpreter import Pointer

    return [Pointer(a.data_ptr(), dtype_name(a)) if isinstance(a, Tensor) else a for a in arguments]
