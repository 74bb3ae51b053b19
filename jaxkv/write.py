"""Writers that store elements as they are, cast, or quantised with static scales."""

from typing import TypedDict, Unpack, overload

import jax

from jaxkv._arguments import ArrayLike, Index, Scale, TokenRows
from jaxkv._write import write_caches
from kvcore.choices import JaxBackend, KVCacheDtype, Layout


class WriteKeywords(TypedDict, total=False):
    """Keywords of the functions below, for their overloads."""

    layout: Layout | None
    layer: Index | None
    backend: JaxBackend | None


@overload
def reshape_and_cache_flash(
    key: TokenRows,
    value: TokenRows,
    key_cache: jax.Ref,
    value_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash(
    key: TokenRows,
    value: TokenRows,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> tuple[jax.Array, jax.Array]: ...
def reshape_and_cache_flash(
    key: TokenRows,
    value: TokenRows,
    key_cache: ArrayLike | jax.Ref,
    value_cache: ArrayLike | jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    *,
    layout: Layout | None = None,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, jax.Array] | None:
    """Writes keys and values of new tokens into a paged KV cache and returns the new caches.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Carry a whole stacked cache through `lax.scan` and pass `layer`: a cache that
    is a scan's xs, or `cache[layer]`, is a copy.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16, float32, or the cache's fp8 dtype.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`. Axis dim
            counts bytes where two elements share one: `head_size / 2` for "int4", `head_size / 2 + head_size / 16` for
            "nvfp4". A `jax.Ref` is updated in place.
        value_cache: V's blocks; a Ref if key_cache is one.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even. The others store
            `saturate(round(float32(x) / scale))`: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" and "fp8_e5m2fnuz"
            in caches of that dtype or of uint8; "int8", from -127 to 127, in int8 or uint8; "int4", from -7 to 7, in
            uint8, two elements a byte, the first in its low half. NaN is 0 in both of these. "nvfp4" stores e2m1 in
            uint8, two elements a byte, and a scale in e4m3 for each group of 16 elements of a head:
            `b = absmax / 6 / scale`. Elements are multiplied by `1 / (b * scale)`. In each block, or its part of K or
            of V, all elements lie before all these scales.
        k_scale: float32 of one element, `[num_heads]`, `[num_layers, 1]` or `[num_layers, num_heads]`, of which the
            layer's count, also traced; or a number. None means 1. Unused with "auto". `kv_scales` computes good ones.
            Zero, negative numbers and NaN divide as IEEE 754 has it.
        v_scale: What value is divided by; of the same shapes.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more (`[num_blocks, num_heads, head_size / x, block_size, x]`).
        layer: Index into the layout's `layer` axis, which None means not to have. A traced integer is read by the
            kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new `(key_cache, value_cache)`; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, or both caches are one Ref.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> key = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 tokens, 1 head of 2 elements
        >>> key_cache, value_cache = jnp.zeros((2, 3, 4, 1, 2))  # each of 3 blocks of 4 slots
        >>> slot_mapping = jnp.array([5, -1])
        >>> key_cache, value_cache = jaxkv.reshape_and_cache_flash(key, -key, key_cache, value_cache, slot_mapping)
        >>> key_cache[1, :, 0].tolist()  # slot 5 is place 1 of block 1; the second token is skipped
        [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]

    After `triton_reshape_and_cache_flash` of vLLM.
    """
    caches = (key_cache, value_cache)
    return write_caches(key, value, caches, slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, backend)


@overload
def reshape_and_cache_flash_diffkv(
    key: TokenRows,
    value: TokenRows,
    kv_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash_diffkv(
    key: TokenRows,
    value: TokenRows,
    kv_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> jax.Array: ...
def reshape_and_cache_flash_diffkv(
    key: TokenRows,
    value: TokenRows,
    kv_cache: ArrayLike | jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    *,
    layout: Layout | None = None,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> jax.Array | None:
    """Writes keys and values of new tokens into one array that holds both and returns the new cache.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Carry a whole stacked cache through `lax.scan` and pass `layer`: a cache that
    is a scan's xs, or `cache[layer]`, is a copy.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16, float32, or the cache's fp8 dtype.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype; head_size_v may differ from head_size where the
            layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order. A `jax.Ref` is updated in place. Two elements share a byte in "int4"
            and "nvfp4".
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even. The others store
            `saturate(round(float32(x) / scale))`: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" and "fp8_e5m2fnuz"
            in caches of that dtype or of uint8; "int8", from -127 to 127, in int8 or uint8; "int4", from -7 to 7, in
            uint8, two elements a byte, the first in its low half. NaN is 0 in both of these. "nvfp4" stores e2m1 in
            uint8, two elements a byte, and a scale in e4m3 for each group of 16 elements of a head:
            `b = absmax / 6 / scale`. Elements are multiplied by `1 / (b * scale)`. In each block, or its part of K or
            of V, all elements lie before all these scales.
        k_scale: float32 of one element, `[num_heads]`, `[num_layers, 1]` or `[num_layers, num_heads]`, of which the
            layer's count, also traced; or a number. None means 1. Unused with "auto". `kv_scales` computes good ones.
            Zero, negative numbers and NaN divide as IEEE 754 has it.
        v_scale: What value is divided by; of the same shapes.
        layout: Pattern, constant's name or `CacheLayout`, of a single array. None means `block slot head k+v`:
            `[num_blocks, block_size, num_heads, head_size + head_size_v]`.
        layer: Index into the layout's `layer` axis, which None means not to have. A traced integer is read by the
            kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new kv_cache; None for a Ref.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> key, value = jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0]]])  # 1 token, 1 head of 2 elements and of 1
        >>> kv_cache = jnp.zeros((3, 4, 1, 3))  # 3 blocks of 4 slots
        >>> kv_cache = jaxkv.reshape_and_cache_flash_diffkv(key, value, kv_cache, jnp.array([5]))
        >>> kv_cache[1, :, 0].tolist()  # slot 5 is place 1 of block 1
        [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    After `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    new = write_caches(key, value, (kv_cache,), slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, backend)
    return None if new is None else new[0]
