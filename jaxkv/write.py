"""The public functions: vLLM's cache writes, as JAX functions of arrays or Refs."""

import functools
from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from jaxkv._arguments import ArrayLike, Index, Scale, as_array, as_indices, as_layer, as_scale
from jaxkv._call import CacheOperands, CacheOptions, WriteOperands, WriteOptions, spec_of
from jaxkv._primitive.write import write
from kvcore.arrays import array_names
from kvcore.choices import JaxBackend, KVCacheDtype, Layout, PerTokenHeadDtype
from kvcore.contract.cache import CacheArguments
from kvcore.contract.checks import check_options, check_scale, check_scale_type
from kvcore.contract.write import check_mla, check_write, split_of_latent
from kvcore.formats import DS_MLA_ROPE
from kvcore.layout import CacheLayout
from kvcore.scales import scale_layout_of

BACKENDS = ("triton", "xla", "interpret")


class WhereKeywords(TypedDict, total=False):
    """Keywords of every writer, for its overloads."""

    layer: Index | None
    backend: JaxBackend | None


class WriteKeywords(WhereKeywords, total=False):
    """Likewise, where layouts may be chosen."""

    layout: Layout | None


class QuantKeywords(WriteKeywords, total=False):
    """Likewise, where scales have a layout, too."""

    scale_layout: str | CacheLayout | None


@overload
def reshape_and_cache_flash(
    key: ArrayLike,
    value: ArrayLike,
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
    key: ArrayLike,
    value: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> tuple[jax.Array, jax.Array]: ...
def reshape_and_cache_flash(
    key: ArrayLike,
    value: ArrayLike,
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
    """Writes keys and values of new tokens into a paged KV cache.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or
    at or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    The update is in place where XLA may reuse the caches' memory: under `jax.jit` with `donate_argnums`, or for values
    computed before. Otherwise XLA copies the caches first. Carry a whole stacked cache through `lax.scan` and pass
    `layer`; a cache that is a scan's xs, or `cache[layer]`, is a copy.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16, float32, or the cache's fp8 dtype.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`. A
            `jax.Ref` is updated in place.
        value_cache: V's blocks; a Ref if key_cache is one.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even. The others store
            `saturate(round(float32(x) / scale))`: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz" and
            "int8" in caches of that dtype or of uint8, "int4" and "nvfp4" in uint8, two elements a byte, the first in
            its low half. nvfp4 has beside them an e4m3 scale for each 16 elements: a head has `head_size * 9 / 16`
            bytes along the last axis, and each block (or its part of K or V) holds elements first, then all scales.
        k_scale: float32 of one element, or one a head, `[num_heads]`, also traced; or a number. None means 1. Unused
            with "auto". `kv_scales` finds good ones. Zero, negative numbers and NaN divide as IEEE 754 has it.
        v_scale: Likewise, for value.
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

    After `triton_reshape_and_cache_flash` of vLLM.
    """
    caches = (key_cache, value_cache)
    return _write(key, value, caches, slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, backend)


@overload
def reshape_and_cache_flash_diffkv(
    key: ArrayLike,
    value: ArrayLike,
    kv_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash_diffkv(
    key: ArrayLike,
    value: ArrayLike,
    kv_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    k_scale: Scale | None = ...,
    v_scale: Scale | None = ...,
    **options: Unpack[WriteKeywords],
) -> jax.Array: ...
def reshape_and_cache_flash_diffkv(
    key: ArrayLike,
    value: ArrayLike,
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
    """Writes keys and values of new tokens into one array that holds both.

    As `reshape_and_cache_flash`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`; head_size_v may differ where the layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order; an array or a Ref.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: Likewise.
        k_scale: Likewise.
        v_scale: Likewise.
        layout: A single-array layout; None means `block slot head k+v`:
            `[num_blocks, block_size, num_heads, head_size + head_size_v]`.
        layer: Index into the layout's `layer` axis, also traced.
        backend: None, "triton", "xla" or "interpret".

    Returns:
        The new kv_cache; None for a Ref.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    After `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    new = _write(key, value, (kv_cache,), slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, backend)
    return None if new is None else new[0]


@overload
def reshape_and_cache_flash_per_token_head_quant(
    key: ArrayLike,
    value: ArrayLike,
    key_cache: jax.Ref,
    value_cache: jax.Ref,
    k_scale_cache: jax.Ref,
    v_scale_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash_per_token_head_quant(
    key: ArrayLike,
    value: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    k_scale_cache: ArrayLike,
    v_scale_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantKeywords],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]: ...
def reshape_and_cache_flash_per_token_head_quant(
    key: ArrayLike,
    value: ArrayLike,
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
    """Writes keys and values of new tokens, each token's head quantised with a scale of its own, which it writes too.

    The scale of a head's elements is the largest of their magnitudes divided by the format's largest number (127 for
    int8, 7 for int4, 448 for e4m3), or 1 where that is below 2^-126, as for zeros. An infinity makes it infinite, a
    NaN NaN. As `reshape_and_cache_flash`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; an array or a Ref.
        value_cache: V's blocks; a Ref if key_cache is one.
        k_scale_cache: float32: K's scales, in the scale layout's order; a Ref if key_cache is one.
        v_scale_cache: float32: V's scales; a Ref if key_cache is one.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8" or "int4".
        layout: As in `reshape_and_cache_flash`.
        scale_layout: Pattern of the scale caches: block, slot and head in any order, and layer where the caches have
            it; two, separated by a comma, where the two differ. None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layouts' `layer` axes, also traced.
        backend: None, "triton", "xla" or "interpret".

    Returns:
        The new `(key_cache, value_cache, k_scale_cache, v_scale_cache)`; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, or a Ref is given twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    After `triton_reshape_and_cache_flash_per_token_head_quant` of vLLM.
    """
    return _write(
        key, value, (key_cache, value_cache), slot_mapping, kv_cache_dtype, None, None, layout, layer, backend,
        (k_scale_cache, v_scale_cache), scale_layout,
    )  # fmt: skip


@overload
def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: ArrayLike,
    value: ArrayLike,
    kv_cache: jax.Ref,
    k_scale_cache: jax.Ref,
    v_scale_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantKeywords],
) -> None: ...
@overload
def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: ArrayLike,
    value: ArrayLike,
    kv_cache: ArrayLike,
    k_scale_cache: ArrayLike,
    v_scale_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: PerTokenHeadDtype,
    **options: Unpack[QuantKeywords],
) -> tuple[jax.Array, jax.Array, jax.Array]: ...
def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: ArrayLike,
    value: ArrayLike,
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
    """Writes keys and values of new tokens into one array, each token's head with a scale of its own.

    As `reshape_and_cache_flash_per_token_head_quant`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]`; head_size_v may differ where the layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order; an array or a Ref.
        k_scale_cache: float32: K's scales; a Ref if kv_cache is one.
        v_scale_cache: float32: V's scales; a Ref if kv_cache is one.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: Likewise.
        layout: A single-array layout; None means `block slot head k+v`.
        scale_layout: Likewise.
        layer: Index into the layouts' `layer` axes, also traced.
        backend: None, "triton", "xla" or "interpret".

    Returns:
        The new `(kv_cache, k_scale_cache, v_scale_cache)`; None for Refs.

    Raises:
        ValueError: a shape, layout or choice does not fit, or a Ref is given twice.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    After `triton_reshape_and_cache_flash_per_token_head_quant` of vLLM.
    """
    return _write(
        key, value, (kv_cache,), slot_mapping, kv_cache_dtype, None, None, layout, layer, backend,
        (k_scale_cache, v_scale_cache), scale_layout,
    )  # fmt: skip


@overload
def concat_and_cache_mla(
    kv_c: ArrayLike,
    k_pe: ArrayLike,
    kv_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    scale: Scale | None = ...,
    **options: Unpack[WhereKeywords],
) -> None: ...
@overload
def concat_and_cache_mla(
    kv_c: ArrayLike,
    k_pe: ArrayLike,
    kv_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    scale: Scale | None = ...,
    **options: Unpack[WhereKeywords],
) -> jax.Array: ...
def concat_and_cache_mla(
    kv_c: ArrayLike,
    k_pe: ArrayLike,
    kv_cache: ArrayLike | jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = "auto",
    scale: Scale | None = None,
    *,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> jax.Array | None:
    """Writes the rows of multi-head latent attention: each token's latent vector, then its rotary part of the key.

    The cache is read with the layout `block slot latent`, its latent vectors as values. As `reshape_and_cache_flash`,
    but for

    Args:
        kv_c: `[num_tokens, kv_lora_rank]` of float16, bfloat16 or float32: latent vectors.
        k_pe: `[num_tokens, qk_rope_head_dim]` of kv_c's dtype.
        kv_cache: `[num_blocks, block_size, row]`, with `num_layers` in front where layer is given; an array or a Ref. A
            row has kv_lora_rank + qk_rope_head_dim elements: half as many bytes for "int4", 9 / 16 for "nvfp4", and
            656 bytes for "fp8_ds_mla".
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: As in `reshape_and_cache_flash`, or "fp8_ds_mla" for rows of 512 + 64 elements: 512 bytes of
            e4m3, a float32 scale for each 128 of them, and k_pe in bfloat16, or zeros where it has no columns. Such a
            scale is the first power of two not below `absmax / 448` and 1e-4, as in vLLM. NaN counts as 0 for absmax,
            and is stored as NaN; with an infinity among the 128, the scale is infinite, and all are read as NaN.
        scale: Of both parts: float32 of one element, also traced, or a number; None means 1. Not read for "fp8_ds_mla".
        layer: Index into the first axis of kv_cache, also traced.
        backend: None, "triton", "xla" or "interpret".

    Returns:
        The new kv_cache; None for a Ref.

    Raises:
        ValueError: a shape or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    After `concat_and_cache_mla` of vLLM.
    """
    layout = CacheLayout.MLA if layer is None else CacheLayout.MLA.with_layer()
    return write_latent(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, layout, layer, backend)


def write_latent(
    kv_c: Any,
    k_pe: Any,
    kv_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    scale: Any,
    layout: CacheLayout,
    layer: Any,
    backend: str | None,
) -> jax.Array | None:
    """`concat_and_cache_mla`, into a cache with its axes in the order of a latent layout."""
    layer, scale = as_layer(layer), as_scale(scale)
    check_options(kv_cache_dtype, None, None, layer, backend, BACKENDS)
    check_scale_type("scale", scale)
    kv_c, k_pe, kv_cache = as_array(kv_c), as_array(k_pe), _as_memory(kv_cache)
    axes, spec = layout.arrays[0], spec_of(kv_cache)
    order = [axes.index((name,)) for name in ("layer", "block", "slot", "latent") if (name,) in axes]
    usual = spec if len(spec.shape) != len(axes) else spec._replace(shape=tuple(spec.shape[i] for i in order))
    check_mla(spec_of(kv_c), spec_of(k_pe), usual, kv_cache_dtype, layer)
    if scale is not None:
        check_scale("scale", spec_of(scale), 1)
    whole = spec.shape
    if not k_pe.shape[1]:
        if kv_cache_dtype == "fp8_ds_mla":
            k_pe = jnp.zeros((k_pe.shape[0], DS_MLA_ROPE), k_pe.dtype)
        else:
            kv_c, k_pe = jnp.split(jnp.asarray(kv_c), [split_of_latent(kv_c.shape[1])], axis=1)
    if kv_cache_dtype != "fp8_ds_mla":  # the same memory in two parts, with an axis for its one head
        layout = CacheLayout(layout.pattern.replace("latent", "head k+v"))
        whole = (*whole[: order[-1]], 1, *whole[order[-1] :])
    key, value = (jnp.asarray(x)[:, None] for x in (kv_c, k_pe))
    new = _write(
        key, value, (kv_cache,), slot_mapping, kv_cache_dtype, scale, scale, layout, layer, backend, whole=whole
    )
    return None if new is None else new[0]


def _write(
    key: Any,
    value: Any,
    caches: Sequence[Any],
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    layout: str | CacheLayout | None,
    layer: Any,
    backend: str | None,
    scale_caches: Sequence[Any] = (),
    scale_layout: str | CacheLayout | None = None,
    whole: tuple[int, ...] | None = None,
) -> Any:
    """Checks a call and binds the primitive. `whole`: the shape that the layout means, if the one cache's differs."""
    k_scale, v_scale, layer = as_scale(k_scale), as_scale(v_scale), as_layer(layer)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    key, value, slot_mapping = as_array(key), as_array(value), as_indices(slot_mapping)
    memory = tuple(map(_as_memory, (*caches, *scale_caches)))
    names = array_names(len(caches), len(scale_caches))
    refs = [isinstance(a, jax.Ref) for a in memory]
    if any(refs) and not all(refs):
        count, each = {2: ("two", "one"), 3: ("three", "some"), 4: ("four", "some")}[len(names)]
        every = f"{', '.join(names[:-1])} and {names[-1]}"
        raise TypeError(f"{every} must be {count} jax.Refs or {count} arrays, got {each} of each")
    for (name, a), (other, b) in combinations(zip(names, memory, strict=True), 2):
        if a is b and all(refs):  # one array twice is two that are alike
            raise ValueError(f"{name} and {other} must not overlap in memory")
    index: Any = layer if hasattr(layer, "shape") else None  # a traced layer
    specs = [spec_of(a) for a in memory[: len(caches)]]
    if whole is not None:
        specs = [specs[0]._replace(shape=whole)]
    cache = CacheArguments(
        caches=specs,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=None if k_scale is None else spec_of(k_scale),
        v_scale=None if v_scale is None else spec_of(v_scale),
        layout=layout,
        layer=layer if index is None else spec_of(index),
        scale_caches=[spec_of(a) for a in memory[len(caches) :]],
        scale_layout=scale_layout,
    )
    call = check_write(spec_of(key), spec_of(value), spec_of(slot_mapping), cache)
    options = WriteOptions(
        cache=CacheOptions(
            kv_cache_dtype=kv_cache_dtype,
            layout=call.cache.layout,
            scale_layout=scale_layout_of(scale_layout, call.cache.layout.has_layer) if scale_caches else None,
            layer=layer if index is None else None,
        ),
        backend=backend,
    )
    operands = WriteOperands(
        key=jnp.asarray(key),
        value=jnp.asarray(value),
        cache=CacheOperands(
            caches=(),
            scale_caches=(),
            k_scale=static_scale(k_scale, call.scaled),
            v_scale=static_scale(v_scale, call.scaled),
            layer=None if index is None else jnp.reshape(jnp.asarray(index), 1),
        ),
        slot_mapping=jnp.asarray(slot_mapping),
    )
    if all(refs):
        # Discharged under jit, reading and assigning the whole Ref is an update of its buffer; eagerly it is two
        # copies.
        _write_refs(options, memory, operands, whole)
        return None
    return tuple(_write_arrays(options, tuple(map(jnp.asarray, memory)), operands, whole))


def _write_arrays(
    options: WriteOptions, memory: tuple[jax.Array, ...], operands: WriteOperands, whole: tuple[int, ...] | None
) -> list[jax.Array]:
    shaped = memory if whole is None else (jnp.reshape(memory[0], whole),)
    num_caches = len(options.cache.layout.arrays)
    cache = operands.cache._replace(caches=shaped[:num_caches], scale_caches=shaped[num_caches:])
    new = write(options, operands._replace(cache=cache))
    return [n if whole is None else jnp.reshape(n, a.shape) for n, a in zip(new, memory, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _write_refs(
    options: WriteOptions, refs: tuple[jax.Ref, ...], operands: WriteOperands, whole: tuple[int, ...] | None
) -> None:
    new = _write_arrays(options, tuple(ref[...] for ref in refs), operands, whole)
    for ref, array in zip(refs, new, strict=True):
        ref[...] = array


def static_scale(scale: Any, has_effect: bool = True) -> jax.Array | None:
    """A scale with an axis: one element may come without. Without effect, it stays out."""
    return None if scale is None or not has_effect else jnp.atleast_1d(jnp.asarray(scale))


def _as_memory(x: Any) -> Any:
    """What is written to: Refs stay."""
    return x if isinstance(x, jax.Ref) else as_array(x)
