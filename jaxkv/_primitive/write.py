"""The write as a JAX primitive: lowering by platform, sharding, batching.

Two primitives. `write_p` is what users bind. Where several devices share the work it lowers to a custom partitioning,
which gives each device a `local_p` for its own heads; without that, XLA would gather the caches. `local_p` lowers
to the Triton kernel or to XLA, whichever the platform has.

Operands are those of `Operands`. Results: all arrays that are written, caches and scale caches, as they are then.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import (
    compiler,  # private: only its handlers of errors see those of a partitioning
    dispatch,  # private: a lowering that emits custom_partitioning has to say that it needs devices
)
from jax.core import Tracer
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv._triton import interpret as _interpret
from jaxkv._xla import write as _xla
from kvcore.arrays import ArraySpec, array_names
from kvcore.contract.cache import CacheArguments
from kvcore.contract.checks import no_triton_error
from kvcore.contract.write import Write, check_write
from kvcore.formats import NVFP4
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis
from kvcore.scales import region_start


class Options(NamedTuple):
    """The static half of a call, free of shapes: those change under sharding and batching."""

    kv_cache_dtype: str
    layout: CacheLayout
    scale_layout: CacheLayout | None  # of scale caches, where there are any
    layer: int | None
    backend: str | None
    compute_capability: int | None = None

    @property
    def arrays(self) -> list[Sequence[Axis]]:
        """Axes of each array that is written."""
        return arrays_of(self.layout, self.scale_layout)


class Operands(NamedTuple):
    """Arrays of a call, by name: a pytree. layer has shape (1,), scales that or one element a head."""

    key: Any
    value: Any
    memory: tuple[Any, ...]  # caches, then scale caches: what is written
    slot_mapping: Any
    k_scale: Any | None
    v_scale: Any | None
    layer: Any | None


def arrays_of(layout: CacheLayout, scale_layout: CacheLayout | None) -> list[Sequence[Axis]]:
    """Axes of caches, then of scale caches. The latter lack the last one of their layout."""
    return [*layout.arrays, *(axes[:-1] for axes in (() if scale_layout is None else scale_layout.arrays))]


def write(options: Options, operands: Operands) -> list[Any]:
    """Binds the primitive. Inside shard_map, operands become varying where any of them is."""
    if explicit_axes(operands.memory[0])[1]:
        return _write_explicit(options, operands)
    check_concrete(options, operands.memory)
    flat, tree = jax.tree.flatten(operands)
    varying = frozenset().union(*map(varying_axes, flat))
    return write_p.bind(*(vary(x, varying) for x in flat), tree=tree, options=options)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # an eager shard_map of a function made here: anew each time
def _write_explicit(options: Options, operands: Operands) -> list[Any]:
    """The write where shardings are part of types: they are known here, so each device gets its heads here."""
    mesh, explicit = explicit_axes(operands.memory[0])
    specs = _specs(options, [jax.typeof(a).sharding.spec for a in operands.memory], operands)
    local = jax.shard_map(
        lambda shards: tuple(write(options, shards)),
        mesh=mesh,
        axis_names=explicit,
        in_specs=(specs,),
        out_specs=specs.memory,
    )
    return list(local(jax.tree.map(lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)), operands, specs)))


def check_concrete(options: Any, arrays: Sequence[Any]) -> None:
    """Raises, before anything is compiled, if caches and scale caches are split in a way that no op can use.

    Within jit, XLA's partitioner is the first to know how they are: see `refusals`.
    """
    if any(isinstance(a, Tracer) or not isinstance(a.sharding, NamedSharding) for a in arrays):
        return
    specs = [used_spec(a.sharding) for a in arrays]
    heads_split(options.kv_cache_dtype, options.layout, options.arrays, specs)


def used_spec(sharding: NamedSharding) -> P:
    """The spec of a sharding without mesh axes of size 1, over which nothing is split."""

    def used(axes: Any) -> Any:
        kept = tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if sharding.mesh.shape[a] > 1)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*(None if axes is None else used(axes) for axes in sharding.spec))


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
    specs: Any = jax.tree.map(spec_of, operands)
    num_caches = len(options.layout.arrays)
    cache = CacheArguments(
        caches=specs.memory[:num_caches],
        kv_cache_dtype=options.kv_cache_dtype,
        k_scale=specs.k_scale,
        v_scale=specs.v_scale,
        layout=options.layout,
        layer=options.layer if specs.layer is None else specs.layer,
        scale_caches=specs.memory[num_caches:],
        scale_layout=options.scale_layout,
    )
    return check_write(specs.key, specs.value, specs.slot_mapping, cache)


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


def _abstract(*avals: Any, tree: Any, options: Options) -> list[Any]:
    return list(jax.tree.unflatten(tree, avals).memory)


local_p = make_primitive("reshape_and_cache_local", _abstract)
write_p = make_primitive("reshape_and_cache", _abstract)


# ---- one device


def _lower_local(platform: str) -> Any:
    def implementation(*flat: Any, tree: Any, options: Options) -> list[Any]:
        operands = jax.tree.unflatten(tree, flat)
        call = describe(options, operands)
        backend = backend_on(platform, options.backend)
        if backend == "xla":
            return _xla.write(call, operands, options.layer, options.scale_layout)
        num_caches = len(options.layout.arrays)
        names = array_names(num_caches, len(operands.memory) - num_caches)
        check_static(platform, operands._replace(memory=dict(zip(names, operands.memory, strict=True))))
        if backend == "interpret":
            return _interpret.write(call, operands, options.layer)
        from jaxkv._triton import write as _triton  # imports Triton, which only GPUs need

        return _triton.write(call, operands, options.layer, platform, options.compute_capability)

    return mlir.lower_fun(implementation, multiple_results=True)


PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


def backend_on(platform: str, backend: str | None) -> str:
    """The backend that is meant on a platform; an error if it cannot run there."""
    gpu = platform in ("cuda", "rocm")
    if backend == "triton" and not gpu:
        raise no_triton_error(platform)
    return backend or ("triton" if gpu else "xla")


def check_static(platform: str, operands: Any) -> None:
    """Raises where jax.export leaves sizes open: grids and strides of a kernel are numbers."""
    for path, x in jax.tree_util.tree_leaves_with_path(operands):
        if not all(isinstance(size, int) for size in x.shape):
            name = jax.tree_util.keystr(path[-1:], simple=True)
            raise ValueError(
                f"{name} must have a static shape on {platform}, where kernels depend on it, got {x.shape}"
            )


for _platform in PLATFORMS:
    mlir.register_lowering(local_p, _lower_local(_platform), platform=_platform)


# ---- several devices


def _lower_write(ctx: Any, *values: Any, tree: Any, options: Options) -> Any:
    options = options._replace(compute_capability=compute_capability(ctx.module_context.axis_context))
    partitioned = _partitioned(options, tree, ctx.avals_in)
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


_refused: set[str] = set()


def refusals(partition: Any) -> Any:
    """Its ValueErrors leave the compiler as such: XLA would hide what they say in the middle of a traceback."""

    @functools.wraps(partition)
    def remembered(*args: Any) -> Any:
        try:
            return partition(*args)
        except ValueError as error:
            _refused.add(str(error))
            raise

    return remembered


def _refusal(error: Exception) -> ValueError | None:
    text = str(error)
    return next((ValueError(refused) for refused in _refused if refused in text), None)


compiler.register_xla_runtime_error_handler(_refusal)


def _partitioned(options: Options, tree: Any, avals: Sequence[Any]) -> Any:
    """The write as a function that XLA's partitioner splits by heads."""

    def local(*flat: Any) -> tuple[Any, ...]:
        return tuple(local_p.bind(*flat, tree=tree, options=options))

    @refusals
    def partition(mesh: Any, args: Any, results: Any) -> Any:
        del results
        given = jax.tree.unflatten(tree, args)
        if not all(isinstance(a.sharding, NamedSharding) for a in given.memory):  # within a partly manual shard_map
            return mesh, local, tuple(a.sharding for a in given.memory), tuple(a.sharding for a in args)
        specs = _specs(options, [a.sharding.spec for a in given.memory], given)
        operands, memory = (
            tuple(NamedSharding(mesh, s) for s in jax.tree.leaves(part, is_leaf=lambda s: isinstance(s, P)))
            for part in (specs, specs.memory)
        )
        return mesh, local, memory, operands

    partitioned = custom_partitioning(local)
    rule = _sharding_rule(options, jax.tree.unflatten(tree, avals))
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned


def _specs(options: Options, memory: Sequence[P], operands: Operands) -> Operands:
    """Specs of all operands, given those of the arrays that are written, whose results have the same ones."""
    return _split(options, operands, heads_split(options.kv_cache_dtype, options.layout, options.arrays, memory))


def _split(options: Options, operands: Operands, heads: Any) -> Operands:
    """Specs of all operands with heads split over mesh axes, and nothing else."""
    replicated: Any = jax.tree.map(lambda x: P(*(None,) * len(x.shape)), operands)
    return replicated._replace(
        key=P(None, heads, None),
        value=P(None, heads, None),
        memory=tuple(split_heads(axes, heads) for axes in options.arrays),
        k_scale=split_scale(operands.k_scale, heads),
        v_scale=split_scale(operands.v_scale, heads),
    )


def split_heads(axes: Sequence[Axis], heads: Any) -> P:
    """The spec of an array with its heads split over mesh axes."""
    return P(*(heads if "head" in axis else None for axis in axes))


def split_scale(scale: Any | None, heads: Any) -> P | None:
    """The spec of a static scale: where each head has one, they are split with the heads."""
    return None if scale is None else P(heads if scale.shape[0] > 1 else None)


def heads_split(kv_cache_dtype: str, layout: CacheLayout, arrays: Sequence[Sequence[Axis]], specs: Sequence[P]) -> Any:
    """The mesh axes over which the heads of caches are split; an error if anything else is.

    Args:
        kv_cache_dtype: What caches hold.
        layout: Of the caches.
        arrays: Axes of caches, then of scale caches, which follow the caches.
        specs: How the arrays are split.
    """
    splits = [_head_split(axes, spec) for axes, spec in zip(arrays, specs, strict=True)][: len(layout.arrays)]
    if len({str(split) for split in splits}) > 1:
        raise ValueError(f"key_cache and value_cache must be split alike over heads, got {splits[0]} and {splits[1]}")
    if splits[0] is not None and heads_in_regions(kv_cache_dtype, layout):
        raise ValueError(
            f"a cache of nvfp4 may be split over heads only where its layout has them before block, as in "
            f"'head block slot dim', got '{layout}' split over {splits[0]}; jax.shard_map can give each device a cache "
            "of its own heads"
        )
    return splits[0]


def heads_in_regions(kv_cache_dtype: str, layout: CacheLayout) -> bool:
    """Whether the cache's regions have elements of all heads, then scales of all: none of its parts has some heads."""
    regions = (axes[region_start(axes) :] for axes in layout.arrays if kv_cache_dtype == NVFP4.name)
    return any("head" in axis for region in regions for axis in region)


def split_axes(axes: Sequence[Axis], spec: P) -> dict[str, Any]:
    """The mesh axes over which heads, blocks and layers of a cache are split, by name.

    Raises:
        ValueError: anything else is; then no device has whole rows of a head, which even `jax.shard_map` needs.
    """
    split = {}
    for axis, mesh_axes in _split_over(axes, spec):
        if axis[0] not in ("head", "block", "layer"):  # of a joined (kv head), devices would get K or V
            raise ValueError(
                f"a cache may be split over heads, blocks and layers only, got axis {' '.join(axis)} split over "
                f"{mesh_axes}"
            )
        split[axis[0]] = mesh_axes
    return split


def _split_over(axes: Sequence[Axis], spec: P) -> list[tuple[Axis, Any]]:
    """Axes that are split, each with the mesh axes."""
    padded = (*spec, *(None,) * (len(axes) - len(spec)))
    return [(axis, mesh_axes) for axis, mesh_axes in zip(axes, padded, strict=True) if mesh_axes is not None]


def _head_split(axes: Sequence[Axis], spec: P) -> Any:
    """The mesh axes over which the heads of an array are split; an error if anything else is."""
    split = None
    for axis, mesh_axes in _split_over(axes, spec):
        if axis[0] != "head":  # of a joined (kv head), devices would get K or V
            raise ValueError(
                f"a cache may be split over heads only, got axis {' '.join(axis)} split over {mesh_axes}; "
                "jax.shard_map can give each device blocks of its own"
            )
        split = mesh_axes
    return split


def _sharding_rule(options: Options, operands: Operands) -> str:
    """How shardings spread: heads are shared by all operands with that axis, every other axis is on its own."""
    caches, heads = options.layout.arrays, None if heads_in_regions(options.kv_cache_dtype, options.layout) else "h"
    # A joined axis has twice as many entries as there are heads: nothing else can share it.
    joined = any(len(axis) > 1 and "head" in axis for axes in caches for axis in axes)
    specs = _split(options, operands, None if joined else heads)
    memory = *(split_heads(axes, heads) for axes in caches), *specs.memory[len(caches) :]
    spelled = spell(specs._replace(memory=memory))
    return f"{', '.join(jax.tree.leaves(spelled))} -> {', '.join(spelled.memory)}"


def spell(specs: Any) -> Any:
    """Specs that name factors, as sharding rules spell them. Each None is a factor of its own."""
    fresh = (f"i{n}" for n in range(1000))

    def one(spec: P) -> str:
        return " ".join(factor or next(fresh) for factor in spec)

    return jax.tree.map(one, specs, is_leaf=lambda x: isinstance(x, P))


# ---- transformations


def _batch(flat: Sequence[Any], dims: Sequence[Any], *, tree: Any, options: Options) -> tuple[list[Any], list[int]]:
    """vmap: one write where the batch can be folded into blocks, else a loop over it; in place either way."""
    new = _write_batch(tuple(flat), tuple(dims), tree, options)
    return new, [0] * len(new)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)  # an eager loop would be compiled anew each time
def _write_batch(flat: tuple[Any, ...], dims: tuple[Any, ...], tree: Any, options: Options) -> list[Any]:
    size = next(x.shape[d] for x, d in zip(flat, dims, strict=True) if isinstance(d, int))
    mapped: Any = jax.tree.unflatten(tree, [isinstance(d, int) for d in dims])
    x: Any = jax.tree.unflatten(tree, [batching.bdim_at_front(a, d, size) for a, d in zip(flat, dims, strict=True)])
    first = {axes[0] for axes in options.arrays}
    item = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)
    extents = describe(options, item).placement.extents
    shared = not (mapped.k_scale or mapped.v_scale or mapped.layer)
    fits = size * extents.num_slots <= jnp.iinfo(x.slot_mapping.dtype).max
    if first == {("block",)} and shared and fits:
        slots = x.slot_mapping
        start = jnp.arange(size, dtype=slots.dtype)[:, None] * extents.num_slots
        slots = jnp.where((slots >= 0) & (slots < extents.num_slots), slots + start, -1)
        one = [None if s is None else s[0] for s in (x.k_scale, x.v_scale, x.layer)]
        merged = Operands(
            _merge(x.key[:, : slots.shape[1]]),
            _merge(x.value[:, : slots.shape[1]]),
            tuple(map(_merge, x.memory)),
            slots.reshape(-1),
            *one,
        )
        new = _bind(merged, options)
    elif first == {("layer",)} or not options.layout.has_layer:
        new = _loop_over_layers(x, size, extents.num_layers, options)
    else:  # layer, but not in front: the batch cannot be one axis with it
        new = lax.map(lambda item: _bind(item, options), x)
    return [a.reshape(c.shape) for a, c in zip(new, x.memory, strict=True)]


def _loop_over_layers(x: Operands, size: int, num_layers: int | None, options: Options) -> list[Any]:
    """Makes the batch an axis of layers, or one axis with the layers that there are, and writes item by item."""
    layers = num_layers or 1
    own = jnp.full(size, options.layer or 0, jnp.int32) if x.layer is None else x.layer[:, 0]
    layer = jnp.where((own >= 0) & (own < layers), jnp.arange(size, dtype=own.dtype) * layers + own, -1)
    layer = layer.astype(jnp.int32)
    scale_layout = None if options.scale_layout is None else options.scale_layout.with_layer()
    options = options._replace(layout=options.layout.with_layer(), scale_layout=scale_layout, layer=None)

    def body(i: Any, memory: list[Any]) -> list[Any]:
        item = jax.tree.map(lambda a: a[i], x._replace(memory=(), layer=None))
        return _bind(item._replace(memory=tuple(memory), layer=layer[i][None]), options)

    return lax.fori_loop(0, size, body, [a if num_layers is None else _merge(a) for a in x.memory])


def _bind(operands: Operands, options: Options) -> list[Any]:
    flat, tree = jax.tree.flatten(operands)
    return write_p.bind(*flat, tree=tree, options=options)


def _merge(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])


batching.primitive_batchers[write_p] = _batch


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    raise NotImplementedError(
        "jaxkv.reshape_and_cache_flash is not differentiable: apply jax.lax.stop_gradient to key and value"
    )


ad.primitive_jvps[write_p] = _jvp
