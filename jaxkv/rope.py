"""The writer that rotates queries and keys on their way."""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv._arguments import (
    BACKENDS,
    ArrayLike,
    Index,
    Scale,
    TokenRows,
    as_array,
    as_indices,
    as_layer,
    as_rows,
    as_scale,
    as_static,
)
from jaxkv._call import spec_of
from jaxkv._primitive.rope import rope_and_cache as bind_rope
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._views import as_head
from jaxkv._write import as_memories, cache_arguments, cache_of, update
from kvcore.choices import JaxBackend, KVCacheDtype, Layout, RopeName
from kvcore.contract.checks import check_options
from kvcore.contract.rope import RopeOptions, check_positions, check_rope, check_rope_options, split_caches
from kvcore.layout import CacheLayout


class RopeKeywords(TypedDict, total=False):
    """Keywords of `PagedKVCache.rope_and_cache`, and of the function below, for its overloads."""

    rope: RopeName
    rotary_dim: int | None
    mrope_section: Sequence[int] | None
    q_norm: ArrayLike | None
    k_norm: ArrayLike | None
    eps: float
    layer: Index | None
    backend: JaxBackend | None


class RopeCacheKeywords(RopeKeywords, total=False):
    """More keywords of the function below."""

    kv_cache_dtype: KVCacheDtype
    k_scale: Scale | None
    v_scale: Scale | None
    layout: Layout | None
    scale_layout: str | CacheLayout | None


@overload
def rope_and_cache(
    query: TokenRows,
    key: TokenRows,
    value: TokenRows,
    caches: Sequence[jax.Ref],
    positions: ArrayLike,
    cos_sin: ArrayLike,
    slot_mapping: ArrayLike,
    **options: Unpack[RopeCacheKeywords],
) -> tuple[jax.Array]: ...
@overload
def rope_and_cache(
    query: TokenRows,
    key: TokenRows,
    value: TokenRows,
    caches: Sequence[ArrayLike],
    positions: ArrayLike,
    cos_sin: ArrayLike,
    slot_mapping: ArrayLike,
    **options: Unpack[RopeCacheKeywords],
) -> tuple[jax.Array, ...]: ...
def rope_and_cache(
    query: TokenRows,
    key: TokenRows,
    value: TokenRows,
    caches: Sequence[ArrayLike | jax.Ref],
    positions: ArrayLike,
    cos_sin: ArrayLike,
    slot_mapping: ArrayLike,
    *,
    rope: RopeName = "neox",
    rotary_dim: int | None = None,
    mrope_section: Sequence[int] | None = None,
    q_norm: ArrayLike | None = None,
    k_norm: ArrayLike | None = None,
    eps: float = 1e-6,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, ...]:
    """Rotates queries and keys by their positions, writes keys and values into a paged KV cache, and returns the query.

    With a norm, a head x becomes `x * (1 / sqrt(mean(x²) + eps)) * weights` before. Then a pair (a, b) of its first
    rotary_dim elements becomes `(a cos - b sin, b cos + a sin)`. All of it is float32 arithmetic, each operation
    rounded once; by "xla" on CPUs only, where numbers below 2^-126 may become zeros on the way. Key is then written as
    the writers write float32: rounded to the cache's dtype, or quantised; value as it came.

    Token t goes to slot `slot_mapping[t]`, as with `reshape_and_cache_flash`; every row of query is rotated. A position
    outside the table makes zeros of query's row, and of the key that is written. Negative ones are for padding.

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Carry a whole stacked cache through `lax.scan` and pass `layer`.

    Of MLA (one cache, layout `block slot latent`), key is kv_c `[num_tokens, kv_lora_rank]`, which k_norm norms, value
    is k_pe `[num_tokens, qk_rope_head_dim]`, which is rotated, and query has heads like k_pe.

    Args:
        query: `[num_tokens, num_q_heads, head_size]` of float16, bfloat16 or float32.
        key: `[num_tokens, num_heads, head_size]` of query's dtype.
        value: `[num_tokens, num_heads, head_size_v]` of query's dtype.
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both; then, where each token's head
            is to have a scale of its own, `k_scale_cache, v_scale_cache`. `jax.Ref`s are updated in place.
        positions: `[num_tokens]` of int32 or int64; `[3, num_tokens]` with mrope_section.
        cos_sin: `[max_position, rotary_dim]` of float32 or query's dtype: cosines of each pair, then sines.
            `rope_table` makes it of a model's config.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        rope: "neox": elements i and `rotary_dim / 2 + i` are a pair; "gptj": elements 2i and `2i + 1`.
        rotary_dim: How many elements of a head are rotated; None means all.
        mrope_section: `(t, h, w)`: the first t pairs have the angles of `positions[0]`, the next h those of
            `positions[1]`, the last w those of `positions[2]`.
        q_norm: `[head_size]` of float32 or query's dtype: weights of query's norm; None means no norm.
        k_norm: The same for key.
        eps: What is added to the mean of the squares.
        kv_cache_dtype: "auto", or the format to store, as with `reshape_and_cache_flash`; with scale caches, as with
            `reshape_and_cache_flash_per_token_head_quant`; of MLA, as with `concat_and_cache_mla`.
        k_scale: What keys are divided by: float32 of one element, `[num_heads]`, `[num_layers, 1]` or `[num_layers,
            num_heads]`, of which the layer's count, or a number. Of MLA, for the whole row.
        v_scale: What values are divided by; of the same shapes.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more; for one array `block slot head k+v`, or `block slot latent` where it has 3 axes (4 with `layer`).
        scale_layout: Pattern of the scale caches; None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layout's `layer` axis; out of range in a traced integer, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The rotated query, of query's shape and dtype; then the new caches, unless they are Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, a Ref is passed twice, or a list or NumPy array of
            positions has one past the table.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> query = key = jnp.array([[[1.0, 2.0]]])  # 1 token, 1 head of 2 elements: one pair
        >>> caches = jnp.zeros((2, 3, 4, 1, 2))  # for K and for V, 3 blocks of 4 slots
        >>> cos_sin = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # a quarter turn at position 1
        >>> query, key_cache, value_cache = jaxkv.rope_and_cache(
        ...     query, key, key, tuple(caches), jnp.array([1]), cos_sin, jnp.array([5]), rope="neox"
        ... )
        >>> query.tolist(), key_cache[1, 1].tolist(), value_cache[1, 1].tolist()
        ([[[-2.0, 1.0]]], [[-2.0, 1.0]], [[1.0, 2.0]])

    After `rotary_embedding` and `reshape_and_cache_flash` of vLLM.
    """
    numbers = check_rope_options(rope, as_static("rotary_dim", rotary_dim), mrope_section, eps)
    return _rope_and_cache(
        query, key, value, caches, positions, cos_sin, slot_mapping, q_norm, k_norm, numbers,
        kv_cache_dtype=kv_cache_dtype, k_scale=k_scale, v_scale=v_scale, layout=layout, scale_layout=scale_layout,
        layer=layer, backend=backend,
    )  # fmt: skip


def _rope_and_cache(
    query: Any,
    key: Any,
    value: Any,
    caches: Any,
    positions: Any,
    cos_sin: Any,
    slot_mapping: Any,
    q_norm: Any,
    k_norm: Any,
    numbers: RopeOptions,
    *,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    layout: Any,
    scale_layout: Any,
    layer: Any,
    backend: str | None,
) -> tuple[jax.Array, ...]:
    """Checks a call whose numbers are checked, and carries it out."""
    k_scale, v_scale, layer = as_scale(k_scale), as_scale(v_scale), as_layer(layer)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    query, key, value, cos_sin = as_rows(query), as_rows(key), as_rows(value), as_array(cos_sin)
    q_norm, k_norm = (None if weights is None else as_array(weights) for weights in (q_norm, k_norm))
    slot_mapping, indices = as_indices(slot_mapping), as_indices(positions)
    arrays, scale_caches = split_caches(caches if isinstance(caches, Sequence) else (caches,))
    memory = as_memories(arrays, scale_caches)
    arguments = cache_arguments(memory, len(arrays), kv_cache_dtype, k_scale, v_scale, layout, layer, scale_layout)
    norms = [None if weights is None else spec_of(weights) for weights in (q_norm, k_norm)]
    described = check_rope(
        spec_of(query), spec_of(key), spec_of(value), spec_of(indices), spec_of(cos_sin), spec_of(slot_mapping),
        norms[0], norms[1], numbers, arguments,
    )  # fmt: skip
    if isinstance(indices, np.ndarray):
        check_positions(np.asarray(positions), cos_sin.shape[0])

    write, shape = described.write, None
    if described.latent:  # MLA's rows are those of one head
        key, value, v_scale = as_head(key), as_head(value), k_scale
        layout = write.cache.layout
        if not layout.latent:
            at = layout.arrays[0].index(("head",))
            shape = (*memory[0].shape[:at], 1, *memory[0].shape[at:])
    cache_options, cache = cache_of(write, arguments, k_scale, v_scale, layer)
    options = RotatedWriteOptions(cache_options, numbers, described.latent, backend)
    operands = RotatedWriteOperands(query, key, value, cache, slot_mapping, indices, cos_sin, q_norm, k_norm)
    rotated, new = update(bind_rope, options, memory, jax.tree.map(jnp.asarray, operands), shape)
    return (*rotated, *(new or ()))
