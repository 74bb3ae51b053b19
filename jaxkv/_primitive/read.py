"""Attention and gather as one primitive. Results: result and log-sum-exp of attention, key and value of a gather."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxkv._call import ReadOperands, ReadOptions, read_results
from jaxkv._mesh import (
    cache_specs,
    check_views,
    head_factor,
    head_mesh_axes,
    head_specs,
    heads_share_regions,
    query_mesh_axes,
    replicated,
)
from jaxkv._primitive.base import batch_by, loop_over, lower_by_platform, make_primitives, refuse_derivatives
from jaxkv._primitive.sharding import Rule, bind_sharded, lower_by_heads
from jaxkv._triton import interpret
from jaxkv._views import Heads, array_of, sliced
from jaxkv._xla import gather as xla_gather
from jaxkv._xla import read as xla
from kvcore.contract.read import Attention, Gather
from kvcore.pattern import Axis


def read(options: ReadOptions, operands: ReadOperands) -> list[jax.Array]:
    """Result and log-sum-exp of attention, key and value of a gather."""
    return bind_sharded(read_p, _specs, options, operands)


def _result_types(options: ReadOptions, operands: ReadOperands) -> list[Any]:
    cache = operands.cache.caches[0]
    return [
        cache.update(
            shape=result.shape,
            dtype=result.dtype,
            sharding=cache.sharding.update(spec=P(*(None,) * len(result.shape))),
            weak_type=False,
        )
        for result in read_results(options.describe(operands))
    ]


def _compute(
    call: Attention | Gather, options: ReadOptions, operands: ReadOperands, backend: str, platform: str
) -> tuple[jax.Array, ...]:
    if backend == "xla":
        if isinstance(call, Gather):
            return xla_gather.gather(call, options, operands)
        return xla.attention(call, options, sliced(operands))
    if backend == "interpret":
        return interpret.read(call, options, operands)
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return launch.read(call, options, operands, launch.target_of(platform, options.compute_capability))


def _specs(options: ReadOptions, specs: ReadOperands, operands: ReadOperands) -> tuple[ReadOperands, list[P]]:
    mesh_axes = head_mesh_axes(options.cache, specs.cache.memory)
    cache = cache_specs(options.cache, operands.cache, mesh_axes)
    if specs.query is not None:
        mesh_axes = query_mesh_axes(
            mesh_axes, array_of(specs.query), array_of(operands.query), _num_heads(options, operands)
        )
    check_views(operands, specs, mesh_axes)
    specs = replicated(operands)._replace(cache=cache)
    return _split_queries(specs, mesh_axes, head_specs(operands.query, mesh_axes))


def _split_queries(specs: ReadOperands, mesh_axes: Any, query: Any) -> tuple[ReadOperands, list[P]]:
    """Specs of operands and results with query heads split over mesh axes, or with a gather's heads.

    Args:
        specs: Of operands; all that have an axis of query heads are replaced.
        mesh_axes: Or factors.
        query: The spec of query, which may be a view.
    """
    if specs.query is None:
        sequences = () if specs.seq_lens is None else (None,)
        return specs, [P(*sequences, None, mesh_axes, None)] * 2
    sinks = None if specs.sinks is None else P(mesh_axes)
    specs = specs._replace(query=query, sinks=sinks)
    return specs, [P(None, mesh_axes, None), P(None, mesh_axes)]


def _num_heads(options: ReadOptions, operands: ReadOperands) -> int:
    """KV heads of the caches."""
    return options.describe(operands).cache.extents.num_heads


def _rule(options: ReadOptions, operands: ReadOperands) -> Rule:
    """Factor h is the KV heads, which all operands with that axis share; every other axis is on its own.

    Query heads are "(h g)", as g of them share a KV head; an axis (head kv) is "(h c)", with 2 for c. No factor of size
    1 may be beside another one on an axis, and a factor that is nowhere alone needs its size.
    """
    num_heads = _num_heads(options, operands)
    heads = None if heads_share_regions(options.cache) and num_heads > 1 else "h"
    factors: dict[Axis, str | None] = {("head",): heads}
    if num_heads > 1:
        factors["head", "kv"] = heads and "(h c)"
    caches = tuple(P(*map(factors.get, axes)) for axes in options.cache.layout.arrays)
    cache = cache_specs(options.cache, operands.cache, heads)._replace(caches=caches)
    specs = replicated(operands)._replace(cache=cache)
    query_heads, of_query, in_group = query_factors(operands.query, num_heads, heads)
    specs, results = _split_queries(specs, query_heads, of_query)
    return Rule(specs, results, sizes={"c": 2, "h": num_heads, "g": in_group})


def query_factors(query: Any, num_heads: int, heads: str | None) -> tuple[str | None, Any, int]:
    """The factors of an axis of query heads; those of query's axes; and g, neighbours that share a KV head or a group.

    Args:
        query: An array; or a view, which may have groups of heads; None for a gather.
        num_heads: KV heads.
        heads: Their factor.
    """
    if query is None:
        return heads, None, 1
    q_heads = query.shape[1]
    if heads is None or q_heads == num_heads:
        return heads, head_factor(query, heads), 1
    groups = query.num_groups if isinstance(query, Heads) else q_heads
    factors = "q" if num_heads == 1 else "(h g)"
    if groups == q_heads:
        return factors, head_specs(query, factors), q_heads // num_heads
    if num_heads == 1 and groups is not None and groups > 1:
        return "(q g)", head_specs(query, "q"), q_heads // groups
    return factors, head_specs(query, "h" if groups == num_heads > 1 else None), q_heads // num_heads


def _derivatives(options: ReadOptions) -> str:
    gather = "gather_slots" if options.max_len is None else "gather_kv"
    name = gather if options.attention is None else "paged_attention"
    return f"jaxkv.{name} is not differentiable: apply jax.lax.stop_gradient to its arguments"


read_p, local_p = make_primitives("paged_read", _result_types)
lower_by_platform(local_p, _compute)
lower_by_heads(read_p, local_p, _specs, _rule)
batch_by(read_p, loop_over(read_p))
refuse_derivatives(read_p, _derivatives)
