"""The ops that read a cache, as torch.library knows them.

Each has a variant, `…_out`, that writes its results to the tensors which are its first two arguments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kvcore.contract.read import Attention, Gather
from torchkv._arguments import refuse_gradients
from torchkv._call import AttentionCall, GatherCall, Results
from torchkv._library.base import Backends, call_each, define
from torchkv._torch import read as torch_read
from torchkv._triton.attention import Attentions
from torchkv._triton.gather import Gathers

_CACHE = "str kv_cache_dtype, Tensor? k_scale, Tensor? v_scale, str? layout, SymInt? layer, Tensor? layer_index"
_ATTENTION = (
    "Tensor query, Tensor[] caches, Tensor block_tables, Tensor seq_lens, Tensor? query_start_loc, float? scale, "
    "bool causal, int? sliding_window, float? soft_cap, Tensor? sinks, "
    f"{_CACHE}, int? head_size_v, str? backend, str? scale_layout=None"
)
_GATHER = (
    "Tensor[] caches, Tensor block_tables, Tensor? seq_lens, SymInt max_len, str? dtype, "
    f"{_CACHE}, int? head_size, int? head_size_v, str? backend, str? scale_layout=None"
)


# ---- attention


def _attention_call(*args: Any) -> AttentionCall:
    call = AttentionCall(*args)
    refuse_gradients("paged_attention", call.query, *call.caches, call.sinks, call.k_scale, call.v_scale)
    return call


def _attention_out_call(out: Tensor, lse: Tensor, *args: Any) -> AttentionCall:
    call = AttentionCall(*args, results=(out, lse))
    refuse_gradients("paged_attention", call.query, *call.caches, call.sinks, call.k_scale, call.v_scale, out, lse)
    return call


def _attention_in_torch(attention: Attention, call: AttentionCall) -> Results:
    return _in_place(torch_read.attention(attention, call), call.results)


def _attention_fake(attention: Attention, call: AttentionCall) -> Results:
    shape = attention.out_shape
    return call.results or (call.query.new_empty(shape), call.query.new_empty(shape[:2], dtype=torch.float32))


# ---- gather


def _name(call: GatherCall) -> str:
    return "gather_slots" if call.seq_lens is None else "gather_kv"


def _gather_call(*args: Any) -> GatherCall:
    call = GatherCall(*args)
    refuse_gradients(_name(call), *call.caches, call.k_scale, call.v_scale)
    return call


def _gather_out_call(key: Tensor, value: Tensor, *args: Any) -> GatherCall:
    call = GatherCall(*args, results=(key, value))
    refuse_gradients(_name(call), *call.caches, call.k_scale, call.v_scale, key, value)
    return call


def _gather_in_torch(gather: Gather, call: GatherCall) -> Results:
    return _in_place(torch_read.gather(gather, call), call.results)


def _gather_fake(gather: Gather, call: GatherCall) -> Results:
    if call.results is not None:
        return call.results
    dtype = getattr(torch, gather.format.name)
    key, value = (call.caches[0].new_empty(shape, dtype=dtype) for shape in gather.shapes)
    return key, value


# ---- both


def _in_place(computed: Results, results: Results | None) -> Results:
    """Results, copied to the tensors that a call brings for them, if it does."""
    if results is None:
        return computed
    for result, new in zip(results, computed, strict=True):
        result.copy_(new)
    return results


def _one_by_one(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """vmap: a call for each item of a batch."""
    _refuse_gradients_of(op, args)
    results = call_each(op, batch_size, in_dims, args)
    first, second = (torch.stack(items) for items in zip(*results, strict=True))
    return (first, second), (0, 0)


def _one_by_one_out(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[None, None]:
    """vmap: a call for each item of a batch, into that item's tensors for results."""
    _refuse_gradients_of(op, args)
    if in_dims[0] is None or in_dims[1] is None:
        raise ValueError("vmap must map the tensors that are given for results")
    call_each(op, batch_size, in_dims, args)
    return None, None


def _refuse_gradients_of(op: Any, args: Sequence[Any]) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    refuse_gradients(op._schema.name.removeprefix("torchkv::"), *tensors)


_ATTENTION_BACKENDS = Backends(_attention_in_torch, _attention_fake)
_GATHER_BACKENDS = Backends(_gather_in_torch, _gather_fake)

attention = define(
    f"paged_attention({_ATTENTION}) -> (Tensor, Tensor)",
    _attention_call,
    Attentions(results=False),
    _ATTENTION_BACKENDS,
    _one_by_one,
)
attention_out = define(
    f"paged_attention_out(Tensor(a!) out, Tensor(b!) lse, {_ATTENTION}) -> ()",
    _attention_out_call,
    Attentions(results=True),
    _ATTENTION_BACKENDS,
    _one_by_one_out,
)
gather = define(
    f"gather_kv({_GATHER}) -> (Tensor, Tensor)",
    _gather_call,
    Gathers(results=False),
    _GATHER_BACKENDS,
    _one_by_one,
)
gather_out = define(
    f"gather_kv_out(Tensor(a!) key, Tensor(b!) value, {_GATHER}) -> ()",
    _gather_out_call,
    Gathers(results=True),
    _GATHER_BACKENDS,
    _one_by_one_out,
)
