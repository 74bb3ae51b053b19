"""Copies, swaps and zeros of whole blocks, whatever they hold."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv._arguments import BACKENDS, ArrayLike, as_array, as_indices
from jaxkv._blocks import BlocksOperands, BlocksOptions
from jaxkv._call import CacheOperands, CacheOptions, spec_of
from jaxkv._primitive import blocks as primitive
from jaxkv._primitive import swap
from jaxkv._swap import SwapOperands, SwapOptions
from jaxkv._write import as_memories, update
from kvcore.choices import JaxBackend, Layout
from kvcore.contract.blocks import check_blocks
from kvcore.contract.checks import check_options
from kvcore.contract.rope import split_caches
from kvcore.contract.swap import check_swap
from kvcore.layout import CacheLayout


@overload
def copy_blocks(
    caches: Sequence[jax.Ref],
    pairs: ArrayLike,
    *,
    layout: Layout | None = ...,
    scale_layout: str | CacheLayout | None = ...,
    backend: JaxBackend | None = ...,
) -> None: ...
@overload
def copy_blocks(
    caches: Sequence[ArrayLike],
    pairs: ArrayLike,
    *,
    layout: Layout | None = ...,
    scale_layout: str | CacheLayout | None = ...,
    backend: JaxBackend | None = ...,
) -> tuple[jax.Array, ...]: ...
def copy_blocks(
    caches: Sequence[ArrayLike] | Sequence[jax.Ref],
    pairs: ArrayLike,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, ...] | None:
    """Copies blocks of a cache to other blocks of it, bit for bit, and returns the new caches.

    All blocks are read before one is written: after pairs `[[1, 2], [2, 3]]`, block 3 holds what block 2 held, and
    `[[1, 2], [2, 1]]` swaps two. Pairs with a block that does not exist are skipped: -1 is for padding. If two pairs
    have one destination, each element is that of one of the two, unspecified which.

    Arrays with an axis `layer` are copied in all layers. One launch does it all, two from 1,025 pairs on. Where no
    pair writes what another reads, the time comes close to that of a plain copy of the same bytes; chains of pairs are
    slower, as one program copies the same part of all their blocks, one after the other.

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Arrays may be split over devices along any axis but `block`.

    Args:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both, of any dtype of a cache; then
            `k_scale_cache, v_scale_cache` where each token's head has a scale. `jax.Ref`s are updated in place.
        pairs: `[n, 2]` of int32 or int64: source and destination.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD or any other order with `block` in front:
            4 axes, or 5 of a head-major key cache; of one array, 3 or 4.
        scale_layout: Pattern of the scale caches; None means `block slot head`, or `layer block slot head`.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new caches, in the same order; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, an array is split over blocks, or a Ref is passed twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> caches = jnp.arange(8.0).reshape(2, 4, 1, 1, 1)  # K and V: 4 blocks of 1 slot, 1 head of 1 element
        >>> key_cache, value_cache = jaxkv.copy_blocks(tuple(caches), jnp.array([[1, 2], [2, 3], [-1, 0]]))
        >>> key_cache.ravel().tolist(), value_cache.ravel().tolist()
        ([0.0, 1.0, 1.0, 2.0], [4.0, 5.0, 5.0, 6.0])

    After `copy_blocks` of vLLM.
    """
    return _move(primitive.copy_blocks, "pairs", pairs, caches, layout, scale_layout, backend)


@overload
def zero_blocks(
    caches: Sequence[jax.Ref],
    blocks: ArrayLike,
    *,
    layout: Layout | None = ...,
    scale_layout: str | CacheLayout | None = ...,
    backend: JaxBackend | None = ...,
) -> None: ...
@overload
def zero_blocks(
    caches: Sequence[ArrayLike],
    blocks: ArrayLike,
    *,
    layout: Layout | None = ...,
    scale_layout: str | CacheLayout | None = ...,
    backend: JaxBackend | None = ...,
) -> tuple[jax.Array, ...]: ...
def zero_blocks(
    caches: Sequence[ArrayLike] | Sequence[jax.Ref],
    blocks: ArrayLike,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, ...] | None:
    """Fills blocks of a cache with zero bytes, which are zeros in every format, and returns the new caches.

    Blocks that do not exist are skipped: -1 is for padding. Arrays with an axis `layer` are filled in all layers, by
    one launch.

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Arrays may be split over devices along any axis but `block`.

    Args:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both, of any dtype of a cache; then
            `k_scale_cache, v_scale_cache` where each token's head has a scale. `jax.Ref`s are updated in place.
        blocks: `[n]` of int32 or int64.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD or any other order with `block` in front:
            4 axes, or 5 of a head-major key cache; of one array, 3 or 4.
        scale_layout: Pattern of the scale caches; None means `block slot head`, or `layer block slot head`.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new caches, in the same order; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, an array is split over blocks, or a Ref is passed twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> kv_cache = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1)  # 4 blocks of 1 slot, 1 head of 1 element
        >>> (kv_cache,) = jaxkv.zero_blocks((kv_cache,), jnp.array([2, -1]))
        >>> kv_cache.ravel().tolist()
        [1.0, 2.0, 0.0, 4.0]
    """
    return _move(primitive.zero_blocks, "blocks", blocks, caches, layout, scale_layout, backend)


@overload
def swap_blocks(
    source: Sequence[ArrayLike],
    destination: Sequence[jax.Ref],
    pairs: ArrayLike,
    *,
    layout: Layout | None = ...,
    scale_layout: str | CacheLayout | None = ...,
    backend: JaxBackend | None = ...,
) -> None: ...
@overload
def swap_blocks(
    source: Sequence[ArrayLike],
    destination: Sequence[ArrayLike],
    pairs: ArrayLike,
    *,
    layout: Layout | None = ...,
    scale_layout: str | CacheLayout | None = ...,
    backend: JaxBackend | None = ...,
) -> tuple[jax.Array, ...]: ...
def swap_blocks(
    source: Sequence[ArrayLike],
    destination: Sequence[ArrayLike] | Sequence[jax.Ref],
    pairs: ArrayLike,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, ...] | None:
    """Copies blocks of a cache to blocks of another one, to the host's memory or from it, and returns the new arrays.

    One of the two has memory kind "pinned_host", the other one "device". Both may be on one device, too: where they are
    says which way blocks go. They have the same layout and format, and any numbers of blocks. Pairs with a block that
    does not exist are skipped: -1 is for padding. If two pairs have one destination, each element is that of one of the
    two, unspecified which.

    Arrays with an axis `layer` are copied in all layers. On a GPU one launch does it all, wherever the blocks are: the
    kernel loads from pinned memory, or stores there, by the bus. Elsewhere blocks are sliced and updated one by one.

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Arrays may be split over devices along any axis but `block`. Source is split
    as destination is.

    Args:
        source: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both, of any dtype of a cache; then
            `k_scale_cache, v_scale_cache` where each token's head has a scale. It stays as it is.
        destination: As many arrays, of the same dtypes and shapes but for the axis `block`. `jax.Ref`s are updated in
            place.
        pairs: `[n, 2]` of int32 or int64: a block of source and one of destination.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD or any other order with `block` in front:
            4 axes, or 5 of a head-major key cache; of one array, 3 or 4.
        scale_layout: Pattern of the scale caches; None means `block slot head`, or `layer block slot head`.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new destination, in the same order and memory; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, an array is split over blocks, or a Ref is passed twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> cache = jnp.arange(4.0).reshape(4, 1, 1, 1)  # 4 blocks of 1 slot, 1 head of 1 element
        >>> host = jax.device_put(jnp.zeros((2, 1, 1, 1)), cache.sharding.with_memory_kind("pinned_host"))
        >>> (host,) = jaxkv.swap_blocks((cache,), (host,), jnp.array([[3, 0], [1, 1], [-1, 0]]))
        >>> host.ravel().tolist(), host.sharding.memory_kind
        ([3.0, 1.0], 'pinned_host')

    After `swap_blocks` of vLLM.
    """
    check_options("auto", None, None, None, backend, BACKENDS)
    read = split_caches(source if isinstance(source, Sequence) else (source,), "source")
    written = split_caches(destination if isinstance(destination, Sequence) else (destination,), "destination")
    pairs = as_pairs(pairs)
    old, memory = tuple(map(as_array, (*read[0], *read[1]))), as_memories(*written)
    ours, theirs = (
        ([spec_of(a) for a in arrays[: len(sides[0])]], [spec_of(a) for a in arrays[len(sides[0]) :]])
        for arrays, sides in ((old, read), (memory, written))
    )
    described = check_swap(spec_of(pairs), ours, theirs, layout, scale_layout)
    options = SwapOptions(CacheOptions("auto", described.layout, described.scale_layout, layer=None), backend)
    none = CacheOperands((), (), None, None, None)
    of_source = CacheOperands(old[: len(read[0])], old[len(read[0]) :], None, None, None)
    operands = SwapOperands(none, of_source, pairs)
    return update(swap.swap_blocks, options, memory, jax.tree.map(jnp.asarray, operands), None)[1]


def as_pairs(pairs: Any) -> Any:
    """Pairs as an array. Of an empty list, the axis of 2 does not show."""
    if isinstance(pairs, (list, tuple)) and not pairs:
        return np.zeros((0, 2), np.int32)
    return as_indices(pairs)


def _move(
    op: Callable[[Any, Any], list[jax.Array]],
    name: str,
    indices: Any,
    caches: Any,
    layout: Any,
    scale_layout: Any,
    backend: str | None,
) -> tuple[jax.Array, ...] | None:
    """Checks a call, whose indices have this name, and carries it out."""
    check_options("auto", None, None, None, backend, BACKENDS)
    arrays, scale_caches = split_caches(caches if isinstance(caches, Sequence) else (caches,))
    indices = as_pairs(indices) if name == "pairs" else as_indices(indices)
    memory = as_memories(arrays, scale_caches)
    specs = [spec_of(array) for array in memory]
    described = check_blocks(name, spec_of(indices), specs[: len(arrays)], specs[len(arrays) :], layout, scale_layout)
    options = BlocksOptions(CacheOptions("auto", described.layout, described.scale_layout, layer=None), backend)
    operands = BlocksOperands(CacheOperands((), (), None, None, None), None, None)
    operands = operands._replace(**{name: jnp.asarray(indices)})
    return update(op, options, memory, operands, None)[1]
