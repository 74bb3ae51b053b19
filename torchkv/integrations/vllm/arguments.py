"""What arguments of vLLM's functions mean in torchkv, and the error for those that mean nothing there."""

import functools
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from kvcore.contract.checks import either
from kvcore.formats import FLOATS, KV_CACHE_DTYPES
from torchkv._arguments import VLLM_FORMATS, dtype_name

NONE, FP8_PER_TENSOR, INT8_PER_TOKEN_HEAD, FP8_PER_TOKEN_HEAD, INT4_PER_TOKEN_HEAD = range(5)
"""vLLM's KVQuantMode, an IntEnum, as far as it is used here."""

_FP8 = {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.float8_e5m2fnuz: "fp8_e5m2fnuz",
}


class UnsupportedError(ValueError):
    """An argument that vLLM's function has a use for and torchkv's has not."""


def check_device(tensor: Tensor) -> None:
    """Raises an UnsupportedError unless the tensor is where torchkv's ops run."""
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"tensors must be on a CPU, CUDA or ROCm device, got {tensor.device}")


def check_floats(**tensors: Tensor) -> None:
    """Raises an UnsupportedError for a quantised tensor: on CUDA, vLLM's queries are in fp8 where the cache is."""
    for name, tensor in tensors.items():
        if dtype_name(tensor) not in FLOATS:
            raise UnsupportedError(f"{name} must have dtype {either(FLOATS)}, got {dtype_name(tensor)}")


def check_absent(**arguments: Any) -> None:
    """Raises an UnsupportedError unless all of the arguments are None."""
    for name, argument in arguments.items():
        if argument is not None:
            raise UnsupportedError(f"{name} must be None, got {printed(argument)}")


def printed(argument: Any) -> str:
    """An argument as errors print it: of a tensor, its shape."""
    return f"a tensor of shape {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)


# ---- formats


def cache_format(kv_cache_dtype: str, cache: Tensor) -> Any:
    """What torchkv calls the format that vLLM's `_custom_ops` store for a kv_cache_dtype."""
    check_device(cache)
    if kv_cache_dtype in ("fp8", "fp8_e4m3", "fp8_inc"):
        name = fp8_format(cache)
        return name if "e4m3" in name else "fp8_e4m3"
    if kv_cache_dtype not in KV_CACHE_DTYPES and kv_cache_dtype not in VLLM_FORMATS:
        raise UnsupportedError(f"kv_cache_dtype must be a format of torchkv, got {kv_cache_dtype!r}")
    return kv_cache_dtype


def triton_cache_format(kv_cache_dtype: str, cache: Tensor) -> Any:
    """The format that vLLM's Triton kernels store: of fp8 what the cache's dtype says, and e4m3 in uint8."""
    if kv_cache_dtype.startswith("fp8") and cache.dtype in _FP8:
        check_device(cache)
        return _FP8[cache.dtype]
    if kv_cache_dtype == "fp8_e5m2":
        raise UnsupportedError(
            "kv_cache_dtype must not be 'fp8_e5m2' for caches of uint8, where vLLM's kernel stores e4m3; "
            f"got a cache of {dtype_name(cache)}"
        )
    return cache_format(kv_cache_dtype, cache)


def fp8_format(cache: Tensor) -> str:
    """The format of an fp8 cache: that of its dtype, or for bytes vLLM's "fp8", which depends on the platform."""
    return _FP8.get(cache.dtype) or ("fp8_e4m3fnuz" if _has_fnuz(cache.device) else "fp8_e4m3")


@functools.cache
def _has_fnuz(device: torch.device) -> bool:
    """Whether it is an AMD MI300, whose fp8 has one zero."""
    if torch.version.hip is None or device.type != "cuda":
        return False
    return "gfx94" in torch.cuda.get_device_properties(device).gcnArchName


def mode_of(kv_quant_mode: Any) -> Any:
    """The mode that a format's name stands for; other modes stay as they are."""
    if isinstance(kv_quant_mode, str):
        known = {"int8_per_token_head": INT8_PER_TOKEN_HEAD, "fp8_per_token_head": FP8_PER_TOKEN_HEAD}
        return known.get(kv_quant_mode, kv_quant_mode)
    return kv_quant_mode


def per_token_head_format(kv_quant_mode: Any, cache: Tensor) -> Any:
    """The format of a cache with a scale for each token and head; a mode of None means what the cache's dtype says."""
    check_device(cache)
    kv_quant_mode = mode_of(kv_quant_mode)
    if kv_quant_mode is None:
        kv_quant_mode = INT8_PER_TOKEN_HEAD if cache.dtype == torch.int8 else FP8_PER_TOKEN_HEAD
    if kv_quant_mode == INT8_PER_TOKEN_HEAD:
        return "int8"
    if kv_quant_mode == FP8_PER_TOKEN_HEAD:
        return fp8_format(cache)
    mode = kv_quant_mode.name if isinstance(kv_quant_mode, Enum) else kv_quant_mode
    reason = ""
    if kv_quant_mode in (INT4_PER_TOKEN_HEAD, "int4_per_token_head"):
        reason = ": vLLM's int4 is rotated and has zero points, which torchkv's has not"
    raise UnsupportedError(f"kv_quant_mode must be INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD, got {mode}{reason}")
