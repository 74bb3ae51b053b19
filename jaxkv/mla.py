"""The writer of multi-head latent attention's rows."""

from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from jaxkv._arguments import BACKENDS, ArrayLike, Index, Scale, TokenRows, as_layer, as_rows, as_scale
from jaxkv._call import spec_of
from jaxkv._views import as_head, split_columns
from jaxkv._write import as_memory, write_caches
from kvcore.choices import JaxBackend, KVCacheDtype
from kvcore.contract.checks import check_options, check_scale_type
from kvcore.contract.write import check_mla, in_latent_order, split_of_latent, with_latent_head
from kvcore.formats import DS_MLA_ROPE
from kvcore.layout import CacheLayout


class MlaKeywords(TypedDict, total=False):
    """Keywords of the function below, for its overloads."""

    layer: Index | None
    backend: JaxBackend | None


@overload
def concat_and_cache_mla(
    kv_c: TokenRows,
    k_pe: TokenRows,
    kv_cache: jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    scale: Scale | None = ...,
    **options: Unpack[MlaKeywords],
) -> None: ...
@overload
def concat_and_cache_mla(
    kv_c: TokenRows,
    k_pe: TokenRows,
    kv_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = ...,
    scale: Scale | None = ...,
    **options: Unpack[MlaKeywords],
) -> jax.Array: ...
def concat_and_cache_mla(
    kv_c: TokenRows,
    k_pe: TokenRows,
    kv_cache: ArrayLike | jax.Ref,
    slot_mapping: ArrayLike,
    kv_cache_dtype: KVCacheDtype = "auto",
    scale: Scale | None = None,
    *,
    layer: Index | None = None,
    backend: JaxBackend | None = None,
) -> jax.Array | None:
    """Writes the rows of multi-head latent attention into a paged cache and returns the new cache.

    A row is a token's latent vector kv_c, then k_pe, the rotary part of its key. It is to be read with the layout
    `block slot latent` and `head_size_v=kv_lora_rank`: the whole row is the key, the latent vector the value.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    The update is in place where XLA may reuse the memory: under `jax.jit` with `donate_argnums`, or for values computed
    before. Otherwise XLA copies it first. Carry a whole stacked cache through `lax.scan` and pass `layer`: a cache that
    is a scan's xs, or `cache[layer]`, is a copy.

    Args:
        kv_c: `[num_tokens, kv_lora_rank]` of float16, bfloat16 or float32: latent vectors.
        k_pe: `[num_tokens, qk_rope_head_dim]` of kv_c's dtype.
        kv_cache: `[num_blocks, block_size, row]`, with `num_layers` in front where layer is given. A row has
            kv_lora_rank + qk_rope_head_dim elements: half as many bytes for "int4", 9 / 16 for "nvfp4", and 656 bytes
            for "fp8_ds_mla". A `jax.Ref` is updated in place.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even. The others store
            `saturate(round(float32(x) / scale))`: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" and "fp8_e5m2fnuz"
            in caches of that dtype or of uint8; "int8", from -127 to 127, in int8 or uint8; "int4", from -7 to 7, in
            uint8, two elements a byte, the first in its low half. NaN is 0 in both of these. "nvfp4" stores e2m1 in
            uint8, two elements a byte, and a scale in e4m3 for each group of 16 elements of a row:
            `b = absmax / 6 / scale`. Elements are multiplied by `1 / (b * scale)`. In each block, all elements lie
            before all these scales. "fp8_ds_mla" is for rows of 512 + 64 elements, in uint8: 512 bytes of e4m3, a
            float32 scale for each group of 128 of them, and k_pe in bfloat16, or zeros where it has no columns. Such a
            scale is the first power of two not below `absmax / 448` and 1e-4, as in vLLM. NaN counts as 0 for absmax,
            and is stored as NaN; with an infinity among the 128, the scale is infinite, and all are read as NaN.
        scale: What elements are divided by: float32 of one element, or `[num_layers, 1]`, of which the layer's counts,
            also traced; or a number. None means 1. Not read for "auto" and "fp8_ds_mla".
        layer: Index into kv_cache's first axis. A traced integer is read by the kernel; out of range there, nothing is
            written.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        The new kv_cache; None for a Ref.

    Raises:
        ValueError: a shape or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation; `jax.lax.stop_gradient` says that none is wanted.

    Example:
        >>> kv_c, k_pe = jnp.array([[1.0, 2.0]]), jnp.array([[3.0]])  # 1 token
        >>> kv_cache = jnp.zeros((3, 4, 3))  # 3 blocks of 4 slots
        >>> kv_cache = jaxkv.concat_and_cache_mla(kv_c, k_pe, kv_cache, jnp.array([5]))
        >>> kv_cache[1].tolist()  # slot 5 is place 1 of block 1
        [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

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
    kv_c, k_pe, kv_cache = as_rows(kv_c), as_rows(k_pe), as_memory(kv_cache)
    spec = spec_of(kv_cache)
    check_mla(
        spec_of(kv_c), spec_of(k_pe), in_latent_order(layout, spec), kv_cache_dtype, layer,
        scale=None if scale is None else spec_of(scale),
    )  # fmt: skip
    if not k_pe.shape[1]:
        if kv_cache_dtype == "fp8_ds_mla":
            k_pe = jnp.zeros((k_pe.shape[0], DS_MLA_ROPE), k_pe.dtype)
        else:  # a write has two parts: the latent vector is cut in two
            kv_c, k_pe = split_columns(kv_c, split_of_latent(kv_c.shape[1]))
    layout, spec = with_latent_head(layout, spec, kv_cache_dtype)
    key, value = as_head(kv_c), as_head(k_pe)
    new = write_caches(
        key, value, (kv_cache,), slot_mapping, kv_cache_dtype, scale, scale, layout, layer, backend, shape=spec.shape
    )
    return None if new is None else new[0]
