"""Writers that compute a scale for each head of each token, and write the scales to scale caches."""

from torch import Tensor

from kvcore.choices import Layout, PerTokenHeadDtype, TorchBackend
from kvcore.contract.checks import check_options
from kvcore.layout import CacheLayout
from torchkv._arguments import BACKENDS, as_format, as_layer, as_pattern, as_scale_pattern
from torchkv._library import write as _library
from torchkv._library.base import call, call_again


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
    """Quantises keys and values of new tokens, each head of a token by its own scale, in place.

    The scale of a head is its absmax divided by the format's largest number (448 for e4m3, 57344 for e5m2, 240 and
    57344 for their fnuz forms, 127 for int8, 7 for int4), in float32; or 1 where that is below 2^-126, as for zeros.
    Elements are `saturate(round(float32(x) / scale))`. With a NaN among them, the scale is NaN; with an infinity,
    infinite: such a head reads as NaN. The scales go to k_scale_cache and v_scale_cache.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided. No gradient flows into the caches.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype.
        key_cache: K's blocks, in the layout's order; NHD is `[num_blocks, block_size, num_heads, head_size]`.
        value_cache: V's blocks.
        k_scale_cache: float32: K's scales, in the scale layout's order: usually `[num_blocks, block_size, num_heads]`.
            `paged_attention` and `gather_kv` take it as k_scale.
        v_scale_cache: float32: V's scales, which they take as v_scale.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" or "fp8_e5m2fnuz", in caches of that dtype or
            of uint8; "int8", in int8 or uint8; "int4", in uint8, two elements a byte, the first in its low half, so
            that axis dim counts `head_size / 2` bytes.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more (`[num_blocks, num_heads, head_size / x, block_size, x]`).
        scale_layout: Pattern of the scale caches: block, slot and head in any order, and layer where the caches have
            it; two, separated by a comma, where the two differ. None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the `layer` axis of caches and scale caches, which None means not to have. A Tensor of one
            integer, on the caches' device, is read by the kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or caches or scale caches overlap.
        TypeError: a dtype does not fit.

    Example:
        >>> key = torch.tensor([[[-1.0, 127.0]], [[2.0, 254.0]]])  # 2 tokens, 1 head of 2 elements
        >>> caches = torch.zeros((2, 3, 4, 1, 2), dtype=torch.int8)  # for K and for V, 3 blocks of 4 slots
        >>> scale_caches = torch.zeros((2, 3, 4, 1))
        >>> torchkv.reshape_and_cache_flash_per_token_head_quant(
        ...     key, key, *caches, *scale_caches, torch.tensor([4, 5]), "int8"
        ... )
        >>> caches[0, 1, :2, 0].tolist(), scale_caches[0, 1, :2, 0].tolist()
        ([[-1, 127], [1, 127]], [1.0, 2.0])

    After `triton_reshape_and_cache_flash_per_token_head_quant` of vLLM.
    """
    tensors = (key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping)
    rest = (as_pattern(layout), as_scale_pattern(scale_layout), *as_layer(layer), backend)
    if call_again(_library.flash_quant, (*tensors, kv_cache_dtype, *rest)) is None:
        stored = as_format(kv_cache_dtype, "key_cache", key_cache)
        check_options(stored, None, None, layer, backend, BACKENDS)
        call(_library.flash_quant, (*tensors, stored, *rest))


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
    """Quantises keys and values, each head of a token by its own scale, into one tensor, in place.

    The scale of a head is its absmax divided by the format's largest number (448 for e4m3, 57344 for e5m2, 240 and
    57344 for their fnuz forms, 127 for int8, 7 for int4), in float32; or 1 where that is below 2^-126, as for zeros.
    Elements are `saturate(round(float32(x) / scale))`. With a NaN among them, the scale is NaN; with an infinity,
    infinite: such a head reads as NaN. The scales go to k_scale_cache and v_scale_cache.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided. No gradient flows into the caches.

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32.
        value: `[num_tokens, num_heads, head_size_v]` of key's dtype; head_size_v may differ from head_size where the
            layout has an axis `k+v`.
        kv_cache: K and V, in the layout's order.
        k_scale_cache: float32: K's scales, in the scale layout's order: usually `[num_blocks, block_size, num_heads]`.
            `paged_attention` and `gather_kv` take it as k_scale.
        v_scale_cache: float32: V's scales, which they take as v_scale.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        kv_cache_dtype: "fp8" (= "fp8_e4m3"), "fp8_e5m2", "fp8_e4m3fnuz" or "fp8_e5m2fnuz", in caches of that dtype or
            of uint8; "int8", in int8 or uint8; "int4", in uint8, two elements a byte, the first in its low half, so
            that axis dim counts `head_size / 2` bytes.
        layout: Pattern, constant's name or `CacheLayout`, of a single tensor. None means `block slot head k+v`:
            `[num_blocks, block_size, num_heads, head_size + head_size_v]`.
        scale_layout: Pattern of the scale caches: block, slot and head in any order, and layer where the caches have
            it; two, separated by a comma, where the two differ. None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the `layer` axis of caches and scale caches, which None means not to have. A Tensor of one
            integer, on the caches' device, is read by the kernel; out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or cache or scale caches overlap.
        TypeError: a dtype does not fit.

    Example:
        >>> key = torch.tensor([[[-1.0, 127.0]]])  # 1 token, 1 head of 2 elements
        >>> value = torch.tensor([[[5.0]]])  # and of 1 element
        >>> kv_cache = torch.zeros((3, 4, 1, 3), dtype=torch.int8)  # 3 blocks of 4 slots
        >>> scale_caches = torch.zeros((2, 3, 4, 1))
        >>> torchkv.reshape_and_cache_flash_diffkv_per_token_head_quant(
        ...     key, value, kv_cache, *scale_caches, torch.tensor([5]), "int8"
        ... )
        >>> kv_cache[1, 1, 0].tolist(), scale_caches[0][1, :, 0].tolist()
        ([-1, 127, 127], [0.0, 1.0, 0.0, 0.0])

    After `triton_reshape_and_cache_flash_per_token_head_quant` and `triton_reshape_and_cache_flash_diffkv` of vLLM.
    """
    tensors = (key, value, kv_cache, k_scale_cache, v_scale_cache, slot_mapping)
    rest = (as_pattern(layout), as_scale_pattern(scale_layout), *as_layer(layer), backend)
    if call_again(_library.diffkv_quant, (*tensors, kv_cache_dtype, *rest)) is None:
        stored = as_format(kv_cache_dtype, "kv_cache", kv_cache)
        check_options(stored, None, None, layer, backend, BACKENDS)
        call(_library.diffkv_quant, (*tensors, stored, *rest))
