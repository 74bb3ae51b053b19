"""The public function that moves a cache into another one."""

import functools
from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv._arguments import BACKENDS, ArrayLike, as_array, as_indices, as_scale, with_axis
from jaxkv._call import CacheOperands, CacheOptions, spec_of
from jaxkv._primitive import relayout as primitive
from jaxkv._relayout import RelayoutOperands, RelayoutOptions
from kvcore.cache_spec import CacheSpec, check_any_cache
from kvcore.choices import JaxBackend
from kvcore.contract.cache import Cache as DescribedCache
from kvcore.contract.checks import check_backend, check_indices, check_scale_type
from kvcore.contract.relayout import chunk_of
from kvcore.relayout import between, in_one_launch, moves_bits


class Cache(Protocol):
    """What `relayout` needs of a `PagedKVCache`."""

    @property
    def caches(self) -> tuple[jax.Array, ...]:
        """The arrays."""
        ...

    @property
    def spec(self) -> CacheSpec:
        """What they are."""
        ...

    @property
    def _memory(self) -> tuple[jax.Array, ...]:
        """Caches and scale caches."""
        ...

    def _with(self, memory: Sequence[jax.Array]) -> Self:
        """The cache with new ones."""
        ...

    def read(self, slots: Any, *, dtype: Any, layer: Any, backend: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of slots."""
        ...

    def write(self, key: Any, value: Any, slot_mapping: Any, *, layer: Any, backend: Any) -> Any:
        """The cache with keys and values in slots."""
        ...


def relayout[C: Cache](
    source: Cache,
    destination: C,
    pairs: ArrayLike | None = None,
    *,
    requantise: bool | None = None,
    backend: JaxBackend | None = None,
) -> C:
    """Moves what slots of a cache hold into slots of another one, of another layout, block size or format.

    Where formats are the same, the stored bits move, scales of each token and head among them; static scales stay each
    cache's own. Else, or with requantise, keys and values are read, and written as `write` does; on their way they are
    float32 if both are quantised. All layers move. Either is one launch, but latent rows of other formats are read and
    written a chunk of slots at a time.

    A vmap is one call, in place, where blocks are the first axis of all arrays that it maps; else, as with an axis
    layer in front, it is a loop that copies each item's destination once. Where heads are split over devices, both
    caches must be split alike; of a source that all devices have whole, each takes its own heads.

    Args:
        source: A `PagedKVCache`, which stays as it is.
        destination: Another one, with as many layers, heads and elements of a head.
        pairs: `[n, 2]` of int32 or int64: a slot of source and one of destination. Pairs with a slot that does not
            exist are skipped: -1 is for padding. If two pairs have one destination, each element is that of one of the
            two. None: every slot of source, to the slot of the same number.
        requantise: Whether keys and values are read and written although formats are the same: for other static
            scales. None: where formats differ.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernels in their
            interpreter, through a host callback, for tests.

    Returns:
        The new destination: the same memory, where it was donated or is not used again.

    Raises:
        ValueError: an extent, a shape or a choice does not fit, or a cache is split over devices along another axis
            than heads.
        TypeError: a dtype or a type does not fit.
        NotImplementedError: on differentiation.

    Example:
        >>> extents = dict(num_heads=1, head_size=1, dtype="float32")
        >>> old = jaxkv.PagedKVCache.create(num_blocks=4, block_size=2, **extents)
        >>> old = old.write(jnp.arange(8.0).reshape(8, 1, 1), jnp.zeros((8, 1, 1)), jnp.arange(8))
        >>> new = jaxkv.PagedKVCache.create(num_blocks=2, block_size=4, layout="HND", **extents)
        >>> jaxkv.relayout(old, new).caches[0].ravel().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        >>> old.relayout(new, jnp.array([[6, 0], [7, 1], [-1, 5]])).caches[0].ravel().tolist()
        [6.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    check_any_cache(source)
    check_any_cache(destination)
    check_backend(backend, BACKENDS)
    if isinstance(pairs, (list, tuple)) and not pairs:  # whose axis of 2 does not show
        pairs = np.zeros((0, 2), np.int32)
    indices = None if pairs is None else as_indices(pairs)
    bits = moves_bits(source.spec, destination.spec, indices is None, requantise)
    if not bits and not in_one_launch(source.spec, destination.spec):
        return _rewrite(source, destination, indices, backend)
    spec = source.spec
    options = RelayoutOptions(
        _options_of(destination.spec), _options_of(spec), spec.head_size, spec.reading["head_size_v"], backend,
        requantise=not bits,
    )  # fmt: skip
    operands = RelayoutOperands(
        _operands_of(destination, not bits),
        _operands_of(source, not bits),
        indices,
    )
    described = options.describe(operands)
    operands = operands._replace(pairs=None if indices is None else jnp.asarray(indices))
    if not bits:
        operands = operands._replace(
            cache=_with_used_scales(operands.cache, described.destination),
            source=_with_used_scales(operands.source, described.source),
        )
    return destination._with(primitive.relayout(options, operands))


def _options_of(spec: CacheSpec) -> CacheOptions:
    layer = 0 if spec.layout.has_layer else None
    return CacheOptions(spec.kv_cache_dtype, spec.layout, spec.scale_layout, layer)


def _operands_of(cache: Any, scaled: bool = False) -> CacheOperands:
    """A cache's arrays, with its static scales where these count."""
    memory = tuple(jnp.asarray(as_array(array)) for array in cache._memory)
    count = len(cache.caches)
    if not scaled or memory[count:]:
        return CacheOperands(memory[:count], memory[count:], None, None, None)
    for name in ("k_scale", "v_scale"):
        check_scale_type(name, getattr(cache, name))
    return CacheOperands(memory, (), as_scale(cache.k_scale), as_scale(cache.v_scale), None)


def _with_used_scales(operands: CacheOperands, cache: DescribedCache) -> CacheOperands:
    """Static scales as arrays with an axis, and None where the format has no use for them."""
    k_scale, v_scale = (with_axis(scale) if cache.scaled else None for scale in (operands.k_scale, operands.v_scale))
    return operands._replace(k_scale=k_scale, v_scale=v_scale)


# ---- where numbers move, and no kernel does all of it


def _rewrite(source: Any, destination: Any, pairs: Any, backend: Any) -> Any:
    """Reads keys and values of chunks of slots, and writes them."""
    if pairs is None:
        slots = jnp.arange(source.spec.num_blocks * source.spec.block_size, dtype=jnp.int32)
        pairs = jnp.stack([slots, slots], axis=1)
    check_indices("pairs", spec_of(pairs), ("n", 2))
    pairs = jnp.asarray(pairs)
    spec = source.spec
    chunk = chunk_of(spec.num_heads, spec.head_size, spec.head_size_v, pairs.shape[0])
    if 0 in (pairs.shape[0], spec.num_blocks * spec.block_size):
        return destination
    return _rewritten(source, destination, pairs, chunk, backend)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _rewritten(source: Any, destination: Any, pairs: jax.Array, chunk: int, backend: Any) -> Any:
    spec, layers = destination.spec, source.spec.num_layers
    chunks = -(-pairs.shape[0] // chunk)
    pairs = jnp.pad(pairs, ((0, chunks * chunk - pairs.shape[0]), (0, 0)), constant_values=-1)
    exists = (pairs[:, 0] >= 0) & (pairs[:, 0] < source.spec.num_blocks * source.spec.block_size)
    pairs = jnp.where(exists[:, None], pairs, -1).reshape(chunks, chunk, 2)
    latent = spec.layout.latent

    def step(cache: Any, at: jax.Array) -> tuple[Any, None]:
        layer = None if layers is None else at // chunks
        slots = pairs[at % chunks]
        key, value = source.read(slots[:, 0], dtype=between(source.spec, spec), layer=layer, backend=backend)
        if latent:  # kv_c and k_pe
            key, value = key[:, 0, : spec.head_size_v], key[:, 0, spec.head_size_v :]
        return cache.write(key, value, slots[:, 1], layer=layer, backend=backend), None

    return lax.scan(step, destination, jnp.arange((layers or 1) * chunks, dtype=jnp.int32))[0]
