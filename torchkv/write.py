"""Writers that store elements as they are, cast, or quantised with static scales."""

from typing import Any

from torch import Tensor

from kvcore.choices import KVCacheDtype, Layout, TorchBackend
from kvcore.contract.checks import check_options
from torchkv._arguments import BACKENDS, as_format, as_layer, as_pattern, as_scale
from torchkv._library import write as _library
from torchkv._library.base import call, call_again


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

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided. No gradient flows into the caches.

    Under torch.compile nothing is copied, with one exception: where both caches reach the compiled function as views of
    one tensor, inductor copies one of them on every call. Pass the tensor and take the views inside.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16, float32, or the cache's fp8 dtype.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`. Axis dim
            counts bytes where two elements share one: `head_size / 2` for "int4", `head_size / 2 + head_size / 16` for
            "nvfp4".
        value_cache: V's blocks.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even. The others store
            `saturate(round(float32(x) / scale))`: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" and "fp8_e5m2fnuz"
            in caches of that dtype or of uint8; "int8", from -127 to 127, in int8 or uint8; "int4", from -7 to 7, in
            uint8, two elements a byte, the first in its low half. NaN is 0 in both of these. "nvfp4" stores e2m1 in
            uint8, two elements a byte, and a scale in e4m3 for each group of 16 elements of a head:
            `b = absmax / 6 / scale`. Elements are multiplied by `1 / (b * scale)`. In each block, or its part of K or
            of V, all elements lie before all these scales. vLLM's names are understood, too: "bfloat16", "float16",
            "half", "float32" and "float" are "auto" for caches of that dtype, "fp8_inc" is "fp8".
        k_scale: float32 of one element, `[num_heads]`, `[num_layers, 1]` or `[num_layers, num_heads]`, of which the
            layer's count, on the caches' device; or a number, of which each call makes a tensor. None means 1. Unused
            with "auto". `kv_scales` computes good ones. Zero, negative numbers and NaN divide as IEEE 754 has it.
        v_scale: What value is divided by; of the same shapes.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more (`[num_blocks, num_heads, head_size / x, block_size, x]`).
        layer: Index into the layout's `layer` axis, which None means not to have. A Tensor of one integer, on the
            caches' device, is read by the kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or the caches overlap.
        TypeError: a dtype does not fit.

    Example:
        >>> key = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 tokens, 1 head of 2 elements
        >>> key_cache, value_cache = torch.zeros((2, 3, 4, 1, 2))  # each of 3 blocks of 4 slots
        >>> slot_mapping = torch.tensor([5, -1])
        >>> torchkv.reshape_and_cache_flash(key, -key, key_cache, value_cache, slot_mapping)
        >>> key_cache[1, :, 0].tolist()  # slot 5 is place 1 of block 1; the second token is skipped
        [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]

    After `triton_reshape_and_cache_flash` of vLLM.
    """
    tensors, rest = (key, value, key_cache, value_cache, slot_mapping), (as_pattern(layout), *as_layer(layer), backend)
    if call_again(_library.flash, (*tensors, kv_cache_dtype, k_scale, v_scale, *rest)) is None:
        options = _checked("key_cache", key_cache, kv_cache_dtype, k_scale, v_scale, layer, backend)
        call(_library.flash, (*tensors, *options, *rest))


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
    """Writes keys and values of new tokens into one tensor that holds both, in place.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided. No gradient flows into the caches.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16, float32, or the cache's fp8 dtype.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype; head_size_v may differ from head_size where the
            layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order. Two elements share a byte in "int4" and "nvfp4".
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "auto" copies, or rounds to the cache's dtype, to nearest even. The others store
            `saturate(round(float32(x) / scale))`: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" and "fp8_e5m2fnuz"
            in caches of that dtype or of uint8; "int8", from -127 to 127, in int8 or uint8; "int4", from -7 to 7, in
            uint8, two elements a byte, the first in its low half. NaN is 0 in both of these. "nvfp4" stores e2m1 in
            uint8, two elements a byte, and a scale in e4m3 for each group of 16 elements of a head:
            `b = absmax / 6 / scale`. Elements are multiplied by `1 / (b * scale)`. In each block, or its part of K or
            of V, all elements lie before all these scales. vLLM's names are understood, too: "bfloat16", "float16",
            "half", "float32" and "float" are "auto" for caches of that dtype, "fp8_inc" is "fp8".
        k_scale: float32 of one element, `[num_heads]`, `[num_layers, 1]` or `[num_layers, num_heads]`, of which the
            layer's count, on the caches' device; or a number, of which each call makes a tensor. None means 1. Unused
            with "auto". `kv_scales` computes good ones. Zero, negative numbers and NaN divide as IEEE 754 has it.
        v_scale: What value is divided by; of the same shapes.
        layout: Pattern, constant's name or `CacheLayout`, of a single tensor. None means `block slot head k+v`:
            `[num_blocks, block_size, num_heads, head_size + head_size_v]`.
        layer: Index into the layout's `layer` axis, which None means not to have. A Tensor of one integer, on the
            caches' device, is read by the kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> key, value = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]])  # 1 token, 1 head of 2 elements and of 1
        >>> kv_cache = torch.zeros((3, 4, 1, 3))  # 3 blocks of 4 slots
        >>> torchkv.reshape_and_cache_flash_diffkv(key, value, kv_cache, torch.tensor([5]))
        >>> kv_cache[1, :, 0].tolist()  # slot 5 is place 1 of block 1
        [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    After `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    tensors, rest = (key, value, kv_cache, slot_mapping), (as_pattern(layout), *as_layer(layer), backend)
    if call_again(_library.diffkv, (*tensors, kv_cache_dtype, k_scale, v_scale, *rest)) is None:
        options = _checked("kv_cache", kv_cache, kv_cache_dtype, k_scale, v_scale, layer, backend)
        call(_library.diffkv, (*tensors, *options, *rest))


def _checked(
    name: str, cache: Tensor, kv_cache_dtype: Any, k_scale: Any, v_scale: Any, layer: Any, backend: Any
) -> tuple[Any, Tensor | None, Tensor | None]:
    """kv_cache_dtype, k_scale and v_scale as the op takes them.

    Raises:
        ValueError: kv_cache_dtype or backend is none of the choices.
        TypeError: a scale or layer is neither a number nor an array, or the cache has not the dtype that it must have.
    """
    stored = as_format(kv_cache_dtype, name, cache)
    check_options(stored, k_scale, v_scale, layer, backend, BACKENDS)
    return stored, as_scale(k_scale, cache), as_scale(v_scale, cache)
