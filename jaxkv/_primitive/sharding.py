"""Calls that several devices share: each gets the heads that it has, and nothing is communicated.

Where shardings are part of types (`AxisType.Explicit`), they are known when a primitive is bound, and a shard_map of
the call does it. Otherwise XLA's partitioner is the first to know them, and asks a custom partitioning; without that,
it would gather the caches. Within a shard_map of the user's, each device's call is one for a single device.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax._src import (
    compiler,  # private: only its handlers of errors see those of a partitioning
    dispatch,  # private: a lowering that emits custom_partitioning has to say that it needs devices
)
from jax.core import Tracer
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv._call import CacheOptions
from jaxkv._mesh import check_split_views, explicit_axes, head_mesh_axes, replicated, used_spec, vary, varying_axes
from jaxkv._primitive.base import CacheOpOperands as Operands
from jaxkv._primitive.base import CacheOpOptions as Options
from jaxkv._primitive.base import bind, compute_capability


class Rule(NamedTuple):
    """How XLA may spread the shardings of operands and results.

    Attributes:
        operands: A spec for each operand, with names of factors in place of mesh axes. Axes with the same factor are
            split alike; an axis with None is split like no other.
        results: A spec of that kind for each result that is a new array.
        updates: Whether the caches and scale caches follow these as results, updated: with the factors and the
            shardings of these operands.
        sizes: The sizes of factors; those are looked at that are nowhere alone on an axis.
    """

    operands: Any
    results: list[P]
    updates: bool = False
    sizes: Mapping[str, int] = MappingProxyType({})

    @property
    def needed_sizes(self) -> dict[str, int]:
        """The sizes that XLA cannot tell from the shapes."""
        of_axes = {axis for spec in spec_leaves((self.operands, self.results)) for axis in spec if axis}
        nowhere_alone = {factor for axis in of_axes for factor in axis.strip("()").split()} - of_axes
        return {factor: self.sizes[factor] for factor in nowhere_alone}


Specs = Callable[[Any, Any, Any], tuple[Any, list[P]]]
"""Makes specs of operands and of results with which devices need no communication, of three arguments: options, the
specs that operands have, and operands, of which only shapes count."""


Check = Callable[[Any, Sequence[P]], Any]
"""Raises, given options of a cache and the specs of its arrays, if these are split in a way that the op cannot use."""


def bind_sharded(
    primitive: Primitive, specs: Specs, options: Options, operands: Operands, check: Check = head_mesh_axes
) -> list[Any]:
    """Binds a primitive to a call, whatever the sharding of its operands, which `check` may refuse.

    Inside shard_map, operands become varying where any of them is that the same results depend on.
    """
    memory = operands.cache.memory
    if explicit_axes(memory[0])[1]:
        return _bind_explicit(primitive, specs, options, operands)
    _check_concrete(options, memory, check)
    return bind(primitive, options, _varying_alike(operands))


def _varying_alike(operands: Operands) -> Operands:
    """Makes operands of the same results vary over the same mesh axes; what several results share stays as it is."""
    results = operands.results_of
    changed = {}
    for names in results:
        own = set(names).difference(*(others for others in results if others is not names))
        varying = varying_axes([getattr(operands, name) for name in names])
        changed |= {name: vary(getattr(operands, name), varying) for name in own}
    return operands._replace(**changed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _bind_explicit(primitive: Primitive, specs: Specs, options: Options, operands: Operands) -> list[Any]:
    """Binds a primitive where shardings are part of types. An eager shard_map, without jit, would be compiled anew."""
    mesh, explicit = explicit_axes(operands.cache.memory[0])
    present = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, operands)
    in_specs, out_specs = specs(options, present, operands)
    local = jax.shard_map(
        functools.partial(bind_sharded, primitive, specs, options),
        mesh=mesh,
        axis_names=explicit,
        in_specs=(in_specs,),
        out_specs=out_specs,
    )
    return local(jax.tree.map(lambda array, s: jax.sharding.reshard(array, NamedSharding(mesh, s)), operands, in_specs))


def _check_concrete(options: Options, memory: Sequence[Any], check: Check) -> None:
    """Raises, before anything is compiled, if caches and scale caches are split in a way that no op can use.

    Within jit, XLA's partitioner is the first to know how they are: see `_remembering_refusals`.
    """
    if any(isinstance(array, Tracer) or not isinstance(array.sharding, NamedSharding) for array in memory):
        return
    check(options.cache, [used_spec(array.sharding) for array in memory])


# ---- XLA's partitioner


def lower_by_heads(
    primitive: Primitive,
    local_p: Primitive,
    specs: Specs,
    rule: Callable[[Any, Any], Rule],
    check_parts: Callable[[CacheOptions, Any], None] = check_split_views,
) -> None:
    """Lowers a primitive to a custom partitioning by heads, or by what else `specs` says.

    Args:
        primitive: The one that users bind.
        local_p: The one that computes on a single device.
        specs: Of operands and results.
        rule: Makes the rule by which shardings spread, of options, and of operands that are types.
        check_parts: Raises, given options of the cache and operands, where XLA has split arrays, by shardings without
            specs, in a way that the op cannot use.
    """

    def lower(ctx: Any, *values: Any, tree: Any, options: Any) -> Any:
        options = options._replace(compute_capability=compute_capability(ctx.module_context.axis_context))
        if _nothing_left(ctx.module_context.axis_context):
            local = functools.partial(local_p.bind, tree=tree, options=options)
            return mlir.lower_fun(local, multiple_results=True)(ctx, *values)
        spread = rule(options, jax.tree.unflatten(tree, ctx.avals_in))
        partitioned = _partitioned(local_p, specs, spread, tree, options, check_parts)
        return mlir.lower_fun(lambda *leaves: list(partitioned(*leaves)), multiple_results=True)(ctx, *values)

    dispatch.prim_requires_devices_during_lowering.add(primitive)
    mlir.register_lowering(primitive, lower)


def _nothing_left(axis_context: Any) -> bool:
    """Whether a shard_map leaves XLA only mesh axes of one device, for which jax has no partitioning of ours."""
    manual = getattr(axis_context, "manual_axes", frozenset())
    return bool(manual) and all(size == 1 or name in manual for name, size in axis_context.mesh.shape.items())


def _partitioned(local_p: Primitive, specs: Specs, rule: Rule, tree: Any, options: Options, check_parts: Any) -> Any:
    """The call as a function of the operands' leaves, which XLA's partitioner splits as the rule has it."""

    def local(*leaves: Any) -> tuple[Any, ...]:
        return tuple(local_p.bind(*leaves, tree=tree, options=options))

    @_remembering_refusals
    def partition(mesh: Any, leaves: Any, results: Any) -> Any:
        operands = jax.tree.unflatten(tree, leaves)
        if not all(isinstance(array.sharding, NamedSharding) for array in operands.cache.memory):
            # Within a shard_map over some of the mesh's axes. XLA's shardings there have no spec to look at.
            check_parts(options.cache, operands)
            results = [*results[: len(rule.results)], *(operands.cache.memory if rule.updates else ())]
            return mesh, local, tuple(array.sharding for array in results), tuple(array.sharding for array in leaves)
        in_specs, out_specs = specs(options, jax.tree.map(lambda array: array.sharding.spec, operands), operands)
        operand_shardings, result_shardings = (
            tuple(NamedSharding(mesh, spec) for spec in spec_leaves(part)) for part in (in_specs, out_specs)
        )
        return mesh, local, result_shardings, operand_shardings

    partitioned = custom_partitioning(local)
    sizes: Any = rule.needed_sizes
    partitioned.def_partition(partition, sharding_rule=_spell(rule), **sizes)
    return partitioned


def lower_replicated(primitive: Primitive, local_p: Primitive) -> None:
    """Lowers a primitive to a custom partitioning in which each device has all operands, and computes all results.

    Args:
        primitive: The one that users bind.
        local_p: The one that computes on a single device.
    """

    def lower(ctx: Any, *values: Any, tree: Any, options: Any) -> Any:
        options = options._replace(compute_capability=compute_capability(ctx.module_context.axis_context))

        if _nothing_left(ctx.module_context.axis_context):
            one = functools.partial(local_p.bind, tree=tree, options=options)
            return mlir.lower_fun(one, multiple_results=True)(ctx, *values)

        def local(*leaves: Any) -> tuple[Any, ...]:
            return tuple(local_p.bind(*leaves, tree=tree, options=options))

        def partition(mesh: Any, leaves: Any, results: Any) -> Any:
            whole = [NamedSharding(mesh, P(*(None,) * len(array.shape))) for array in (*results, *leaves)]
            return mesh, local, tuple(whole[: len(results)]), tuple(whole[len(results) :])

        rule = Rule(replicated(ctx.avals_in), [P(*(None,) * len(aval.shape)) for aval in ctx.avals_out])
        partitioned = custom_partitioning(local)
        partitioned.def_partition(partition, sharding_rule=_spell(rule))
        return mlir.lower_fun(lambda *leaves: list(partitioned(*leaves)), multiple_results=True)(ctx, *values)

    dispatch.prim_requires_devices_during_lowering.add(primitive)
    mlir.register_lowering(primitive, lower)


def _spell(rule: Rule) -> str:
    """A rule as custom_partitioning reads it."""
    fresh = (f"i{n}" for n in itertools.count())

    def spelled(spec: P) -> str:
        return " ".join(factor or next(fresh) for factor in spec)

    operands = jax.tree.map(spelled, rule.operands, is_leaf=lambda spec: isinstance(spec, P))
    results = [*map(spelled, rule.results), *(operands.cache.memory if rule.updates else ())]
    return f"{', '.join(jax.tree.leaves(operands))} -> {', '.join(results)}"


def spec_leaves(specs: Any) -> list[P]:
    """The specs in a pytree of them."""
    return jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, P))


# ---- errors


_refusals: set[str] = set()


def _remembering_refusals(partition: Any) -> Any:
    """Makes a partitioning's ValueErrors leave the compiler: XLA would hide them in the middle of a traceback."""

    @functools.wraps(partition)
    def remembering(*args: Any) -> Any:
        try:
            return partition(*args)
        except ValueError as error:
            _refusals.add(str(error))
            raise

    return remembering


def _refusal(error: Exception) -> ValueError | None:
    """The error of a partitioning that the compiler's error quotes; None where it quotes none."""
    text = str(error)
    return next((ValueError(refusal) for refusal in _refusals if refusal in text), None)


compiler.register_xla_runtime_error_handler(_refusal)
