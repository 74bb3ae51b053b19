"""The public functions: vLLM's cache writes, for any layout."""

import numpy as np
import torch
from torch import Tensor

from kvcore.checks import check_options
from kvcore.layout import CacheLayout
from torchkv import _library

BACKENDS = ("triton", "torch", "interpret")


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    *,
    layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    backend: str | None = None,
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
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`.
        value_cache: V's blocks.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even; "fp8" (= "fp8_e4m3") and
            "fp8_e5m2" store `saturate(round(float32(x) / scale))` in caches of the fp8 dtype or of uint8.
        k_scale: float32 of one element, on the caches' device; None means 1. Unused with "auto". A number is made into
            such a tensor on every call.
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
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    _library.flash(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        scale_tensor(k_scale, key_cache),
        scale_tensor(v_scale, key_cache),
        *op_options(layout, layer),
        backend,
    )


def reshape_and_cache_flash_diffkv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    *,
    layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Writes keys and values of new tokens into one array that holds both, in place.

    As `reshape_and_cache_flash`, but for

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`; head_size_v may differ where the layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: "auto", "fp8", "fp8_e4m3" or "fp8_e5m2".
        k_scale: float32 of one element, a number, or None.
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
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    _library.diffkv(
        key,
        value,
        kv_cache,
        slot_mapping,
        kv_cache_dtype,
        scale_tensor(k_scale, kv_cache),
        scale_tensor(v_scale, kv_cache),
        *op_options(layout, layer),
        backend,
    )


def scale_tensor(scale: Tensor | float | None, cache: Tensor) -> Tensor | None:
    """A scale as the op's schema can carry it."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=cache.device)


def op_options(
    layout: str | CacheLayout | None, layer: int | Tensor | None
) -> tuple[str | None, int | None, Tensor | None]:
    """Layout and layer as the op's schema can carry them: it knows strings and integers, no layouts and no unions."""
    if isinstance(layout, CacheLayout):
        layout = layout.pattern
    elif layout is not None and not isinstance(layout, str):
        raise TypeError(f"layout must be a pattern string or a CacheLayout, got {layout!r}")
    if isinstance(layer, Tensor):
        return layout, None, layer
    return layout, int(layer) if isinstance(layer, np.integer) else layer, None
