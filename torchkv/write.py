"""The public functions that write: vLLM's cache writes, for any layout and format."""

from torch import Tensor

from kvcore.choices import Granularity, KVCacheDtype, Layout, PerTokenHeadDtype, ScaledDtype, TorchBackend
from kvcore.contract.checks import check_options, check_scale_type
from kvcore.contract.scales import check_kv_scales
from kvcore.layout import CacheLayout
from torchkv._arguments import (
    BACKENDS,
    as_format,
    as_layer,
    as_pattern,
    as_scale,
    as_scale_pattern,
    check_tensors,
    explain,
    spec_of,
)
from torchkv._library import write as _library
from torchkv._torch.formats import scale_of


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    *,
    layout: Layout | None = None,
    layer: int | Tensor | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Writes keys and values of new tokens into a paged KV cache, in place.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or
    at or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided. No gradient flows into the caches.

    Under torch.compile nothing is copied, with one exception: where both caches reach the compiled function as views
    of one tensor, inductor copies one of them on every call. Pass the tensor and take the views inside.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16, float32, or the cache's fp8 dtype.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`. Where
            elements are quantised, its last axis counts bytes: `head_size / 2` for int4, `head_size / 2 +
            head_size / 16` for nvfp4.
        value_cache: V's blocks.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: What is stored, always rounded to nearest even:

            "auto" copies, or rounds to the cache's dtype.
            "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz" store `saturate(round(float32(x) / scale))`
            in caches of the fp8 dtype or of uint8.
            "int8" likewise, from -127 to 127 and 0 for NaN, in caches of int8 or uint8.
            "int4" likewise, from -7 to 7, two in a byte of uint8, the first in its low half.
            "nvfp4" stores e2m1; each 16 elements have a scale b of their own, `absmax / 6 / scale` in e4m3, and are
            multiplied by `1 / (b * scale)`. In each block, the elements of all heads lie before these scales, both in
            the layout's order.
            vLLM's names are understood, too: "bfloat16", "float16", "half", "float32" and "float" are "auto" for caches
            of that dtype, "fp8_inc" is "fp8".
        k_scale: float32 of one element, or `[num_heads]`, on the caches' device; None means 1. Unused with "auto". A
            number is made into such a tensor on every call. `kv_scales` computes them. Zero, negative numbers and NaN
            divide as IEEE 754 has it.
        v_scale: Likewise, for value.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more (`[num_blocks, num_heads, head_size / x, block_size, x]`).
        layer: Index into the layout's `layer` axis, which None means not to have; a Tensor of one integer on the
            caches' device is read by the kernel. Out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or the caches overlap.
        TypeError: a dtype does not fit.

    After `triton_reshape_and_cache_flash` of vLLM.
    """
    kv_cache_dtype = as_format(kv_cache_dtype, "key_cache", key_cache)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    arguments = (
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        as_scale(k_scale, key_cache),
        as_scale(v_scale, key_cache),
        as_pattern(layout),
        *as_layer(layer),
        backend,
    )
    try:
        _library.flash(*arguments)
    except (RuntimeError, AttributeError):
        explain(_library.flash, arguments)
        raise


def reshape_and_cache_flash_diffkv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    *,
    layout: Layout | None = None,
    layer: int | Tensor | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Writes keys and values of new tokens into one array that holds both, in place.

    As `reshape_and_cache_flash`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`; head_size_v may differ where the layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: As in `reshape_and_cache_flash`.
        k_scale: float32 of one element or `[num_heads]`, a number, or None.
        v_scale: Likewise.
        layout: A single-array layout; None means `block slot head k+v`:
            `[num_blocks, block_size, num_heads, head_size + head_size_v]`.
        layer: Index into the layout's `layer` axis.
        backend: None, "triton", "torch" or "interpret".

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.

    After `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    kv_cache_dtype = as_format(kv_cache_dtype, "kv_cache", kv_cache)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    arguments = (
        key,
        value,
        kv_cache,
        slot_mapping,
        kv_cache_dtype,
        as_scale(k_scale, kv_cache),
        as_scale(v_scale, kv_cache),
        as_pattern(layout),
        *as_layer(layer),
        backend,
    )
    try:
        _library.diffkv(*arguments)
    except (RuntimeError, AttributeError):
        explain(_library.diffkv, arguments)
        raise


def reshape_and_cache_flash_per_token_head_quant(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: PerTokenHeadDtype,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Quantises keys and values of new tokens, each token's head by a scale of its own, and writes both, in place.

    The scale is `absmax / m` in float32, m being the format's largest number (448 for e4m3, 127 for int8, 7 for int4),
    or 1 where it would be below 2^-126, as of zeros. Elements are `saturate(round(float32(x) / scale))`. With a NaN
    among them, the scale is NaN; with an infinity, infinite: such a head reads as NaN.

    As `reshape_and_cache_flash`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order.
        value_cache: V's blocks.
        k_scale_cache: Scales of keys, float32, `[num_blocks, block_size, num_heads]` or as scale_layout says. Give it
            to `paged_attention` and `gather_kv` as k_scale.
        v_scale_cache: Likewise, of values.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8" or "int4".
        layout: As in `reshape_and_cache_flash`.
        scale_layout: Pattern of the scale caches' axes: block, slot and head in any order, and layer where the caches
            have it. One for both, or two separated by a comma. None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the `layer` axis of caches and scale caches.
        backend: None, "triton", "torch" or "interpret".

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or caches or scale caches overlap.
        TypeError: a dtype does not fit.

    After `triton_reshape_and_cache_flash_per_token_head_quant` of vLLM.
    """
    kv_cache_dtype = as_format(kv_cache_dtype, "key_cache", key_cache)
    check_options(kv_cache_dtype, None, None, layer, backend, BACKENDS)
    arguments = (
        key,
        value,
        key_cache,
        value_cache,
        k_scale_cache,
        v_scale_cache,
        slot_mapping,
        kv_cache_dtype,
        as_pattern(layout),
        as_scale_pattern(scale_layout),
        *as_layer(layer),
        backend,
    )
    try:
        _library.flash_quant(*arguments)
    except (RuntimeError, AttributeError):
        explain(_library.flash_quant, arguments)
        raise


def reshape_and_cache_flash_diffkv_per_token_head_quant(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: PerTokenHeadDtype,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """As `reshape_and_cache_flash_per_token_head_quant`, into one array that holds both keys and values.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]`; head_size_v may differ where the layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order.
        k_scale_cache: Scales of keys, float32, `[num_blocks, block_size, num_heads]` or as scale_layout says.
        v_scale_cache: Likewise, of values.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format of fp8, "int8" or "int4".
        layout: A single-array layout; None means `block slot head k+v`.
        scale_layout: Pattern of the scale caches' axes; None means `block slot head`, or `layer block slot head`.
        layer: Index into the `layer` axis of cache and scale caches.
        backend: None, "triton", "torch" or "interpret".

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or cache or scale caches overlap.
        TypeError: a dtype does not fit.

    After `triton_reshape_and_cache_flash_per_token_head_quant` and `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    kv_cache_dtype = as_format(kv_cache_dtype, "kv_cache", kv_cache)
    check_options(kv_cache_dtype, None, None, layer, backend, BACKENDS)
    arguments = (
        key,
        value,
        kv_cache,
        k_scale_cache,
        v_scale_cache,
        slot_mapping,
        kv_cache_dtype,
        as_pattern(layout),
        as_scale_pattern(scale_layout),
        *as_layer(layer),
        backend,
    )
    try:
        _library.diffkv_quant(*arguments)
    except (RuntimeError, AttributeError):
        explain(_library.diffkv_quant, arguments)
        raise


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: KVCacheDtype = "auto",
    scale: Tensor | float | None = None,
    skip_scale: bool = False,
    *,
    layer: int | Tensor | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Writes rows of multi-head latent attention into a paged cache, kv_c and k_pe side by side, in place.

    Slots, streams and strides are as in `reshape_and_cache_flash`. To be read with the layout `block slot latent` and
    `head_size_v=kv_lora_rank`.

    Args:
        kv_c: `[num_tokens, kv_lora_rank]` of float16, bfloat16 or float32: the compressed keys and values.
        k_pe: `[num_tokens, qk_rope_head_dim]` of kv_c's dtype: the keys' part with positions.
        kv_cache: `[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]`, with num_layers in front where layer is
            given. The last axis counts bytes where elements are quantised.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: As in `reshape_and_cache_flash`, or "fp8_ds_mla", for 512 and 64 columns: rows of 656 bytes of
            uint8 are 512 elements of e4m3, the float32 scales of each 128 of these, and 64 of bfloat16, or zeros where
            k_pe has no columns. A scale is the first power of two not below `absmax / 448` and 1e-4, as in vLLM. NaN
            counts as 0 for absmax, and is stored as NaN; with an infinity among the 128, the scale is infinite, and all
            are read as NaN. Such a cache begins at a multiple of 4 bytes.
        scale: What elements are divided by: float32 of one element, or a number; None means 1. Not read for
            "fp8_ds_mla".
        skip_scale: Whether scale is not read, and counts as 1, as in vLLM.
        layer: Index into kv_cache's first axis, or a Tensor of one integer.
        backend: None, "triton", "torch" or "interpret".

    Raises:
        ValueError: a shape, choice, address or device does not fit.
        TypeError: a dtype does not fit.

    After `concat_and_cache_mla` of vLLM.
    """
    if skip_scale:
        scale = None
    kv_cache_dtype = as_format(kv_cache_dtype, "kv_cache", kv_cache)
    check_scale_type("scale", scale)
    check_options(kv_cache_dtype, None, None, layer, backend, BACKENDS)
    arguments = (
        kv_c,
        k_pe,
        kv_cache,
        slot_mapping,
        kv_cache_dtype,
        as_scale(scale, kv_cache),
        *as_layer(layer),
        backend,
    )
    try:
        _library.mla(*arguments)
    except (RuntimeError, AttributeError):
        explain(_library.mla, arguments)
        raise


def kv_scales(
    key: Tensor, value: Tensor, kv_cache_dtype: ScaledDtype, granularity: Granularity = "tensor"
) -> tuple[Tensor, Tensor]:
    """Static scales for keys and values like these, so that none of them saturates: `absmax / m`.

    m is the format's largest number, or 6 · 448 for nvfp4, whose scales of 16 elements reach 448 then. Read back, an
    element x of the sample is off by at most

        int8            half a scale: absmax / 254
        int4            half a scale: absmax / 14
        fp8 e4m3        |x| / 16 where it is normal, |x| ≥ 2^-6 scale (fnuz: 2^-7); else 2^-10 (2^-11) scale
        fp8 e5m2        |x| / 8 where |x| ≥ 2^-14 scale (fnuz: 2^-15); else 2^-17 (2^-18) scale
        nvfp4           17/96 of the absmax of its 16 elements, where that is ≥ 0.1 scale

    and float32's rounding. Samples with a NaN have the scale NaN, of zeros 1.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32, at least one element.
        value: Likewise, `[num_tokens, num_heads, head_size_v]`.
        kv_cache_dtype: Any but "auto" and "fp8_ds_mla".
        granularity: "tensor" for one scale, "head" for one a head.

    Returns:
        k_scale and v_scale: float32 of shape `()` or `[num_heads]`.

    Raises:
        ValueError: a shape or choice does not fit.
        TypeError: a dtype does not fit.
    """
    check_tensors(key=key, value=value)
    largest = check_kv_scales(spec_of(key), spec_of(value), kv_cache_dtype, granularity)
    axes = (0, 1, 2) if granularity == "tensor" else (0, 2)
    k_scale, v_scale = (scale_of(x.detach().abs().amax(axes).float(), largest) for x in (key, value))
    return k_scale, v_scale
