"""What users may pass: tensors, numbers and layouts as the ops' schemas and the contract can have them."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import check_cache_count, stored_dtype_error
from kvcore.contract.rope import split_caches
from kvcore.formats import KV_CACHE_DTYPES
from kvcore.layout import CacheLayout
from kvcore.scales import check_scale_layout_type

BACKENDS = ("triton", "torch", "interpret")
"""What `backend` may be, beside None."""

VLLM_FORMATS = {
    "fp8_inc": "fp8",
    "int8_per_token_head": "int8",
    "fp8_per_token_head": "fp8",
    "bfloat16": "auto",
    "float16": "auto",
    "half": "auto",
    "float32": "auto",
    "float": "auto",
}
"""vLLM's names of formats, which the functions that write understand beside their own."""

_VLLM_DTYPES = {"half": "float16", "float": "float32"}
"""vLLM's short names of dtypes, among the formats above."""


# ---- what the contract asks of tensors


def dtype_name(tensor: Tensor) -> str:
    """The dtype's name, as NumPy and JAX have it."""
    return str(tensor.dtype).removeprefix("torch.")


def spec_of(tensor: Tensor) -> ArraySpec:
    """What the contract asks of a tensor."""
    return ArraySpec(tuple(tensor.shape), dtype_name(tensor), tensor.stride(), str(tensor.device))


def maybe_spec(tensor: Tensor | None) -> ArraySpec | None:
    """What the contract asks of a tensor that may be absent."""
    return None if tensor is None else spec_of(tensor)


# ---- what schemas can carry: tensors, numbers and strings, but no unions of them


def as_caches(caches: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One cache or two, as a list."""
    if isinstance(caches, Tensor):
        return [caches]
    if not isinstance(caches, (list, tuple, Sequence)):
        raise TypeError(f"caches must be a torch.Tensor or a sequence of them, got {type(caches).__name__}")
    check_cache_count(len(caches))
    return list(caches)


def as_memory(caches: Any, name: str = "caches") -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Key cache, value cache, and a scale cache of each, out of the caches that there are, in this order.

    Errors call them by that name.
    """
    if isinstance(caches, Tensor):
        return caches, None, None, None
    if not isinstance(caches, (list, tuple, Sequence)):
        raise TypeError(f"{name} must be a torch.Tensor or a sequence of them, got {type(caches).__name__}")
    arrays, scale_caches = split_caches(caches, name)
    for i, cache in enumerate(caches):
        if not isinstance(cache, Tensor):
            raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(cache).__name__}")
    value_cache = arrays[1] if len(arrays) == 2 else None
    k_scale_cache, v_scale_cache = scale_caches or (None, None)
    return arrays[0], value_cache, k_scale_cache, v_scale_cache


def as_scale(scale: Any, cache: Tensor) -> Tensor | None:
    """A scale as a tensor on the cache's device. Of another type than a scale's it is refused later."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    device = getattr(cache, "device", None)
    if isinstance(scale, np.generic):
        scale = scale.item()
    elif hasattr(scale, "shape"):  # an array of NumPy's
        return torch.as_tensor(scale, device=device)
    return torch.full((), scale, dtype=torch.float32, device=device)


def as_format(kv_cache_dtype: str, name: str, cache: Tensor) -> Any:
    """The format that a name, ours or vLLM's, stands for.

    Args:
        kv_cache_dtype: The name. What is none is returned as it is: it has its error later.
        name: What errors call the cache.
        cache: The cache, whose dtype a name such as "bfloat16" must be.

    Raises:
        TypeError: the cache has another dtype.
    """
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype in KV_CACHE_DTYPES:
        return kv_cache_dtype
    stored = VLLM_FORMATS.get(kv_cache_dtype, kv_cache_dtype)
    if stored == "auto":
        dtype = _VLLM_DTYPES.get(kv_cache_dtype, kv_cache_dtype)
        if dtype_name(cache) != dtype:
            raise stored_dtype_error(name, [dtype], kv_cache_dtype, dtype_name(cache))
    return stored


def as_pattern(layout: str | CacheLayout | None) -> str | None:
    """A layout as its pattern; names of constants stay as they are."""
    if layout is None or isinstance(layout, str):
        return layout
    if not isinstance(layout, CacheLayout):
        layout = CacheLayout.of(layout)  # raises: it is none
    return layout.pattern


def as_scale_pattern(scale_layout: str | CacheLayout | None) -> str | None:
    """A layout of scale caches as its pattern. As a `CacheLayout` it has an axis dim, of size 1, that they have not."""
    if isinstance(scale_layout, CacheLayout):
        return scale_layout.pattern.replace(" dim", "")
    if scale_layout is not None:
        check_scale_layout_type(scale_layout)
    return scale_layout


def as_layer(layer: int | Tensor | None) -> tuple[int | None, Tensor | None]:
    """A layer as a static index and one in memory, of which at most one is given."""
    if layer is None:
        return None, None
    if isinstance(layer, Tensor):
        return None, layer
    return int(layer) if isinstance(layer, np.integer) else layer, None


# ---- errors


def check_tensors(**tensors: Any) -> None:
    """Raises a TypeError unless all arguments, by their names, are tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def refuse_gradients(name: str, *tensors: Any) -> None:
    """Raises where autograd follows one of the tensors, backward or forward: it would lose track of them in silence.

    An autograd kernel in Python would cost each call more than all else. So the ops' own kernels ask, where tensors
    still say whether they require gradients, and so do the public functions and the rules of vmap: below the other
    transforms of torch.func, tensors no longer say it.
    """
    followed = False
    if torch.is_grad_enabled():
        for tensor in tensors:
            followed = followed or (isinstance(tensor, Tensor) and tensor.requires_grad)
    if forward_ad._current_level >= 0:
        for tensor in tensors:  # what vmap maps cannot be unpacked; its rule asks again
            if isinstance(tensor, Tensor) and not is_batchedtensor(tensor):
                followed = followed or forward_ad.unpack_dual(tensor).tangent is not None
    if followed:
        raise NotImplementedError(
            f"torchkv.{name} is not differentiable: detach its arguments, or call it under torch.no_grad()"
        )


def explain(op: Any, arguments: Sequence[Any]) -> None:
    """Raises a line on the first argument of a type that the op's schema does not have, where there is one.

    For when torch's dispatcher has refused a call, with a page: asked before, each call would pay for it.

    Raises:
        TypeError: an argument is of a wrong type.
    """
    if "torch.distributed.tensor" in sys.modules and "torchkv.distributed" not in sys.modules:
        from torch.distributed.tensor import DTensor

        if any(isinstance(argument, DTensor) for argument in pytree.tree_leaves(arguments)):
            raise TypeError("DTensors need torchkv.distributed, which must be imported, got it not imported")
    if torch.compiler.is_compiling():  # dynamo cannot trace schemas; its own error has the reason
        return
    for parameter, argument in zip(op._schema.arguments, arguments, strict=False):
        kind, name = str(parameter.type), parameter.name
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").rstrip("]") if optional else kind
        if optional and argument is None:
            continue
        if kind == "List[Tensor]":
            check_tensors(**{f"{name}[{i}]": tensor for i, tensor in enumerate(argument)})
            continue
        wanted, types = _TYPES[kind]
        if not isinstance(argument, types) or (kind == "int" and isinstance(argument, bool)):
            plain = isinstance(argument, (int, float, str, type(None)))
            got = repr(argument) if plain else type(argument).__name__
            raise TypeError(f"{name} must be {'None or ' if optional else ''}{wanted}, got {got}")


_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "Tensor": ("a torch.Tensor", (Tensor,)),
    "int": ("an int", (int, np.integer, torch.SymInt)),
    "float": ("a number", (int, float, np.number)),
    "bool": ("True or False", (bool,)),
    "str": ("a string", (str,)),
}
"""Types of schemas, as errors call them, and in Python."""
