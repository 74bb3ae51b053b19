"""The launches of the kernels that read, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv._call import ReadOperands, ReadOptions, layer_of, read_results
from jaxkv._views import array_of
from kvcore.contract.read import Attention, Gather
from kvcore.plan import attention as plan_attention
from kvcore.plan import gather as plan_gather
from kvcore.plan.kernel import Target
from kvcore.run.gluon import launches_gluon


def launch_read(
    call: Attention | Gather,
    options: ReadOptions,
    operands: ReadOperands,
    target: Target,
    launch: Callable[..., Any],
) -> Any:
    """Launches a read with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`; its results."""
    if isinstance(call, Gather):
        return _launch_gather(call, options, operands, target, launch)
    return _launch_attention(call, options, operands, target, launch)


def _launch_attention(
    call: Attention, options: ReadOptions, operands: ReadOperands, target: Target, launch: Callable[..., Any]
) -> Any:
    cache = operands.cache
    # XLA's arrays begin at multiples of 16.
    plan = plan_attention.plan_attention(
        call, target, layer_is_pointer=cache.layer is not None, descriptors=launches_gluon(target)
    )
    inputs = plan_attention.arguments(
        call, array_of(operands.query), cache.caches, operands.block_tables, operands.seq_lens,
        operands.query_start_loc, operands.sinks, *cache.scales, layer_of(options.cache, cache),
    )  # fmt: skip
    results = read_results(call)
    if plan.splits == 1:
        return launch(plan.attend, plan.grid, inputs, target, results)
    num_tokens, q_heads, head_size_v = call.out_shape
    partial_results = (
        jax.ShapeDtypeStruct((num_tokens, q_heads, plan.splits, head_size_v), jnp.float32),
        jax.ShapeDtypeStruct((num_tokens, q_heads, plan.splits), jnp.float32),
    )
    part, part_lse = launch(plan.attend, plan.grid, inputs, target, partial_results)
    inputs = plan_attention.merge_arguments(part, part_lse, operands.sinks, plan.splits)
    return launch(plan.merge, plan.merge_grid, inputs, target, results)


def _launch_gather(
    call: Gather, options: ReadOptions, operands: ReadOperands, target: Target, launch: Callable[..., Any]
) -> Any:
    cache = operands.cache
    plan = plan_gather.plan_gather(call, target, layer_is_pointer=cache.layer is not None)
    inputs = plan_gather.arguments(
        call, cache.caches, operands.block_tables, operands.seq_lens, *cache.scales, layer_of(options.cache, cache)
    )
    return launch(plan.kernel, plan.grid, inputs, target, read_results(call))
