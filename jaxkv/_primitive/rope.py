"""Rotation and write as one primitive. Results: the rotated query, caches and scale caches, as they are then."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkv._mesh import check_views, head_factor, head_mesh_axes, head_specs
from jaxkv._primitive.base import batch_by, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.read import query_factors
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._primitive.write import batch_writes, fold_into_blocks, merge_front, rows_factor, rule_of_heads, split_heads
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._triton import interpret
from jaxkv._views import array_of, sliced
from jaxkv._xla import rope as xla
from kvcore.contract.rope import Rope


def rope_and_cache(options: RotatedWriteOptions, operands: RotatedWriteOperands) -> list[jax.Array]:
    """The rotated query, and the new caches and scale caches."""
    return list(bind_sharded(rope_p, _specs, options, operands))


def _result_types(options: RotatedWriteOptions, operands: RotatedWriteOperands) -> list[Any]:
    query, array = operands.query, array_of(operands.query)
    if query is not array:
        spec = P(*(None,) * len(query.shape))
        query = array.update(shape=query.shape, sharding=array.sharding.update(spec=spec))
    return [query, *operands.cache.memory]


def _compute(
    call: Rope, options: RotatedWriteOptions, operands: RotatedWriteOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        return xla.rope_and_cache(call, options, sliced(operands))
    if backend == "interpret":
        return interpret.rope_and_cache(call, options, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.rope_and_cache(call, options, operands, launch.target_of(platform, options.compute_capability))


def _specs(
    options: RotatedWriteOptions, specs: RotatedWriteOperands, operands: RotatedWriteOperands
) -> tuple[RotatedWriteOperands, list[P]]:
    """Each query head is rotated where it is, whichever KV heads are there."""
    mesh_axes = head_mesh_axes(options.cache, specs.cache.memory)
    check_views(operands, specs, mesh_axes)
    q_mesh_axes = (*array_of(specs.query), None, None)[1]
    new = split_heads(options, operands, mesh_axes)._replace(query=head_specs(operands.query, q_mesh_axes))
    return new, [P(None, q_mesh_axes, None), *new.cache.memory]


def _rule(options: RotatedWriteOptions, operands: RotatedWriteOperands) -> Rule:
    """As of a write. Query heads are "(h g)" where g of them share a KV head, else on their own."""
    rule, query = rule_of_heads(options, operands), operands.query
    q_heads, num_heads = query.shape[1], operands.key.shape[1]
    factor, of_query, in_group = "q", head_factor(query, "q"), 1
    if rows_factor(options) is not None and q_heads % num_heads == 0:
        factor, of_query, in_group = query_factors(query, num_heads, "h")
    specs = rule.operands._replace(query=of_query)
    return Rule(specs, [P(None, factor, None)], updates=True, sizes={"h": num_heads, "g": in_group})


def _fold(operands: RotatedWriteOperands, num_slots: int) -> RotatedWriteOperands:
    """One call that does what a batch of them does. Tokens without a slot get one that is skipped."""
    slots, positions = operands.slot_mapping, operands.positions
    batch, num_tokens = positions.shape[0], positions.shape[-1]
    slots = jnp.pad(slots, ((0, 0), (0, num_tokens - slots.shape[1])), constant_values=-1)
    if positions.ndim == 3:
        positions = jnp.moveaxis(positions, 0, 1)
    return operands._replace(
        query=jax.tree.map(merge_front, operands.query),
        positions=positions.reshape(*positions.shape[:-2], batch * num_tokens),
        **fold_into_blocks(operands._replace(slot_mapping=slots), num_slots)._asdict(),
    )


def _derivatives(_: RotatedWriteOptions) -> str:
    return "jaxkv.rope_and_cache is not differentiable: apply jax.lax.stop_gradient to query, key and value"


rope_p, local_p = make_primitives("rope_and_cache", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(rope_p, local_p, _specs, _rule)
batch_by(rope_p, batch_writes(rope_p, _fold, shared=("cos_sin", "q_norm", "k_norm")))
refuse_derivatives(rope_p, _derivatives)
