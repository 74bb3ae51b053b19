"""`relayout` where bits move, as a primitive. Results: caches and scale caches of the destination, as they are then."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxkv._mesh import cache_specs, head_mesh_axes, replicated
from jaxkv._primitive.base import batch_by, loop_over, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._primitive.write import rows_factor
from jaxkv._relayout import RelayoutOperands, RelayoutOptions
from jaxkv._triton import interpret
from jaxkv._xla import relayout as xla
from kvcore.contract.relayout import Relayout


def relayout(options: RelayoutOptions, operands: RelayoutOperands) -> list[jax.Array]:
    """The new caches and scale caches."""
    return list(bind_sharded(relayout_p, _specs, options, operands))


def _result_types(options: RelayoutOptions, operands: RelayoutOperands) -> list[Any]:
    return list(operands.cache.memory)


def _compute(
    call: Relayout, options: RelayoutOptions, operands: RelayoutOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        return xla.relayout(call, options, operands)
    if backend == "interpret":
        return interpret.relayout(call, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.relayout(call, operands, launch.target_of(platform, options.compute_capability))


def _specs(
    options: RelayoutOptions, specs: RelayoutOperands, operands: RelayoutOperands
) -> tuple[RelayoutOperands, list[P]]:
    """Heads of both caches split alike; a device has them all of what is not split."""
    mesh_axes = head_mesh_axes(options.cache, specs.cache.memory)
    of_source = head_mesh_axes(options.source, specs.source.memory)
    if of_source is not None and str(of_source) != str(mesh_axes):
        raise ValueError(f"source must be split over heads as destination, over {mesh_axes}, got {of_source}")
    new = _split(options, operands, mesh_axes, mesh_axes)
    return new, list(new.cache.memory)


def _rule(options: RelayoutOptions, operands: RelayoutOperands) -> Rule:
    """KV heads are shared by both caches; every other axis is on its own."""
    splits = [rows_factor(options._replace(cache=cache)) for cache in (options.cache, options.source)]
    heads = None if None in splits else "h"
    return Rule(_split(options, operands, heads, heads), results=[], updates=True)


def _split(options: RelayoutOptions, operands: RelayoutOperands, heads: Any, of_source: Any) -> RelayoutOperands:
    return replicated(operands)._replace(
        cache=cache_specs(options.cache, operands.cache, heads),
        source=cache_specs(options.source, operands.source, of_source),
    )


relayout_p, local_p = make_primitives("relayout", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(relayout_p, local_p, _specs, _rule)
batch_by(relayout_p, loop_over(relayout_p))
refuse_derivatives(
    relayout_p, lambda _: "jaxkv.relayout is not differentiable: apply jax.lax.stop_gradient to the caches"
)
