"""The write as a JAX primitive: lowering by platform, sharding, batching.

Two primitives. `write_p` is what users bind. Where several devices share the work it lowers to a custom partitioning,
which gives each device a `local_p` for its own heads; without that, XLA would gather the caches. `local_p` lowers
to the Triton kernel or to XLA, whichever the platform has.

Operands: key, value, one or two caches, slot_mapping, then k_scale, v_scale and layer where `Options` says so, of
shape (1,) each. Results: the new caches.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import (
    dispatch,
)  # private: a lowering that emits custom_partitioning has to say that it needs devices
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv import _interpret, _xla
from kvcore.checks import ArraySpec, no_triton_error
from kvcore.contract import Write, check_write
from kvcore.layout import Axis, CacheLayout


class Options(NamedTuple):
    """The static half of a call, free of shapes: those change under sharding and batching."""

    num_caches: int
    kv_cache_dtype: str
    layout: CacheLayout
    k_scaled: bool
    v_scaled: bool
    layer_traced: bool
    layer: int | None
    backend: str | None
    compute_capability: int | None = None


class Operands(NamedTuple):
    """The primitive's operands, by name."""

    key: Any
    value: Any
    caches: tuple[Any, ...]
    slot_mapping: Any
    k_scale: Any | None
    v_scale: Any | None
    layer: Any | None

    @classmethod
    def unflatten(cls, options: Options, flat: Sequence[Any]) -> "Operands":
        """Names the flat operands."""
        caches, rest = flat[2 : 2 + options.num_caches], list(flat[2 + options.num_caches :])
        given = (True, options.k_scaled, options.v_scaled, options.layer_traced)
        return cls(flat[0], flat[1], tuple(caches), *(rest.pop(0) if g else None for g in given))

    def flatten(self) -> list[Any]:
        """The inverse of `unflatten`."""
        rest = (self.slot_mapping, self.k_scale, self.v_scale, self.layer)
        return [self.key, self.value, *self.caches, *(x for x in rest if x is not None)]


def write(options: Options, *flat: Any) -> list[Any]:
    """Binds the primitive. Inside shard_map, operands become varying where any of them is."""
    mesh, explicit = explicit_axes(Operands.unflatten(options, flat).caches[0])
    if explicit:
        return _write_explicit(options, mesh, explicit, flat)
    varying = frozenset().union(*(varying_axes(x) for x in flat))
    return write_p.bind(*(vary(x, varying) for x in flat), options=options)


def _write_explicit(options: Options, mesh: Any, explicit: set[str], flat: Sequence[Any]) -> list[Any]:
    """The write where shardings are part of types: they are known here, so each device gets its heads here."""
    specs = [jax.typeof(c).sharding.spec for c in Operands.unflatten(options, flat).caches]
    operand_specs, cache_specs = _specs(options, specs, len(flat))
    local = jax.shard_map(
        lambda *shards: write(options, *shards),
        mesh=mesh,
        axis_names=explicit,
        in_specs=tuple(operand_specs),
        out_specs=cache_specs,
    )
    return local(*(jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(flat, operand_specs, strict=True)))


def explicit_axes(cache: Any) -> tuple[Any, set[str]]:
    """The mesh that a cache is on, and those of its axes that are part of types."""
    mesh = jax.typeof(cache).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, {name for name, kind in kinds if kind == AxisType.Explicit}


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes of a shard_map along which an array differs."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: Any, axes: frozenset[str]) -> Any:
    """The array, as one that may differ along these axes."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def describe(options: Options, operands: Operands) -> Write:
    """The contract's description of a call, for the shapes at hand."""
    return check_write(
        spec_of(operands.key),
        spec_of(operands.value),
        [spec_of(c) for c in operands.caches],
        spec_of(operands.slot_mapping),
        options.kv_cache_dtype,
        None if operands.k_scale is None else spec_of(operands.k_scale),
        None if operands.v_scale is None else spec_of(operands.v_scale),
        options.layout,
        spec_of(operands.layer) if options.layer_traced else options.layer,
    )


def spec_of(x: Any) -> ArraySpec:
    """What the contract asks of an array."""
    return ArraySpec(tuple(x.shape), np.dtype(x.dtype).name)


def make_primitive(name: str, abstract: Any) -> Primitive:
    """A primitive with several results, of which `abstract` gives the types."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    return primitive


def _abstract(*avals: Any, options: Options) -> list[Any]:
    return list(Operands.unflatten(options, avals).caches)


local_p = make_primitive("reshape_and_cache_local", _abstract)
write_p = make_primitive("reshape_and_cache", _abstract)


# ---- one device


def _lower_local(platform: str) -> Any:
    def implementation(*flat: Any, options: Options) -> list[Any]:
        operands = Operands.unflatten(options, flat)
        call = describe(options, operands)
        backend = backend_on(platform, options.backend)
        if backend == "xla":
            return _xla.write(call, operands, options.layer)
        if backend == "interpret":
            return _interpret.write(call, operands, options.layer)
        from jaxkv import _triton  # imports Triton, which only GPUs need

        return _triton.write(call, operands, options.layer, platform, options.compute_capability)

    return mlir.lower_fun(implementation, multiple_results=True)


PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


def backend_on(platform: str, backend: str | None) -> str:
    """The backend that is meant on a platform; an error if it cannot run there."""
    gpu = platform in ("cuda", "rocm")
    if backend == "triton" and not gpu:
        raise no_triton_error(platform)
    return backend or ("triton" if gpu else "xla")


for _platform in PLATFORMS:
    mlir.register_lowering(local_p, _lower_local(_platform), platform=_platform)


# ---- several devices


def _lower_write(ctx: Any, *values: Any, options: Options) -> Any:
    options = options._replace(compute_capability=compute_capability(ctx.module_context.axis_context))
    partitioned = _partitioned(options, len(ctx.avals_in))
    return mlir.lower_fun(lambda *flat: list(partitioned(*flat)), multiple_results=True)(ctx, *values)


dispatch.prim_requires_devices_during_lowering.add(write_p)
mlir.register_lowering(write_p, _lower_write)


def compute_capability(axis_context: Any) -> int | None:
    """Of the CUDA devices to compile for, 90 for 9.0; None where they are unknown (export) or no CUDA devices."""
    mesh: Any = getattr(axis_context, "mesh", None)
    devices = mesh.devices.flat if hasattr(mesh, "devices") else getattr(axis_context, "device_assignment", None)
    for device in devices or ():
        version = getattr(device, "compute_capability", None)
        if isinstance(version, str) and version.replace(".", "").isdecimal():
            return int(version.replace(".", ""))
    return None


def _partitioned(options: Options, num_operands: int) -> Any:
    """The write as a function that XLA's partitioner splits by heads."""

    def local(*flat: Any) -> tuple[Any, ...]:
        return tuple(local_p.bind(*flat, options=options))

    def partition(mesh: Any, args: Any, results: Any) -> Any:
        del results
        given = Operands.unflatten(options, args)
        if not all(isinstance(c.sharding, NamedSharding) for c in given.caches):  # within a partly manual shard_map
            return mesh, local, tuple(c.sharding for c in given.caches), tuple(a.sharding for a in args)
        operand_specs, cache_specs = _specs(options, [c.sharding.spec for c in given.caches], num_operands)
        caches, operands = (tuple(NamedSharding(mesh, spec) for spec in s) for s in (cache_specs, operand_specs))
        return mesh, local, caches, operands

    partitioned = custom_partitioning(local)
    partitioned.def_partition(partition, sharding_rule=_sharding_rule(options, num_operands))
    return partitioned


def _specs(options: Options, caches: Sequence[P], num_operands: int) -> tuple[list[P], list[P]]:
    """Specs of all operands and of the results, given those of the caches."""
    heads, results = split_caches(options.layout, caches)
    rows = P(None, heads, None)
    return [rows, rows, *results, *[P(None)] * (num_operands - 2 - len(results))], results


def split_caches(layout: CacheLayout, specs: Sequence[P]) -> tuple[Any, list[P]]:
    """The mesh axes over which the heads of caches are split, and specs that split nothing else."""
    splits = [_head_split(axes, spec) for axes, spec in zip(layout.arrays, specs, strict=True)]
    if len({str(split) for split in splits}) > 1:
        raise ValueError(f"key_cache and value_cache must be split alike over heads, got {splits[0]} and {splits[1]}")
    heads = splits[0]
    return heads, [P(*(heads if "head" in axis else None for axis in axes)) for axes in layout.arrays]


def _head_split(axes: Sequence[Axis], spec: P) -> Any:
    """The mesh axes over which heads are split; an error if anything else is."""
    split = None
    for axis, mesh_axes in zip(axes, (*spec, *(None,) * (len(axes) - len(spec))), strict=True):
        if mesh_axes is None:
            continue
        if axis[0] != "head":  # of a joined (kv head), devices would get K or V
            raise ValueError(
                f"a cache may be split over heads only, got axis {' '.join(axis)} split over {mesh_axes}; "
                "jax.shard_map can give each device blocks of its own"
            )
        split = mesh_axes
    return split


def _sharding_rule(options: Options, num_operands: int) -> str:
    """How shardings spread: heads are shared by all operands with that axis, every other axis is on its own."""
    fresh = (f"i{n}" for n in range(1000))

    def spell(axes: Sequence[Axis]) -> str:
        return " ".join("h" if "head" in axis else next(fresh) for axis in axes)

    caches = [spell(axes) for axes in options.layout.arrays]
    joined = any(len(axis) > 1 and "head" in axis for axes in options.layout.arrays for axis in axes)
    rows = [f"{next(fresh)} {next(fresh) if joined else 'h'} {next(fresh)}" for _ in range(2)]
    rest = [next(fresh) for _ in range(num_operands - 2 - len(caches))]
    return f"{', '.join([*rows, *caches, *rest])} -> {', '.join(caches)}"


# ---- transformations


def _batch(flat: Sequence[Any], dims: Sequence[Any], *, options: Options) -> tuple[list[Any], list[int]]:
    """vmap: one write where the batch can be folded into blocks, else a loop over it; in place either way."""
    size = next(x.shape[d] for x, d in zip(flat, dims, strict=True) if isinstance(d, int))
    batched = Operands.unflatten(options, dims)
    x = Operands.unflatten(options, [batching.bdim_at_front(a, d, size) for a, d in zip(flat, dims, strict=True)])
    first = {axes[0] for axes in options.layout.arrays}
    extents = options.layout.place([c.shape[1:] for c in x.caches], head_size=x.key.shape[3]).extents
    shared = not any(isinstance(d, int) for d in (batched.k_scale, batched.v_scale, batched.layer))
    fits = size * extents.num_slots <= jnp.iinfo(x.slot_mapping.dtype).max
    if first == {("block",)} and shared and fits:
        slots = x.slot_mapping
        start = jnp.arange(size, dtype=slots.dtype)[:, None] * extents.num_slots
        slots = jnp.where((slots >= 0) & (slots < extents.num_slots), slots + start, -1)
        one = [None if s is None else s[0] for s in (x.k_scale, x.v_scale, x.layer)]
        merged = Operands(
            _merge(x.key[:, : slots.shape[1]]),
            _merge(x.value[:, : slots.shape[1]]),
            tuple(map(_merge, x.caches)),
            slots.reshape(-1),
            *one,
        )
        new = write_p.bind(*merged.flatten(), options=options)
    elif first == {("layer",)} or not options.layout.has_layer:
        new = _loop_over_layers(x, size, extents.num_layers, options)
    else:  # layer, but not in front: the batch cannot be one axis with it
        new = lax.map(lambda item: write_p.bind(*item, options=options), x.flatten())
    return [a.reshape(c.shape) for a, c in zip(new, x.caches, strict=True)], [0] * len(new)


def _loop_over_layers(x: Operands, size: int, num_layers: int | None, options: Options) -> list[Any]:
    """Makes the batch an axis of layers, or one axis with the layers that there are, and writes item by item."""
    layers = num_layers or 1
    own = jnp.full(size, options.layer or 0) if x.layer is None else x.layer[:, 0]
    layer = jnp.where((own >= 0) & (own < layers), jnp.arange(size) * layers + own, -1).astype(jnp.int32)
    options = options._replace(layout=options.layout.with_layer(), layer_traced=True, layer=None)

    def body(i: Any, caches: list[Any]) -> list[Any]:
        k_scale, v_scale = (None if s is None else s[i] for s in (x.k_scale, x.v_scale))
        item = Operands(x.key[i], x.value[i], tuple(caches), x.slot_mapping[i], k_scale, v_scale, layer[i][None])
        return write_p.bind(*item.flatten(), options=options)

    return lax.fori_loop(0, size, body, [c if num_layers is None else _merge(c) for c in x.caches])


def _merge(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])


batching.primitive_batchers[write_p] = _batch


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    raise NotImplementedError(
        "jaxkv.reshape_and_cache_flash is not differentiable: apply jax.lax.stop_gradient to key and value"
    )


ad.primitive_jvps[write_p] = _jvp
