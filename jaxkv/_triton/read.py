"""Reading with the Triton kernels, through jax_triton."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv._triton.launch import as_bytes, launch, target_of  # first: it mends jax_triton
from kvcore.contract.read import Attention, Gather
from kvcore.plan import attention as plan_attention
from kvcore.plan import gather as plan_gather


def attention(
    call: Attention, x: Any, layer: int | None, platform: str, compute_capability: int | None
) -> tuple[jax.Array, jax.Array]:
    """Result and log-sum-exp. `x` are `_read_primitive.Operands`."""
    target = target_of(platform, compute_capability)
    plan = plan_attention.plan_attention(call, target, layer_is_pointer=x.layer is not None)
    shape = call.out_shape
    out = jax.ShapeDtypeStruct(shape, x.query.dtype), jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    if 0 in shape[:2]:
        return jnp.zeros(shape, x.query.dtype), jnp.zeros(shape[:2], jnp.float32)
    caches = [as_bytes(c) for c in x.caches]
    inputs = plan_attention.arguments(
        call, x.query, caches, x.block_tables, x.seq_lens, x.query_start_loc, x.sinks, x.k_scale, x.v_scale,
        layer if x.layer is None else x.layer,
    )  # fmt: skip
    if plan.splits == 1:
        return launch(plan.attend, plan.grid, inputs, target, out)
    parts = (
        jax.ShapeDtypeStruct((*shape[:2], plan.splits, shape[2]), jnp.float32),
        jax.ShapeDtypeStruct((*shape[:2], plan.splits), jnp.float32),
    )
    part, part_lse = launch(plan.attend, plan.grid, inputs, target, parts)
    merged = plan_attention.merge_arguments(part, part_lse, x.sinks, plan.splits)
    return launch(plan.merge, plan.merge_grid, merged, target, out)


def gather(
    call: Gather, x: Any, layer: int | None, platform: str, compute_capability: int | None
) -> tuple[jax.Array, jax.Array]:
    """Key and value. `x` are `_read_primitive.Operands`."""
    target = target_of(platform, compute_capability)
    plan = plan_gather.plan_gather(call, target, layer_is_pointer=x.layer is not None)
    dtype = jnp.dtype(call.format.name)
    if 0 in plan.grid:
        key, value = (jnp.zeros(shape, dtype) for shape in call.shapes)
        return key, value
    caches = [as_bytes(c) for c in x.caches]
    inputs = plan_gather.arguments(
        call, caches, x.block_tables, x.seq_lens, x.k_scale, x.v_scale, layer if x.layer is None else x.layer
    )
    out = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in call.shapes)
    return launch(plan.kernel, plan.grid, inputs, target, out)
