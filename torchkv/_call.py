"""One call of an op: its arguments under their names, and the contract's verdict on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.checks import ArraySpec
from kvcore.contract import Write, check_write


class Call(NamedTuple):
    """Arguments of either op, in the order of their schemas, but for the caches, which are one argument or two there.

    `layer` is a static index, `layer_index` one in memory; at most one of them is given.
    """

    key: Tensor
    value: Tensor
    caches: tuple[Tensor, ...]
    slot_mapping: Tensor
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    backend: str | None


def check(call: Call) -> Write:
    """What the contract says of a call; tensors may be fake.

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.
    """
    return check_write(
        spec_of(call.key),
        spec_of(call.value),
        [spec_of(c) for c in call.caches],
        spec_of(call.slot_mapping),
        call.kv_cache_dtype,
        None if call.k_scale is None else spec_of(call.k_scale),
        None if call.v_scale is None else spec_of(call.v_scale),
        call.layout,
        call.layer if call.layer_index is None else spec_of(call.layer_index),
    )


def interpret_error(device: torch.device) -> ValueError:
    """The error for the backend "interpret" where memory is not the host's."""
    return ValueError(f"backend 'interpret' needs CPU tensors, got device {device}")


def dtype_name(tensor: Tensor) -> str:
    """The dtype's name, as NumPy and JAX have it."""
    return str(tensor.dtype).removeprefix("torch.")


def spec_of(tensor: Tensor) -> ArraySpec:
    """What the contract asks of a tensor."""
    return ArraySpec(tuple(tensor.shape), dtype_name(tensor), tensor.stride(), str(tensor.device))
