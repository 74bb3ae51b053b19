"""The Triton kernels, compiled and launched through jax_triton: the only module that imports it."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._blocks import BlocksOperands, BlocksOptions
from jaxkv._call import ReadOperands, ReadOptions, WriteOperands, WriteOptions
from jaxkv._relayout import RelayoutOperands
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._slots import SlotOperands
from jaxkv._swap import SwapOperands
from jaxkv._triton.blocks import launch_blocks
from jaxkv._triton.compat import import_jax_triton
from jaxkv._triton.read import launch_read
from jaxkv._triton.relayout import launch_relayout
from jaxkv._triton.rope import launch_rope
from jaxkv._triton.slots import launch_slot_mapping
from jaxkv._triton.swap import launch_swap
from jaxkv._triton.write import launch_write
from kvcore import installed
from kvcore.contract.blocks import Blocks
from kvcore.contract.read import Attention, Gather
from kvcore.contract.relayout import Relayout
from kvcore.contract.rope import Rope
from kvcore.contract.slots import SlotMapping
from kvcore.contract.swap import Swap
from kvcore.contract.write import Write
from kvcore.formats import FP8
from kvcore.plan.kernel import Descriptor, KernelPlan, Target
from kvcore.run.compiler import kernel_function, shared_layout

with installed.needed("jax_triton", installed.JAX_TRITON):
    jt = import_jax_triton()

# The lowest PTX version that each compute capability needs, with what the kernels use. Triton would write the
# highest that its own ptxas knows, which an older driver refuses.
_PTX_VERSIONS = {80: 78, 86: 78, 87: 78, 89: 81, 90: 80, 100: 86, 101: 86, 103: 88, 110: 90, 120: 87, 121: 88}

_PTX_VERSION_OF_TMA = 86
"""The lowest PTX version that has Triton's copies by TMA: CUDA 12.7's."""


def write(call: Write, options: WriteOptions, operands: WriteOperands, target: Target) -> list[jax.Array]:
    """The new caches and scale caches: the same buffers, updated in place."""
    return _updated(operands, lambda refs: launch_write(call, options, refs, target, launch))


def rope_and_cache(
    call: Rope, options: RotatedWriteOptions, operands: RotatedWriteOperands, target: Target
) -> list[jax.Array]:
    """The rotated query; the new caches and scale caches: the same buffers, updated in place."""
    memory = operands.cache.memory
    refs = _refs_of(memory)
    operands = operands._replace(cache=operands.cache.with_memory(refs))
    query = launch_rope(call, options, operands, target, launch)
    return [query, *_freeze(refs, memory)]


def move_blocks(call: Blocks, options: BlocksOptions, operands: BlocksOperands, target: Target) -> list[jax.Array]:
    """The new caches and scale caches: the same buffers, updated in place."""
    return _updated(operands, lambda refs: launch_blocks(call, refs, target, launch))


def relayout(call: Relayout, operands: RelayoutOperands, target: Target) -> list[jax.Array]:
    """The new caches and scale caches of the destination: the same buffers, updated in place."""
    return _updated(operands, lambda refs: launch_relayout(call, refs, target, launch))


def swap_blocks(call: Swap, operands: SwapOperands, target: Target) -> list[jax.Array]:
    """The new caches and scale caches of the destination: the same buffers, updated in place.

    XLA hands a kernel an operand in pinned memory as it is, and the GPU reaches it by the bus.
    """
    return _updated(operands, lambda refs: launch_swap(call, refs, target, launch))


def read(
    call: Attention | Gather, options: ReadOptions, operands: ReadOperands, target: Target
) -> tuple[jax.Array, jax.Array]:
    """Result and log-sum-exp of attention, key and value of a gather."""
    return launch_read(call, options, operands, target, launch)


def slot_mapping(call: SlotMapping, operands: SlotOperands, target: Target) -> jax.Array:
    """The slot of each token."""
    return launch_slot_mapping(call, operands, target, launch)


def launch(
    kernel: KernelPlan, grid: tuple[int, int, int], arguments: Sequence[Any], target: Target, out_type: Any = ()
) -> Any:
    """Calls a kernel. Arrays of `out_type` follow the arguments and are returned."""
    if 0 in grid or any(array.size == 0 for array in out_type):  # nothing to do, and no launch
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), out_type)
    compiling = dict(kernel.options)
    if target.backend == "cuda":
        version = _PTX_VERSIONS.get(int(target.arch))
        compiling["ptx_version"] = max(version or 0, _PTX_VERSION_OF_TMA) if kernel.descriptors else version
    function = kernel_function(kernel)
    described = [
        _describe(argument, kernel.descriptors[name]) if name in kernel.descriptors else _as_bytes(argument)
        for name, argument in zip(function.arg_names, arguments, strict=False)
    ]
    return jt.triton_call(
        *described,
        kernel=function,
        out_type=out_type,
        grid=grid,
        num_warps=kernel.num_warps,
        compute_capability=target.arch if target.backend == "cuda" else None,
        backend_options=compiling,
        name=kernel.name,
        **kernel.constexprs,
    )


def _updated(operands: Any, start: Callable[[Any], Any]) -> list[jax.Array]:
    """Caches and scale caches after a launch that `start` makes of the operands, in which they are Refs."""
    memory = operands.cache.memory
    refs = _refs_of(memory)
    start(operands._replace(cache=operands.cache.with_memory(refs)))
    return _freeze(refs, memory)


def _refs_of(memory: Sequence[jax.Array]) -> list[jax.Ref]:
    return [jax.new_ref(_as_bytes(array)) for array in memory]


def _freeze(refs: Sequence[jax.Ref], memory: Sequence[jax.Array]) -> list[jax.Array]:
    """What Refs hold, in the dtypes of the arrays that they were made of."""
    new = [jax.freeze(ref) for ref in refs]
    return [lax.bitcast_convert_type(array, old.dtype) for array, old in zip(new, memory, strict=True)]


def _describe(array: jax.Array, descriptor: Descriptor) -> Any:
    """An array as a TMA descriptor."""
    return jt.TensorDescriptor(
        array, descriptor.shape, descriptor.strides, descriptor.block, layout=shared_layout(descriptor)
    )


def _as_bytes(argument: Any) -> Any:
    """Quantised elements as bytes, which is a view. Triton refuses fp8 types where the target lacks them."""
    dtype = getattr(argument, "dtype", None)
    quantised = dtype is not None and (dtype.name in FP8 or dtype == jnp.int8)
    return lax.bitcast_convert_type(argument, jnp.uint8) if quantised else argument


def target_of(platform: str, compute_capability: int | None) -> Target:
    """What to compile for."""
    if platform == "rocm":
        return Target("hip", "", 64)
    if chosen := os.environ.get("JAXKV_COMPUTE_CAPABILITY"):
        compute_capability = int(chosen)
    if compute_capability is None:
        compute_capability = _attached() or 80
    return Target("cuda", compute_capability)


def _attached() -> int | None:
    """The compute capability of this host's GPU, if it has one.

    Without, as when exporting from a host of another kind, 8.0 is compiled for: PTX that newer GPUs translate.
    """
    try:
        version = jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None
    return int(version.replace(".", ""))
