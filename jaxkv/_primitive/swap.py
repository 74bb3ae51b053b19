"""`swap_blocks` as a primitive. Results: caches and scale caches of the destination, as they are then."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkv._mesh import check_block_parts, check_whole_blocks, replicated
from jaxkv._primitive.base import batch_by, bind, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._primitive.write import merge_front
from jaxkv._swap import SwapOperands, SwapOptions
from jaxkv._triton import interpret
from jaxkv._xla import swap as xla
from kvcore.contract.swap import Swap


def swap_blocks(options: SwapOptions, operands: SwapOperands) -> list[jax.Array]:
    """The new caches and scale caches of the destination."""
    return list(bind_sharded(swap_p, _specs, options, operands, check_whole_blocks))


def _result_types(options: SwapOptions, operands: SwapOperands) -> list[Any]:
    return list(operands.cache.memory)


def _compute(call: Swap, options: SwapOptions, operands: SwapOperands, backend: str, platform: str) -> list[jax.Array]:
    if backend == "xla":
        return xla.swap_blocks(call, operands)
    if backend == "interpret":
        return interpret.swap_blocks(call, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.swap_blocks(call, operands, launch.target_of(platform, options.compute_capability))


def _specs(options: SwapOptions, specs: SwapOperands, operands: SwapOperands) -> tuple[SwapOperands, list[P]]:
    """What a device has of each block it moves by itself: source is split as destination, along whichever axes."""
    memory = [
        P(*spec, *(None,) * (len(array.shape) - len(spec)))
        for spec, array in zip(specs.cache.memory, operands.cache.memory, strict=True)
    ]
    check_whole_blocks(options.cache, [P(*spec[options.batched :]) for spec in memory])
    batch = memory[0][0] if options.batched else None
    memory = [P(batch, *spec[1:]) if options.batched else spec for spec in memory]
    return _with_memory(operands, memory, batch), memory


def _rule(options: SwapOptions, operands: SwapOperands) -> Rule:
    """Items of a batch belong together, and axes of source to those of destination, but for the blocks."""
    batch = ["b"] if options.batched else []
    memory = [
        P(*batch, *(None if "block" in axis else f"a{i}x{j}" for j, axis in enumerate(axes)))
        for i, axes in enumerate(options.cache.arrays)
    ]
    return Rule(_with_memory(operands, memory, "b" if options.batched else None), results=[], updates=True)


def _with_memory(operands: SwapOperands, memory: list[P], batch: Any) -> SwapOperands:
    """Specs of operands: these of the arrays of both caches, and of pairs one with the batch's mesh axes, or factor."""
    specs = replicated(operands)
    return specs._replace(
        cache=specs.cache.with_memory(memory),
        source=specs.source.with_memory(memory),
        pairs=P(batch, *(None,) * (len(operands.pairs.shape) - 1)),
    )


def _batched(options: SwapOptions, operands: SwapOperands, is_batched: Any, batch: int) -> list[jax.Array]:
    """One call for the whole batch: the kernel has items of a batch apart."""
    every = jax.tree.map(
        lambda array, has_batch: array if has_batch else jnp.broadcast_to(array, (batch, *array.shape)),
        operands,
        is_batched,
    )
    if options.batched:  # two batches are one
        shapes = [array.shape for array in every.cache.memory]
        new = bind(swap_p, options, jax.tree.map(merge_front, every))
        return [array.reshape(shape) for array, shape in zip(new, shapes, strict=True)]
    return bind(swap_p, options._replace(batched=True), every)


swap_p, local_p = make_primitives("swap_blocks", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(swap_p, local_p, _specs, _rule, check_block_parts)
batch_by(swap_p, _batched)
refuse_derivatives(
    swap_p, lambda _: "jaxkv.swap_blocks is not differentiable: apply jax.lax.stop_gradient to the caches"
)
