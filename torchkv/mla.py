"""The writer of multi-head latent attention's rows."""

from torch import Tensor

from kvcore.choices import KVCacheDtype, TorchBackend
from kvcore.contract.checks import check_options, check_scale_type
from torchkv._arguments import BACKENDS, as_format, as_layer, as_scale
from torchkv._library import write as _library
from torchkv._library.base import call, call_again


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
    """Writes the rows of multi-head latent attention into a paged cache, in place.

    A row is a token's latent vector kv_c, then k_pe, the rotary part of its key. It is to be read with the layout
    `block slot latent` and `head_size_v=kv_lora_rank`: the whole row is the key, the latent vector the value.

    Token t goes to slot `slot_mapping[t]`: place `slot % block_size` of block `slot // block_size`. Slots below 0 or at
    or above `num_blocks * block_size` are skipped. If two tokens have one slot, each element is one of the two,
    unspecified which (`find_duplicate_slots` finds them).

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided. No gradient flows into the caches.

    Args:
        kv_c: `[num_tokens, kv_lora_rank]` of float16, bfloat16 or float32: latent vectors.
        k_pe: `[num_tokens, qk_rope_head_dim]` of kv_c's dtype.
        kv_cache: `[num_blocks, block_size, row]`, with `num_layers` in front where layer is given. A row has
            kv_lora_rank + qk_rope_head_dim elements: half as many bytes for "int4", 9 / 16 for "nvfp4", and 656 bytes
            for "fp8_ds_mla".
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
            and is stored as NaN; with an infinity among the 128, the scale is infinite, and all are read as NaN. Such a
            cache begins at a multiple of 4 bytes. vLLM's names are understood, too: "bfloat16", "float16", "half",
            "float32" and "float" are "auto" for caches of that dtype, "fp8_inc" is "fp8".
        scale: What elements are divided by: float32 of one element, or `[num_layers, 1]`, of which the layer's counts,
            on the cache's device; or a number, of which each call makes a tensor. None means 1. Not read for "auto" and
            "fp8_ds_mla".
        skip_scale: Whether scale is not read, and counts as 1, as in vLLM.
        layer: Index into kv_cache's first axis. A Tensor of one integer, on the cache's device, is read by the kernel;
            out of range there, nothing is written.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, choice, address or device does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> kv_c, k_pe = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])  # 1 token
        >>> kv_cache = torch.zeros((3, 4, 3))  # 3 blocks of 4 slots
        >>> torchkv.concat_and_cache_mla(kv_c, k_pe, kv_cache, torch.tensor([5]))
        >>> kv_cache[1].tolist()  # slot 5 is place 1 of block 1
        [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    After `concat_and_cache_mla` of vLLM.
    """
    if skip_scale:
        scale = None
    tensors, rest = (kv_c, k_pe, kv_cache, slot_mapping), (*as_layer(layer), backend)
    if call_again(_library.mla, (*tensors, kv_cache_dtype, scale, *rest)) is None:
        stored = as_format(kv_cache_dtype, "kv_cache", kv_cache)
        check_scale_type("scale", scale)
        check_options(stored, None, None, layer, backend, BACKENDS)
        call(_library.mla, (*tensors, stored, as_scale(scale, kv_cache), *rest))
