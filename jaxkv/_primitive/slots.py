"""The slot mapping as a primitive. Every device has the whole result, as it has all tables and lengths."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv._mesh import explicit_axes, replicated, vary, varying_axes
from jaxkv._primitive.base import batch_by, bind, loop_over, lower_by_platform, make_primitives
from jaxkv._primitive.sharding import lower_replicated
from jaxkv._slots import SlotOperands, SlotOptions, slots_result
from jaxkv._triton import interpret
from jaxkv._xla import slots as xla
from kvcore.contract.slots import SlotMapping


def slot_mapping(options: SlotOptions, operands: SlotOperands) -> jax.Array:
    """The slot of each token."""
    arrays = jax.tree.leaves(operands)
    on_mesh = next((array for array in arrays if explicit_axes(array)[1]), None)
    if on_mesh is not None:
        mesh, explicit = explicit_axes(on_mesh)
        return _bind_explicit(options, operands, mesh, frozenset(explicit))
    (slots,) = bind(slots_p, options, vary(operands, varying_axes(arrays)))
    return slots


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _bind_explicit(options: SlotOptions, operands: SlotOperands, mesh: Any, explicit: frozenset[str]) -> jax.Array:
    """Binds the primitive where shardings are part of types. An eager shard_map would be compiled anew each time."""
    specs = replicated(operands)
    local = jax.shard_map(
        functools.partial(slot_mapping, options), mesh=mesh, axis_names=explicit, in_specs=(specs,), out_specs=P(None)
    )
    return local(jax.tree.map(lambda array, s: jax.sharding.reshard(array, NamedSharding(mesh, s)), operands, specs))


def _result_types(options: SlotOptions, operands: SlotOperands) -> list[Any]:
    tables, result = operands.block_tables, slots_result(options.describe(operands))
    sharding = tables.sharding.update(spec=P(None))
    return [tables.update(shape=result.shape, dtype=result.dtype, sharding=sharding, weak_type=False)]


def _compute(
    call: SlotMapping, options: SlotOptions, operands: SlotOperands, backend: str, platform: str
) -> list[jax.Array]:
    if backend == "xla":
        return [xla.slot_mapping(call, operands)]
    if backend == "interpret":
        return [interpret.slot_mapping(call, operands)]
    from jaxkv._triton import launch  # imports Triton, which only GPUs need

    return [launch.slot_mapping(call, operands, launch.target_of(platform, options.compute_capability))]


slots_p, local_p = make_primitives("slot_mapping", _result_types)
lower_by_platform(local_p, _compute)
lower_replicated(slots_p, local_p)
batch_by(slots_p, loop_over(slots_p))
