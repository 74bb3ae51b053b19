"""The Triton kernels in their interpreter, behind a host callback: slow, exact, and without a GPU."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kvcore.contract.read import Attention, Gather
from kvcore.contract.write import Write
from kvcore.plan import attention as plan_attention
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import INTERPRETER, KernelPlan
from kvcore.plan.write import arguments, plan_write

if TYPE_CHECKING:
    from jaxkv._primitive import read as _read_primitive
    from jaxkv._primitive import write as _primitive

Run = Callable[[KernelPlan, tuple[int, int, int], Sequence[Any]], None]


def write(call: Write, operands: "_primitive.Operands", layer: int | None) -> list[jax.Array]:
    """The new caches and scale caches."""
    plan = plan_write(call, INTERPRETER, layer_is_pointer=operands.layer is not None)
    count = len(call.cache.layout.arrays)

    def on_host(run: Run, x: "_primitive.Operands") -> list[np.ndarray]:
        memory = [a.copy() for a in x.memory]
        n = len(x.slot_mapping)
        inputs = arguments(
            call, x.key, x.value, memory[:count], memory[count:], x.slot_mapping, x.k_scale, x.v_scale,
            layer if x.layer is None else x.layer, n,
        )  # fmt: skip
        run(plan.kernel, plan.grid(n), inputs)
        return memory

    return _call(on_host, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands.memory], operands)


def attention(call: Attention, operands: "_read_primitive.Operands", layer: int | None) -> list[jax.Array]:
    """Result and log-sum-exp."""
    plan = plan_attention.plan_attention(call, INTERPRETER, layer_is_pointer=operands.layer is not None)
    shape = call.out_shape
    dtype = operands.query.dtype  # type: ignore[union-attr]

    def on_host(run: Run, x: "_read_primitive.Operands") -> list[np.ndarray]:
        out, lse = np.empty(shape, dtype), np.empty(shape[:2], np.float32)
        parts = np.empty((*shape[:2], plan.splits, shape[2]), np.float32)
        part_lse = np.empty((*shape[:2], plan.splits), np.float32)
        inputs = plan_attention.arguments(
            call, x.query, x.caches, x.block_tables, x.seq_lens, x.query_start_loc, x.sinks, x.k_scale, x.v_scale,
            layer if x.layer is None else x.layer,
        )  # fmt: skip
        if plan.splits == 1:
            run(plan.attend, plan.grid, [*inputs, out, lse])
        else:
            run(plan.attend, plan.grid, [*inputs, parts, part_lse])
            merged = plan_attention.merge_arguments(parts, part_lse, x.sinks, plan.splits)
            run(plan.merge, plan.merge_grid, [*merged, out, lse])
        return [out, lse]

    return _call(on_host, [jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:2], "float32")], operands)


def gather(call: Gather, operands: "_read_primitive.Operands", layer: int | None) -> list[jax.Array]:
    """Key and value."""
    plan = plan_gather.plan_gather(call, INTERPRETER, layer_is_pointer=operands.layer is not None)
    results = [jax.ShapeDtypeStruct(shape, call.format.name) for shape in call.shapes]

    def on_host(run: Run, x: "_read_primitive.Operands") -> list[np.ndarray]:
        out = [np.empty(r.shape, r.dtype) for r in results]
        inputs = plan_gather.arguments(
            call, x.caches, x.block_tables, x.seq_lens, x.k_scale, x.v_scale, layer if x.layer is None else x.layer
        )
        run(plan.kernel, plan.grid, [*inputs, *out])
        return out

    return _call(on_host, results, operands)


def _call(on_host: Callable[[Run, Any], list[np.ndarray]], results: Sequence[Any], operands: Any) -> list[jax.Array]:
    from kvcore.run import interpreter  # now: an error in a callback would be XLA's

    worker = _worker()

    def run(kernel: KernelPlan, grid: tuple[int, int, int], given: Sequence[Any]) -> None:
        pointers = [interpreter.Pointer(a.ctypes.data, a.dtype.name) if isinstance(a, np.ndarray) else a for a in given]
        worker.submit(interpreter.run, kernel, grid, pointers).result()

    def callback(x: Any) -> list[np.ndarray]:
        return on_host(run, jax.tree.map(np.ascontiguousarray, x))

    return list(jax.pure_callback(callback, results, operands))


@cache
def _worker() -> ThreadPoolExecutor:
    """A thread that computes as NumPy expects.

    XLA's threads, and those started from them, flush subnormal numbers to zero. This one starts now, while a program is
    lowered, so not from one of them.
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix="jaxkv-interpreter")
    worker.submit(lambda: None).result()
    return worker
