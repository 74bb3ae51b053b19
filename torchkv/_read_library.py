"""Registration of the ops that read a cache with torch.library. As `_library`, but they return new tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils import _pytree as pytree

from kvcore.checks import no_triton_error
from kvcore.read_contract import Gather
from torchkv import _read_triton, _torch_read
from torchkv._call import interpret_error
from torchkv._memory import check_address
from torchkv._read import AttentionCall, GatherCall, describe_attention, describe_gather, refuse_gradients

_library = Library("torchkv", "FRAGMENT")

_CACHE = "str kv_cache_dtype, Tensor? k_scale, Tensor? v_scale, str? layout, SymInt? layer, Tensor? layer_index"
_ATTENTION = (
    "paged_attention(Tensor query, Tensor[] caches, Tensor block_tables, Tensor seq_lens, Tensor? query_start_loc, "
    "float? scale, bool causal, int? sliding_window, float? soft_cap, Tensor? sinks, "
    f"{_CACHE}, int? head_size_v, str? backend, str? scale_layout=None) -> (Tensor, Tensor)"
)
_GATHER = (
    "gather_kv(Tensor[] caches, Tensor block_tables, Tensor seq_lens, SymInt max_len, str? dtype, "
    f"{_CACHE}, int? head_size, int? head_size_v, str? backend, str? scale_layout=None) -> (Tensor, Tensor)"
)


def _attention_call(args: Sequence[Any]) -> AttentionCall:
    call = AttentionCall(*args)
    refuse_gradients("paged_attention", call.query, *call.caches, call.sinks, call.k_scale, call.v_scale)
    return call


def _gather_call(args: Sequence[Any]) -> GatherCall:
    call = GatherCall(*args)
    refuse_gradients("gather_kv", *call.caches, call.k_scale, call.v_scale)
    return call


def _attention_on_gpu(*args: Any) -> tuple[Tensor, Tensor]:
    call = _attention_call(args)
    if call.backend in (None, "triton"):
        return _read_triton.attention(call)
    if call.backend == "interpret":
        raise interpret_error(call.query.device)
    described = describe_attention(call)
    check_address(call.caches[0], described.cache.format)
    return _torch_read.attention(described, _attention_tensors(call))


def _attention_on_host(*args: Any) -> tuple[Tensor, Tensor]:
    call = _attention_call(args)
    described = describe_attention(call)
    if call.backend == "triton":
        raise no_triton_error(call.query.device.type)
    check_address(call.caches[0], described.cache.format)
    if call.backend == "interpret":
        return _read_triton.interpret_attention(described, call)
    return _torch_read.attention(described, _attention_tensors(call))


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = _attention_call(args)
    shape = describe_attention(call).out_shape
    return call.query.new_empty(shape), call.query.new_empty(shape[:2], dtype=torch.float32)


def _attention_tensors(call: AttentionCall) -> "_torch_read.AttentionTensors":
    layer = call.layer if call.layer_index is None else call.layer_index
    return _torch_read.AttentionTensors(
        call.query, tuple(call.caches), call.block_tables, call.seq_lens, call.query_start_loc, call.sinks,
        call.k_scale, call.v_scale, layer,
    )  # fmt: skip


def _gather_on_gpu(*args: Any) -> tuple[Tensor, Tensor]:
    call = _gather_call(args)
    if call.backend in (None, "triton"):
        return _read_triton.gather(call)
    if call.backend == "interpret":
        raise interpret_error(call.caches[0].device)
    described = describe_gather(call)
    check_address(call.caches[0], described.cache.format)
    return _gather_portably(described, call)


def _gather_on_host(*args: Any) -> tuple[Tensor, Tensor]:
    call = _gather_call(args)
    described = describe_gather(call)
    if call.backend == "triton":
        raise no_triton_error(call.caches[0].device.type)
    check_address(call.caches[0], described.cache.format)
    if call.backend == "interpret":
        return _read_triton.interpret_gather(described, call)
    return _gather_portably(described, call)


def _gather_portably(described: Gather, call: GatherCall) -> tuple[Tensor, Tensor]:
    layer = call.layer if call.layer_index is None else call.layer_index
    return _torch_read.gather(
        described, tuple(call.caches), call.block_tables, call.seq_lens, call.k_scale, call.v_scale, layer
    )


def _gather_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = _gather_call(args)
    described = describe_gather(call)
    dtype = getattr(torch, described.format.name)
    key, value = (call.caches[0].new_empty(shape, dtype=dtype) for shape in described.shapes)
    return key, value


def _define(schema: str, on_gpu: Callable[..., Any], on_host: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_host, "CPU")
    _library.impl(name, on_gpu, "CUDA")  # ROCm builds of torch use the same key
    torch.library.register_fake(f"torchkv::{name}", fake, lib=_library)
    op = getattr(torch.ops.torchkv, name).default

    def one_by_one(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """vmap: a call for each item."""
        refuse_gradients(name, *(a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)))

        def item(arg: Any, dim: Any, i: int) -> Any:
            if isinstance(arg, (list, tuple)):
                return [item(a, d, i) for a, d in zip(arg, dim or [None] * len(arg), strict=True)]
            return arg if dim is None else arg.select(dim, i)

        results = [op(*(item(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        first, second = (torch.stack(parts) for parts in zip(*results, strict=True))
        return (first, second), (0, 0)

    torch.library.register_vmap(f"torchkv::{name}", one_by_one, lib=_library)
    return op


attention = _define(_ATTENTION, _attention_on_gpu, _attention_on_host, _attention_fake)
gather = _define(_GATHER, _gather_on_gpu, _gather_on_host, _gather_fake)
