"""Writers that compute a scale for each head of each token, and write the scales to scale caches."""

from typing import TypedDict, Unpack, overload

import jax

from jaxkv._arguments import ArrayLike, Index, TokenRows
from jaxkv._write import write_caches
from kvcore.choices import JaxBackend, Layout, PerTokenHeadDtype
from kvcore.layout import CacheLayout


class QuantizeKeywords(TypedDict, total=False):
    """Keywords of the functions below, for their overloads."""

    layout: Layout | None
    scale_layout: str | CacheLayout | None
    layer: Index | None
    backend: JaxBackend | None


@overload
def reshape_and_cache_flash_per_token_head_quant(
    key: TokenRows,
    value: TokenRows,
    key_cache: jax.Ref,
    value_cache: jax.Ref,
    k_scale_cache: jax.Ref,
    v_scale_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantizeKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash_per_token_head_quant(
    key: TokenRows,
    value: TokenRows,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    k_scale_cache: ArrayLike,
    v_scale_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantizeKeywords],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]: ...
def reshape_and_cache_flash_per_token_head_quant(
    key: TokenRows,
    value: TokenRows,
    key_cache: ArrayLike | jax.Ref,
    value_cache: ArrayLike | jax.Ref,
    k_scale_cache: ArrayLike | jax.Ref,
    v_scale_cache: ArrayLike | jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None:
    """Quantises keys and values of new tokens, each head of a token by its own scale, and returns the new arrays.

    The scale of a head is its absmax divided by the format's largest number (448 for e4m3, 57344 for e5m2, 240 and
    57344 for their fnuz forms, 127 for int8, 7 for int4), in float32; or 1 where that is below 2^-126, as for zeros.
    Elements are `saturate(round(float32(x) / scale))`. With a NaN among them, the scale is NaN; with an infinity,
    infinite: such a head reads as NaN. The scales go to k_scale_cache and v_scale_cache.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Carry a whole stacked cache through `lax.scan` and pass `layer`: a cache that
    is a scan's xs, or `cache[layer]`, is a copy.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`. A
            `jax.Ref` is updated in place.
        value_cache: V's blocks; a Ref if key_cache is one.
        k_scale_cache: float32: K's scales, in the scale layout's order: usually `[num_blocks, block_size, num_heads]`.
            `paged_attention` and `gather_kv` take it as k_scale. A Ref if the caches are.
        v_scale_cache: float32: V's scales, which they take as v_scale. A Ref if the caches are.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" or "fp8_e5m2fnuz", in caches of that dtype or
            of uint8; "int8", in int8 or uint8; "int4", in uint8, two elements a byte, the first in its low half, so
            that axis dim counts `head_size / 2` bytes.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more (`[num_blocks, num_heads, head_size / x, block_size, x]`).
        scale_layout: Pattern of the scale caches: block, slot and head in any order, and layer where the caches have
            it; two, separated by a comma, where the two differ. None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the `layer` axis of caches and scale caches, which None means not to have. A traced integer is
            read by the kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new `(key_cache, value_cache, k_scale_cache, v_scale_cache)`; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, or a Ref is passed twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> key = jnp.array([[[-1.0, 127.0]], [[2.0, 254.0]]])  # 2 tokens, 1 head of 2 elements
        >>> caches = jnp.zeros((2, 3, 4, 1, 2), "int8")  # for K and for V, 3 blocks of 4 slots
        >>> scale_caches = jnp.zeros((2, 3, 4, 1))
        >>> key_cache, _, k_scale_cache, _ = jaxkv.reshape_and_cache_flash_per_token_head_quant(
        ...     key, key, *caches, *scale_caches, jnp.array([4, 5]), "int8"
        ... )
        >>> key_cache[1, :2, 0].tolist(), k_scale_cache[1, :2, 0].tolist()
        ([[-1, 127], [1, 127]], [1.0, 2.0])

    After `triton_reshape_and_cache_flash_per_token_head_quant` of vLLM.
    """
    return write_caches(
        key, value, (key_cache, value_cache), slot_mapping, kv_cache_dtype, None, None, layout, layer, backend,
        (k_scale_cache, v_scale_cache), scale_layout,
    )  # fmt: skip


@overload
def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: TokenRows,
    value: TokenRows,
    kv_cache: jax.Ref,
    k_scale_cache: jax.Ref,
    v_scale_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantizeKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: TokenRows,
    value: TokenRows,
    kv_cache: ArrayLike,
    k_scale_cache: ArrayLike,
    v_scale_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantizeKeywords],
) -> tuple[jax.Array, jax.Array, jax.Array]: ...
def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: TokenRows,
    value: TokenRows,
    kv_cache: ArrayLike | jax.Ref,
    k_scale_cache: ArrayLike | jax.Ref,
    v_scale_cache: ArrayLike | jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """Quantises keys and values, each head of a token by its own scale, into one array, and returns the new arrays.

    The scale of a head is its absmax divided by the format's largest number (448 for e4m3, 57344 for e5m2, 240 and
    57344 for their fnuz forms, 127 for int8, 7 for int4), in float32; or 1 where that is below 2^-126, as for zeros.
    Elements are `saturate(round(float32(x) / scale))`. With a NaN among them, the scale is NaN; with an infinity,
    infinite: such a head reads as NaN. The scales go to k_scale_cache and v_scale_cache.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Carry a whole stacked cache through `lax.scan` and pass `layer`: a cache that
    is a scan's xs, or `cache[layer]`, is a copy.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype; head_size_v may differ from head_size where the
            layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order. A `jax.Ref` is updated in place.
        k_scale_cache: float32: K's scales, in the scale layout's order: usually `[num_blocks, block_size, num_heads]`.
            `paged_attention` and `gather_kv` take it as k_scale. A Ref if the caches are.
        v_scale_cache: float32: V's scales, which they take as v_scale. A Ref if the caches are.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" or "fp8_e5m2fnuz", in caches of that dtype or
            of uint8; "int8", in int8 or uint8; "int4", in uint8, two elements a byte, the first in its low half, so
            that axis dim counts `head_size / 2` bytes.
        layout: Pattern, constant's name or `CacheLayout`, of a single array. None means `block slot head k+v`:
            `[num_blocks, block_size, num_heads, head_size + head_size_v]`.
        scale_layout: Pattern of the scale caches: block, slot and head in any order, and layer where the caches have
            it; two, separated by a comma, where the two differ. None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the `layer` axis of caches and scale caches, which None means not to have. A traced integer is
            read by the kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new `(kv_cache, k_scale_cache, v_scale_cache)`; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, or a Ref is passed twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> key = jnp.array([[[-1.0, 127.0]]])  # 1 token, 1 head of 2 elements
        >>> value = jnp.array([[[5.0]]])  # and of 1 element
        >>> kv_cache = jnp.zeros((3, 4, 1, 3), "int8")  # 3 blocks of 4 slots
        >>> scale_caches = jnp.zeros((2, 3, 4, 1))
        >>> kv_cache, *scale_caches = jaxkv.reshape_and_cache_flash_diffkv_per_token_head_quant(
        ...     key, value, kv_cache, *scale_caches, jnp.array([5]), "int8"
        ... )
        >>> kv_cache[1, 1, 0].tolist(), scale_caches[0][1, :, 0].tolist()
        ([-1, 127, 127], [0.0, 1.0, 0.0, 0.0])

    After `triton_reshape_and_cache_flash_per_token_head_quant` and `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    return write_caches(
        key, value, (kv_cache,), slot_mapping, kv_cache_dtype, None, None, layout, layer, backend,
        (k_scale_cache, v_scale_cache), scale_layout,
    )  # fmt: skip
