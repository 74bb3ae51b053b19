"""The Triton kernels in their interpreter, behind a host callback: slow, exact, and without a GPU."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import numpy as np

from jaxkv._blocks import BlocksOperands, BlocksOptions
from jaxkv._call import ReadOperands, ReadOptions, WriteOperands, WriteOptions, read_results
from jaxkv._relayout import RelayoutOperands
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._slots import SlotOperands, slots_result
from jaxkv._swap import SwapOperands
from jaxkv._triton.blocks import launch_blocks
from jaxkv._triton.read import launch_read
from jaxkv._triton.relayout import launch_relayout
from jaxkv._triton.rope import launch_rope
from jaxkv._triton.slots import launch_slot_mapping
from jaxkv._triton.swap import launch_swap
from jaxkv._triton.write import launch_write
from kvcore.contract.blocks import Blocks
from kvcore.contract.read import Attention, Gather
from kvcore.contract.relayout import Relayout
from kvcore.contract.rope import Rope
from kvcore.contract.slots import SlotMapping
from kvcore.contract.swap import Swap
from kvcore.contract.write import Write
from kvcore.plan.kernel import INTERPRETER, KernelPlan, Target


def write(call: Write, options: WriteOptions, operands: WriteOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return _updated(operands, lambda host: launch_write(call, options, host, INTERPRETER, launch))


def rope_and_cache(call: Rope, options: RotatedWriteOptions, operands: RotatedWriteOperands) -> list[jax.Array]:
    """The rotated query, and the new caches and scale caches."""

    def on_host(host: RotatedWriteOperands) -> list[np.ndarray]:
        memory = [array.copy() for array in host.cache.memory]
        host = host._replace(cache=host.cache.with_memory(memory))
        return [launch_rope(call, options, host, INTERPRETER, launch), *memory]

    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in operands.updated]
    return _call_on_host(on_host, results, operands)


def move_blocks(call: Blocks, options: BlocksOptions, operands: BlocksOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return _updated(operands, lambda host: launch_blocks(call, host, INTERPRETER, launch))


def relayout(call: Relayout, operands: RelayoutOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return _updated(operands, lambda host: launch_relayout(call, host, INTERPRETER, launch))


def swap_blocks(call: Swap, operands: SwapOperands) -> list[jax.Array]:
    """The new caches and scale caches of the destination, in the memory that they are in."""
    here = jax.tree.map(lambda array: jax.device_put(array, jax.memory.Space.Device), operands)
    places = [jax.typeof(array).memory_space for array in operands.cache.memory]
    new = _updated(here, lambda host: launch_swap(call, host, INTERPRETER, launch))
    return [jax.device_put(array, place) for array, place in zip(new, places, strict=True)]


def read(call: Attention | Gather, options: ReadOptions, operands: ReadOperands) -> tuple[jax.Array, jax.Array]:
    """Result and log-sum-exp of attention, key and value of a gather."""

    def on_host(host: ReadOperands) -> tuple[np.ndarray, np.ndarray]:
        return launch_read(call, options, host, INTERPRETER, launch)

    return _call_on_host(on_host, read_results(call), operands)


def slot_mapping(call: SlotMapping, operands: SlotOperands) -> jax.Array:
    """The slot of each token."""

    def on_host(host: SlotOperands) -> np.ndarray:
        return launch_slot_mapping(call, host, INTERPRETER, launch)

    return _call_on_host(on_host, slots_result(call), operands)


def launch(
    kernel: KernelPlan, grid: tuple[int, int, int], arguments: Sequence[Any], target: Target, out_type: Any = ()
) -> Any:
    """Interprets a kernel on NumPy arrays. Those of `out_type` follow the arguments and are returned."""
    from kvcore.run import interpreter

    out = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), out_type)
    pointers = [
        interpreter.Pointer(argument.ctypes.data, argument.dtype.name) if isinstance(argument, np.ndarray) else argument
        for argument in (*arguments, *out)
    ]
    _worker().submit(interpreter.run, kernel, grid, pointers).result()
    return out


def _updated(operands: Any, start: Callable[[Any], Any]) -> list[jax.Array]:
    """Caches and scale caches after a launch that `start` makes of the operands, in which they are copies."""

    def on_host(host: Any) -> list[np.ndarray]:
        memory = [array.copy() for array in host.cache.memory]
        start(host._replace(cache=host.cache.with_memory(memory)))
        return memory

    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in operands.cache.memory]
    return _call_on_host(on_host, results, operands)


def _call_on_host(function: Callable[[Any], Any], results: Any, operands: Any) -> Any:
    """Calls a function of NumPy arrays at run time."""
    import kvcore.run.interpreter  # noqa: F401, now: an error in a callback would be XLA's

    _worker()

    def callback(operands: Any) -> Any:
        return function(jax.tree.map(np.ascontiguousarray, operands))

    return jax.pure_callback(callback, results, operands)


@cache
def _worker() -> ThreadPoolExecutor:
    """A thread that computes as NumPy expects.

    XLA's threads, and those started from them, flush subnormal numbers to zero. This one starts while a program is
    lowered, so not from one of them.
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix="jaxkv-interpreter")
    worker.submit(lambda: None).result()
    return worker
