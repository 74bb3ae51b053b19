"""Reading as JAX primitives: attention and gather, lowered by platform, split over heads, batched.

As `_primitive.py`: `read_p` is what users bind; where several devices share the work it lowers to a custom
partitioning, which gives each device a `local_p` for its own heads. Both ops are one primitive; `Options.op` tells.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import dispatch  # private, as in _primitive.py
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv._primitive.write import (
    PLATFORMS,
    arrays_of,
    backend_on,
    check_concrete,
    check_static,
    compute_capability,
    explicit_axes,
    heads_in_regions,
    heads_split,
    make_primitive,
    refusals,
    spec_of,
    spell,
    split_heads,
    split_scale,
    vary,
    varying_axes,
)
from jaxkv._triton import interpret as _interpret
from jaxkv._xla import read as _xla_read
from kvcore.arrays import array_names
from kvcore.contract import read as read_contract
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import Attention, Gather, check_attention, check_gather
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis


class Operands(NamedTuple):
    """Arrays of a call, by name: a pytree. layer has shape (1,); scales have that or `(num_heads,)`, or are caches."""

    query: Any | None  # None: a gather
    caches: tuple[Any, ...]
    block_tables: Any
    seq_lens: Any
    query_start_loc: Any | None
    sinks: Any | None
    k_scale: Any | None
    v_scale: Any | None
    layer: Any | None


class Options(NamedTuple):
    """The static half of a call, free of the shapes that change under sharding and batching."""

    kv_cache_dtype: str
    layout: CacheLayout
    scale_layout: CacheLayout | None  # of scale caches, where k_scale and v_scale are such
    layer: int | None
    head_size: int | None
    head_size_v: int | None
    backend: str | None
    attention: read_contract.AttentionOptions | None = None  # None: a gather
    max_len: int = 0
    dtype: str | None = None
    compute_capability: int | None = None

    @property
    def arrays(self) -> list[Sequence[Axis]]:
        """Axes of caches, then of scale caches."""
        return arrays_of(self.layout, self.scale_layout)

    @property
    def op(self) -> str:
        """Name of the function that computes it."""
        return "gather" if self.attention is None else "attention"


def read(options: Options, operands: Operands) -> list[Any]:
    """Binds the primitive. Inside shard_map, operands become varying where any of them is."""
    if explicit_axes(operands.caches[0])[1]:
        return _read_explicit(options, operands)
    scales = () if options.scale_layout is None else (operands.k_scale, operands.v_scale)
    check_concrete(options, (*operands.caches, *scales))
    flat, tree = jax.tree.flatten(operands)
    varying = frozenset().union(*map(varying_axes, flat))
    return read_p.bind(*(vary(x, varying) for x in flat), tree=tree, options=options)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # as in _primitive.py
def _read_explicit(options: Options, operands: Operands) -> list[Any]:
    """Where shardings are part of types they are known here, so each device gets its heads here."""
    mesh, explicit = explicit_axes(operands.caches[0])
    in_specs, out_specs = _specs(options, jax.tree.map(lambda x: jax.typeof(x).sharding.spec, operands), operands)
    local = jax.shard_map(
        functools.partial(read, options), mesh=mesh, axis_names=explicit, in_specs=(in_specs,), out_specs=out_specs
    )
    return local(jax.tree.map(lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s)), operands, in_specs))


def describe(options: Options, operands: Operands) -> Any:
    """The contract's description of a call, for the shapes at hand: an `Attention` or a `Gather`."""
    specs: Any = jax.tree.map(spec_of, operands)
    cache = CacheArguments(
        caches=specs.caches,
        kv_cache_dtype=options.kv_cache_dtype,
        k_scale=specs.k_scale,
        v_scale=specs.v_scale,
        layout=options.layout,
        layer=options.layer if specs.layer is None else specs.layer,
        scale_layout=options.scale_layout,
    )
    if options.attention is None:
        return check_gather(
            specs.block_tables, specs.seq_lens, options.max_len, options.dtype, cache, options.head_size,
            options.head_size_v,
        )  # fmt: skip
    return check_attention(
        specs.query, specs.block_tables, specs.seq_lens, specs.query_start_loc, specs.sinks, options.attention, cache,
        options.head_size_v,
    )  # fmt: skip


def results(call: Attention | Gather, query_dtype: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each result."""
    if isinstance(call, Gather):
        return [(shape, jnp.dtype(call.format.name)) for shape in call.shapes]
    return [(call.out_shape, query_dtype), (call.out_shape[:2], jnp.dtype("float32"))]


def _abstract(*avals: Any, tree: Any, options: Options) -> list[Any]:
    operands = jax.tree.unflatten(tree, avals)
    dtype = None if operands.query is None else operands.query.dtype
    cache = operands.caches[0]

    def aval(shape: tuple[int, ...], dtype: Any) -> Any:
        sharding = cache.sharding.update(spec=P(*(None,) * len(shape)))
        return cache.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)

    return [aval(*result) for result in results(describe(options, operands), dtype)]


local_p = make_primitive("paged_read_local", _abstract)
read_p = make_primitive("paged_read", _abstract)


# ---- one device


def _lower_local(platform: str) -> Any:
    def implementation(*flat: Any, tree: Any, options: Options) -> list[Any]:
        operands = jax.tree.unflatten(tree, flat)
        call = describe(options, operands)
        backend = backend_on(platform, options.backend)
        if backend != "xla":
            names = array_names(len(operands.caches))
            check_static(platform, operands._replace(caches=dict(zip(names, operands.caches, strict=True))))
        if backend == "triton":
            from jaxkv._triton import read as _triton_read  # imports Triton, which only GPUs need

            target = platform, options.compute_capability
            return list(getattr(_triton_read, options.op)(call, operands, options.layer, *target))
        if backend == "interpret":
            return list(getattr(_interpret, options.op)(call, operands, options.layer))
        return list(getattr(_xla_read, options.op)(call, operands, options.layer, options.scale_layout))

    return mlir.lower_fun(implementation, multiple_results=True)


for _platform in PLATFORMS:
    mlir.register_lowering(local_p, _lower_local(_platform), platform=_platform)


# ---- several devices


def _lower_read(ctx: Any, *values: Any, tree: Any, options: Options) -> Any:
    options = options._replace(compute_capability=compute_capability(ctx.module_context.axis_context))
    partitioned = _partitioned(options, tree, ctx.avals_in)
    return mlir.lower_fun(lambda *flat: list(partitioned(*flat)), multiple_results=True)(ctx, *values)


dispatch.prim_requires_devices_during_lowering.add(read_p)
mlir.register_lowering(read_p, _lower_read)


def _partitioned(options: Options, tree: Any, avals: Sequence[Any]) -> Any:
    """The read as a function that XLA's partitioner splits by heads."""

    def local(*flat: Any) -> tuple[Any, ...]:
        return tuple(local_p.bind(*flat, tree=tree, options=options))

    @refusals
    def partition(mesh: Any, args: Any, found: Any) -> Any:
        given = jax.tree.unflatten(tree, args)
        if not all(isinstance(c.sharding, NamedSharding) for c in given.caches):  # within a partly manual shard_map
            return mesh, local, tuple(r.sharding for r in found), tuple(a.sharding for a in args)
        in_specs, out_specs = _specs(options, jax.tree.map(lambda a: a.sharding.spec, given), given)
        ins, outs = (
            tuple(NamedSharding(mesh, s) for s in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)))
            for specs in (in_specs, out_specs)
        )
        return mesh, local, outs, ins

    partitioned = custom_partitioning(local)
    rule, sizes = _sharding_rule(options, jax.tree.unflatten(tree, avals))
    more: dict[str, Any] = sizes
    partitioned.def_partition(partition, sharding_rule=rule, **more)
    return partitioned


def _specs(options: Options, specs: Operands, operands: Operands) -> tuple[Operands, list[P]]:
    """Specs of operands and results, given those that operands have."""
    scales: Any = () if options.scale_layout is None else (specs.k_scale, specs.v_scale)
    heads = heads_split(options.kv_cache_dtype, options.layout, options.arrays, (*specs.caches, *scales))
    replicated: Any = jax.tree.map(lambda x: P(*(None,) * len(x.shape)), operands)
    caches, k_scale, v_scale = _split(options, operands, heads)
    ins = replicated._replace(caches=caches, k_scale=k_scale, v_scale=v_scale)
    if heads is None and specs.query is not None and _num_heads(options, operands) == 1:
        # One KV head for all query heads: every device has it, and takes query heads of its own.
        heads = (*specs.query, None, None)[1]
    if options.attention is None:
        return ins, [P(None, None, heads, None)] * 2
    if operands.sinks is not None:
        ins = ins._replace(sinks=P(heads))
    return ins._replace(query=P(None, heads, None)), [P(None, heads, None), P(None, heads)]


def _split(options: Options, operands: Operands, heads: Any) -> tuple[tuple[P, ...], P | None, P | None]:
    """Specs of caches, k_scale and v_scale with heads split over mesh axes, and nothing else."""
    count = len(operands.caches)
    memory = [split_heads(axes, heads) for axes in options.arrays]
    if options.scale_layout is not None:
        return tuple(memory[:count]), memory[count], memory[count + 1]
    return tuple(memory), split_scale(operands.k_scale, heads), split_scale(operands.v_scale, heads)


def _num_heads(options: Options, operands: Operands) -> int:
    """KV heads of the caches."""
    return describe(options, operands).cache.extents.num_heads


def _sharding_rule(options: Options, operands: Operands) -> tuple[str, dict[str, int]]:
    """How shardings spread: by KV heads h, each with g query heads; every other axis is on its own."""
    heads = _num_heads(options, operands)
    shared = None if heads_in_regions(options.kv_cache_dtype, options.layout) and heads > 1 else "h"
    # A factor that shares an axis with another may not have size 1, and is given its size if it is nowhere alone.
    names: dict[Axis, str | None] = {("head",): shared}
    if heads > 1:
        names["head", "kv"] = shared and "(h c)"
    caches = tuple(P(*map(names.get, axes)) for axes in options.layout.arrays)
    _, k_scale, v_scale = _split(options, operands, shared)
    arrays = [spec for spec in (*caches, k_scale, v_scale) if spec is not None]
    sizes = {"c": 2} if any("(h c)" in spec for spec in arrays) else {}
    replicated: Any = jax.tree.map(lambda x: P(*(None,) * len(x.shape)), operands)
    specs = replicated._replace(caches=caches, k_scale=k_scale, v_scale=v_scale)
    if options.attention is None:
        outs = [P(None, None, shared, None)] * 2
    else:
        group = operands.query.shape[1] // heads  # type: ignore[union-attr]
        query = shared if group == 1 or shared is None else "q" if heads == 1 else "(h g)"
        if query == "(h g)":
            sizes |= {"g": group} | ({} if any("h" in spec for spec in arrays) else {"h": heads})
        outs = [P(None, query, None), P(None, query)]
        specs = specs._replace(query=outs[0], sinks=None if operands.sinks is None else P(query))
    ins, results = spell((specs, outs))
    return f"{', '.join(jax.tree.leaves(ins))} -> {', '.join(results)}", sizes


# ---- transformations


def _batch(flat: Sequence[Any], dims: Sequence[Any], *, tree: Any, options: Options) -> tuple[list[Any], list[int]]:
    """vmap: a loop over the batch. What is shared is not copied."""
    out = _read_batch(tuple(flat), tuple(dims), tree, options)
    return out, [0] * len(out)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)  # as in _primitive.py
def _read_batch(flat: tuple[Any, ...], dims: tuple[Any, ...], tree: Any, options: Options) -> list[Any]:
    mapped = [isinstance(d, int) for d in dims]
    size = next(x.shape[d] for x, d in zip(flat, dims, strict=True) if isinstance(d, int))
    items = [batching.bdim_at_front(x, d, size) for x, d, m in zip(flat, dims, mapped, strict=True) if m]

    def one(item: Sequence[Any]) -> list[Any]:
        rest = list(item)
        return read_p.bind(
            *(rest.pop(0) if m else x for x, m in zip(flat, mapped, strict=True)), tree=tree, options=options
        )

    return lax.map(one, items)


batching.primitive_batchers[read_p] = _batch


def _jvp(primals: Any, tangents: Any, *, options: Options, **params: Any) -> Any:
    name = "gather_kv" if options.attention is None else "paged_attention"
    raise NotImplementedError(f"jaxkv.{name} is not differentiable: apply jax.lax.stop_gradient to its arguments")


ad.primitive_jvps[read_p] = _jvp
