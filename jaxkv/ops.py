"""The public functions: vLLM's cache writes, as JAX functions of arrays or Refs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import _primitive
from jaxkv._primitive import Options, spec_of
from kvcore.checks import check_options, overlap_error
from kvcore.contract import check_write
from kvcore.layout import CacheLayout

BACKENDS = ("triton", "xla", "interpret")


def reshape_and_cache_flash(
    key: jax.Array,
    value: jax.Array,
    key_cache: jax.Array | jax.Ref,
    value_cache: jax.Array | jax.Ref,
    slot_mapping: jax.Array,
    kv_cache_dtype: str = "auto",
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    *,
    layout: str | CacheLayout | None = None,
    layer: int | jax.Array | None = None,
    backend: str | None = None,
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
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even; "fp8" (= "fp8_e4m3") and
            "fp8_e5m2" store `saturate(round(float32(x) / scale))` in caches of the fp8 dtype or of uint8.
        k_scale: float32 of one element, also traced, or a number; None means 1. Unused with "auto".
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
        ValueError: a shape, layout or choice does not fit, or both caches are one array.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    After `triton_reshape_and_cache_flash` of vLLM.
    """
    if key_cache is value_cache:
        raise overlap_error()
    return _write(
        key,
        value,
        (key_cache, value_cache),
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
        layout,
        layer,
        backend,
    )


def reshape_and_cache_flash_diffkv(
    key: jax.Array,
    value: jax.Array,
    kv_cache: jax.Array | jax.Ref,
    slot_mapping: jax.Array,
    kv_cache_dtype: str = "auto",
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    *,
    layout: str | CacheLayout | None = None,
    layer: int | jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array | None:
    """Writes keys and values of new tokens into one array that holds both.

    As `reshape_and_cache_flash`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`; head_size_v may differ where the layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order; an array or a Ref.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: "auto", "fp8", "fp8_e4m3" or "fp8_e5m2".
        k_scale: float32 of one element, also traced, a number, or None.
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
) -> Any:
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    refs = [isinstance(c, jax.Ref) for c in caches]
    if any(refs) and not all(refs):
        raise TypeError("key_cache and value_cache must be two jax.Refs or two arrays, got one of each")
    k_scale, v_scale = (jnp.float32(s) if isinstance(s, (int, float)) else s for s in (k_scale, v_scale))
    if isinstance(layer, np.integer):
        layer = int(layer)
    index: Any = layer if hasattr(layer, "shape") else None  # a traced layer
    write = check_write(
        spec_of(key),
        spec_of(value),
        [spec_of(c) for c in caches],
        spec_of(slot_mapping),
        kv_cache_dtype,
        None if k_scale is None else spec_of(k_scale),
        None if v_scale is None else spec_of(v_scale),
        layout,
        layer if index is None else spec_of(index),
    )
    # One element may come with or without an axis; from here on it has one. Scales without effect stay out.
    scales = [jnp.reshape(s, 1) for s in (k_scale, v_scale) if s is not None and write.scaled]
    options = Options(
        num_caches=len(caches),
        kv_cache_dtype=kv_cache_dtype,
        layout=write.layout,
        k_scaled=write.scaled and k_scale is not None,
        v_scaled=write.scaled and v_scale is not None,
        layer_traced=index is not None,
        layer=layer if index is None else None,
        backend=backend,
    )
    rest = [indices(slot_mapping), *scales, *([] if index is None else [jnp.reshape(indices(index), 1)])]
    inputs = (jnp.asarray(key), jnp.asarray(value))
    if not all(refs):
        return tuple(_primitive.write(options, *inputs, *map(jnp.asarray, caches), *rest))
    # Discharged under jit, reading and assigning the whole Ref is an update of its buffer; eagerly it is two copies.
    _write_refs(options, tuple(caches), inputs, tuple(rest))
    return None


@functools.partial(jax.jit, static_argnums=0)
def _write_refs(options: Options, refs: Sequence[jax.Ref], inputs: Sequence[Any], rest: Sequence[Any]) -> None:
    new = _primitive.write(options, *inputs, *(ref[...] for ref in refs), *rest)
    for ref, cache in zip(refs, new, strict=True):
        ref[...] = cache


def indices(x: Any) -> jax.Array:
    """Slots or layers as a JAX array. NumPy's int64 becomes int32 unless x64 is on: what would wrap is skipped."""
    if isinstance(x, np.ndarray) and not jax.config.jax_enable_x64:
        x = np.where(x == x.astype(np.int32), x, -1)
    return jnp.asarray(x)
