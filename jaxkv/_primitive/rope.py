"""Rotation and write as one primitive. Results: the rotated query, caches and scale caches, as they are then."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxkv._mesh import head_mesh_axes
from jaxkv._primitive.base import batch_by, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._primitive.write import batch_writes, fold_into_blocks, merge_front, rule_of_heads, split_heads
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._triton import interpret
from jaxkv._xla import rope as xla
from kvcore.contract.rope import Rope


def rope_and_cache(options: RotatedWriteOptions, operands: RotatedWriteOperands) -> list[jax.Array]:
    """The rotated query, and the new caches and scale caches."""
    return list(bind_sharded(rope_p, _specs, options, operands))


def _result_types(options: RotatedWriteOptions, operands: RotatedWriteOperands) -> list[Any]:
    return list(operands.updated)


def _compute(
    call: Rope, options: RotatedWriteOptions, operands: RotatedWriteOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        return xla.rope_and_cache(call, options, operands)
    if backend == "interpret":
        return interpret.rope_and_cache(call, options, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.rope_and_cache(call, options, operands, launch.target_of(platform, options.compute_capability))


def _specs(
    options: RotatedWriteOptions, specs: RotatedWriteOperands, operands: RotatedWriteOperands
) -> tuple[RotatedWriteOperands, list[P]]:
    """Each query head is rotated where it is, whichever KV heads are there."""
    new = split_heads(options, operands, head_mesh_axes(options.cache, specs.cache.memory))
    new = new._replace(query=P(None, (*specs.query, None, None)[1], None))
    return new, list(new.updated)


def _rule(options: RotatedWriteOptions, operands: RotatedWriteOperands) -> Rule:
    """As of a write. Query heads are "(h g)" where g of them share a KV head, else on their own."""
    rule = rule_of_heads(options, operands)
    q_heads, num_heads = operands.query.shape[1], operands.key.shape[1]
    factor, sizes = "q", rule.sizes
    if rule.operands.key[1] is not None and num_heads > 1 and q_heads % num_heads == 0:
        factor = "h" if q_heads == num_heads else "(h g)"
        sizes = {} if q_heads == num_heads else {"g": q_heads // num_heads}
    return Rule(rule.operands._replace(query=P(None, factor, None)), results=None, sizes=sizes)


def _fold(operands: RotatedWriteOperands, num_slots: int) -> RotatedWriteOperands:
    """One call that does what a batch of them does. Tokens without a slot get one that is skipped."""
    batch, num_tokens = operands.query.shape[:2]
    slots, positions = operands.slot_mapping, operands.positions
    slots = jnp.pad(slots, ((0, 0), (0, num_tokens - slots.shape[1])), constant_values=-1)
    if positions.ndim == 3:
        positions = jnp.moveaxis(positions, 0, 1)
    return operands._replace(
        query=merge_front(operands.query),
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
