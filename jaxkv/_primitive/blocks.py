"""Copies and zeros of whole blocks as primitives. Results: caches and scale caches, as they are then."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec as P

from jaxkv._blocks import BlocksOperands, BlocksOptions
from jaxkv._mesh import check_block_parts, check_whole_blocks, replicated
from jaxkv._primitive.base import batch_by, bind, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._primitive.write import merge_front
from jaxkv._triton import interpret
from jaxkv._xla import blocks as xla
from kvcore.contract.blocks import Blocks


def copy_blocks(options: BlocksOptions, operands: BlocksOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return list(bind_sharded(copy_p, _specs, options, operands, check_whole_blocks))


def zero_blocks(options: BlocksOptions, operands: BlocksOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return list(bind_sharded(zero_p, _specs, options, operands, check_whole_blocks))


def _result_types(options: BlocksOptions, operands: BlocksOperands) -> list[Any]:
    return list(operands.cache.memory)


def _compute(
    call: Blocks, options: BlocksOptions, operands: BlocksOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        return xla.move_blocks(call, operands)
    if backend == "interpret":
        return interpret.move_blocks(call, options, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.move_blocks(call, options, operands, launch.target_of(platform, options.compute_capability))


def _specs(options: BlocksOptions, specs: BlocksOperands, operands: BlocksOperands) -> tuple[BlocksOperands, list[P]]:
    """What a device has of each block it moves by itself, along whichever axes arrays are split."""
    memory = [
        P(*spec, *(None,) * (len(array.shape) - len(spec)))
        for spec, array in zip(specs.cache.memory, operands.cache.memory, strict=True)
    ]
    check_whole_blocks(options.cache, [P(*spec[options.batched :]) for spec in memory])
    batch = memory[0][0] if options.batched else None
    memory = [P(batch, *spec[1:]) if options.batched else spec for spec in memory]
    new = _with_memory(operands, memory, batch)
    return new, memory


def _rule(options: BlocksOptions, operands: BlocksOperands) -> Rule:
    """Items of a batch belong together; every other axis is on its own."""
    batch = "b" if options.batched else None
    memory = [P(batch, *(None,) * (len(array.shape) - 1)) for array in operands.cache.memory]
    return Rule(_with_memory(operands, memory, batch), results=[], updates=True)


def _with_memory(operands: BlocksOperands, memory: list[P], batch: Any) -> BlocksOperands:
    """Specs of operands: these of the arrays, and of pairs or blocks one with the batch's mesh axes, or factor."""
    specs = replicated(operands)
    specs = specs._replace(cache=specs.cache.with_memory(memory))
    name = "blocks" if operands.pairs is None else "pairs"
    return specs._replace(**{name: P(batch, *(None,) * (len(operands.indices.shape) - 1))})


def _batched(primitive: Primitive) -> Any:
    """One call for the whole batch: the kernel has items of a batch apart."""

    def batched(options: BlocksOptions, operands: Any, is_batched: Any, batch: int) -> list[jax.Array]:
        every = jax.tree.map(
            lambda array, has_batch: array if has_batch else jnp.broadcast_to(array, (batch, *array.shape)),
            operands,
            is_batched,
        )
        if options.batched:  # two batches are one
            shapes = [array.shape for array in every.cache.memory]
            new = bind(primitive, options, jax.tree.map(merge_front, every))
            return [array.reshape(shape) for array, shape in zip(new, shapes, strict=True)]
        return bind(primitive, options._replace(batched=True), every)

    return batched


def _register(name: str) -> Primitive:
    primitive, local_p = make_primitives(name, _result_types)
    lower_by_platform(local_p, _compute)
    lower_by_heads(primitive, local_p, _specs, _rule, check_block_parts)
    batch_by(primitive, _batched(primitive))
    message = f"jaxkv.{name} is not differentiable: apply jax.lax.stop_gradient to the caches"
    refuse_derivatives(primitive, lambda _: message)
    return primitive


copy_p, zero_p = _register("copy_blocks"), _register("zero_blocks")
