"""What arguments of FlashInfer's functions mean in torchkv, and the error for those that mean nothing there."""

from typing import Any

import torch
from torch import Tensor

from kvcore.contract.checks import is_number
from kvcore.formats import FLOATS
from torchkv._arguments import dtype_name

PagedCache = Tensor | tuple[Tensor, Tensor]
"""One tensor `[num_pages, 2, …]`, or the key and the value cache."""

BACKENDS = ("auto", "fa2", "fa3", "trtllm-gen", "cute-dsl")
"""FlashInfer's, among which nothing is chosen here. Of `cudnn` and `cutlass`, arguments have other meanings."""


class UnsupportedError(ValueError):
    """An argument that FlashInfer's function has a use for and torchkv's has not."""


def check_absent(**arguments: Any) -> None:
    """Raises an UnsupportedError unless all of the arguments are None."""
    for name, argument in arguments.items():
        if argument is not None:
            got = f"a tensor of shape {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)
            raise UnsupportedError(f"{name} must be None, got {got}")


def check_no_more(args: tuple[Any, ...]) -> None:
    """Raises an UnsupportedError for arguments of kernels that a user wrote for FlashInfer."""
    if args:
        raise UnsupportedError(f"run must have no arguments of customised kernels, got {len(args)} after the cache")


def check_pos_encoding_mode(mode: str) -> None:
    """Raises an UnsupportedError for rotations and biases, which no attention of torchkv adds."""
    if mode != "NONE":
        raise UnsupportedError(
            f"pos_encoding_mode must be 'NONE', got {mode!r}: torchkv.rope_and_cache rotates queries and keys before "
            "the keys are written"
        )


def check_backend(backend: str) -> None:
    """Raises an UnsupportedError for a backend whose arguments mean something else."""
    if backend not in BACKENDS:
        raise UnsupportedError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def check_kv_layout(kv_layout: str) -> None:
    """Checks the layout of caches.

    Raises:
        ValueError: it is neither NHD nor HND.
    """
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"kv_layout must be 'NHD' or 'HND', got {kv_layout!r}")


def as_dtype(name: str, dtype: str | torch.dtype) -> torch.dtype:
    """A dtype, which may be given by its name.

    Raises:
        TypeError: it is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or its name, got {dtype!r}")
    return found


def check_data_types(q: Any, kv: Any, o: Any) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of queries and of caches, which None makes those of queries.

    Raises:
        UnsupportedError: queries are quantised, or results are to have another dtype than queries.
        TypeError: one is no dtype.
    """
    q_dtype = as_dtype("q_data_type", q)
    kv_dtype = q_dtype if kv is None else as_dtype("kv_data_type", kv)
    if str(q_dtype).removeprefix("torch.") not in FLOATS:
        raise UnsupportedError(f"q_data_type must be float16, bfloat16 or float32, got {q_dtype}")
    if o is not None and as_dtype("o_data_type", o) != q_dtype:
        raise UnsupportedError(f"o_data_type must be q_data_type, {q_dtype}, got {o}")
    return q_dtype, kv_dtype


def check_batch(batch: str, batch_size: int, **indptrs: Tensor) -> None:
    """Checks that tensors, by their names, say where each sequence of a batch begins, and where the last one ends.

    Raises:
        ValueError: one has another number of elements.
    """
    for name, indptr in indptrs.items():
        if len(indptr) != batch_size + 1:
            raise ValueError(f"{name} must have {batch_size + 1} elements, one more than {batch}, got {len(indptr)}")


def check_planned_dtype(name: str, tensor: Tensor, planned: str, dtype: torch.dtype) -> None:
    """Checks that a tensor has the dtype that plan was told.

    Raises:
        ValueError: it has another.
    """
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must have the dtype that plan was given as {planned}, {dtype}, got {tensor.dtype}")


def key_and_value(cache: PagedCache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """Views of the key and of the value cache, with all four axes; pages of one slot may come without that axis.

    Raises:
        ValueError: there are not two, or a rank does not fit.
    """
    check_kv_layout(kv_layout)
    if isinstance(cache, Tensor):
        if cache.dim() not in (4, 5) or cache.shape[1] != 2:
            raise ValueError(f"paged_kv_cache must have shape (num_pages, 2, …), got {tuple(cache.shape)}")
        cache = (cache[:, 0], cache[:, 1])
    if len(cache) != 2:
        raise ValueError(f"paged_kv_cache must be one tensor, or (k_cache, v_cache), got {len(cache)} tensors")
    if any(each.dim() not in (3, 4) for each in cache):
        shapes = [tuple(each.shape) for each in cache]
        raise ValueError(f"paged_kv_cache must have tensors of 4 axes, or of 3 for pages of 1 slot, got {shapes}")
    slot = 1 if kv_layout == "NHD" else 2
    key, value = (each if each.dim() == 4 else each.unsqueeze(slot) for each in cache)
    return key, value


def scales_of(
    q: Tensor, cache: Tensor, sm_scale: float | None, q_scale: Any, k_scale: Any, v_scale: Any
) -> tuple[float, Tensor | None, Any]:
    """What logits are multiplied by; what keys are, where that is a tensor; and what values are.

    Raises:
        UnsupportedError: a scale is a tensor that the kernels cannot take.
        TypeError: a scale is neither a number nor a tensor.
    """
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    key = None
    for name, factor in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is None:
            continue
        if is_number(factor):
            scale = scale if name == "v_scale" else scale * float(factor)
        elif not isinstance(factor, Tensor):
            raise TypeError(f"{name} must be a number or a tensor, got {factor!r}")
        elif name == "q_scale":
            raise UnsupportedError(f"q_scale must be a number, got a tensor of shape {tuple(factor.shape)}")
        elif name == "k_scale":
            if dtype_name(cache) in FLOATS:
                raise UnsupportedError(f"k_scale must be a number for a cache of {dtype_name(cache)}, got a tensor")
            key = factor
    return scale, key, v_scale
