"""Calls of the ops that read a cache: their arguments under their names, and the contract's verdict on them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from kvcore.checks import ArraySpec
from kvcore.read_contract import Attention, Gather, Options, check_attention, check_gather
from torchkv._call import spec_of


class AttentionCall(NamedTuple):
    """Arguments of `paged_attention`, in the order of its schema.

    `layer` is a static index, `layer_index` one in memory; at most one of them is given.
    """

    query: Tensor
    caches: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    head_size_v: int | None
    backend: str | None
    scale_layout: str | None = None


class GatherCall(NamedTuple):
    """Arguments of `gather_kv`, in the order of its schema."""

    caches: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor
    max_len: int
    dtype: str | None
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    head_size: int | None
    head_size_v: int | None
    backend: str | None
    scale_layout: str | None = None


def refuse_gradients(name: str, *tensors: Tensor | None) -> None:
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


def describe_attention(call: AttentionCall) -> Attention:
    """What the contract says of a call; tensors may be fake."""
    return check_attention(
        spec_of(call.query),
        [spec_of(c) for c in call.caches],
        spec_of(call.block_tables),
        spec_of(call.seq_lens),
        _maybe(call.query_start_loc),
        _maybe(call.sinks),
        Options(call.scale, call.causal, call.sliding_window, call.soft_cap),
        call.kv_cache_dtype,
        _maybe(call.k_scale),
        _maybe(call.v_scale),
        call.layout,
        call.layer if call.layer_index is None else spec_of(call.layer_index),
        call.head_size_v,
        call.scale_layout,
    )


def describe_gather(call: GatherCall) -> Gather:
    """What the contract says of a call; tensors may be fake."""
    return check_gather(
        [spec_of(c) for c in call.caches],
        spec_of(call.block_tables),
        spec_of(call.seq_lens),
        call.max_len,
        call.dtype,
        call.kv_cache_dtype,
        _maybe(call.k_scale),
        _maybe(call.v_scale),
        call.layout,
        call.layer if call.layer_index is None else spec_of(call.layer_index),
        call.head_size,
        call.head_size_v,
        call.scale_layout,
    )


def _maybe(tensor: Tensor | None) -> ArraySpec | None:
    return None if tensor is None else spec_of(tensor)
