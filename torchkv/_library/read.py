"""Registration of the ops that read a cache with torch.library. As `_library`, but they return new tensors.

Each has a twin, `…_out`, that writes its results to tensors given for them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils import _pytree as pytree

from kvcore.contract.checks import no_triton_error
from kvcore.contract.read import Attention, Gather
from torchkv._call import interpret_error
from torchkv._memory import check_address, check_results_apart
from torchkv._read_call import (
    ATTENTION_RESULTS,
    GATHER_RESULTS,
    AttentionCall,
    GatherCall,
    Results,
    attention_inputs,
    check_attention_results,
    check_gather_results,
    describe_attention,
    describe_gather,
    gather_inputs,
    refuse_gradients,
)
from torchkv._torch import read as _torch_read
from torchkv._triton import read as _read_triton

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


def _attention_call(args: Sequence[Any], given: Results | None) -> AttentionCall:
    call = AttentionCall(*args)
    tensors = (call.query, *call.caches, call.sinks, call.k_scale, call.v_scale, *(given or ()))
    refuse_gradients("paged_attention", *tensors)
    return call


def _gather_call(args: Sequence[Any], given: Results | None) -> GatherCall:
    call = GatherCall(*args)
    refuse_gradients("gather_kv", *call.caches, call.k_scale, call.v_scale, *(given or ()))
    return call


def _attention_on_gpu(*args: Any, given: Results | None = None) -> Results:
    call = _attention_call(args, given)
    if call.backend in (None, "triton"):
        return _bumped(_read_triton.attention(call, given), given)
    if call.backend == "interpret":
        raise interpret_error(call.query.device)
    return _attention_portably(_checked_attention(call, given), call, given)


def _attention_on_host(*args: Any, given: Results | None = None) -> Results:
    call = _attention_call(args, given)
    described = _checked_attention(call, given)
    if call.backend == "triton":
        raise no_triton_error(call.query.device.type)
    if call.backend == "interpret":
        return _bumped(_read_triton.interpret_attention(described, call, given), given)
    return _attention_portably(described, call, given)


def _attention_portably(described: Attention, call: AttentionCall, given: Results | None) -> Results:
    return _copied(_torch_read.attention(described, _attention_tensors(call)), given)


def _checked_attention(call: AttentionCall, given: Results | None) -> Attention:
    described = describe_attention(call)
    check_address(call.caches[0], described.cache.format)
    if given is not None:
        check_attention_results(described, given)
        check_results_apart(ATTENTION_RESULTS, given, attention_inputs(call))
    return described


def _attention_fake(*args: Any, given: Results | None = None) -> Results:
    call = _attention_call(args, given)
    described = describe_attention(call)
    if given is not None:
        check_attention_results(described, given)
        return given
    shape = described.out_shape
    return call.query.new_empty(shape), call.query.new_empty(shape[:2], dtype=torch.float32)


def _attention_tensors(call: AttentionCall) -> "_torch_read.AttentionTensors":
    layer = call.layer if call.layer_index is None else call.layer_index
    return _torch_read.AttentionTensors(
        call.query, tuple(call.caches), call.block_tables, call.seq_lens, call.query_start_loc, call.sinks,
        call.k_scale, call.v_scale, layer,
    )  # fmt: skip


def _gather_on_gpu(*args: Any, given: Results | None = None) -> Results:
    call = _gather_call(args, given)
    if call.backend in (None, "triton"):
        return _bumped(_read_triton.gather(call, given), given)
    if call.backend == "interpret":
        raise interpret_error(call.caches[0].device)
    return _gather_portably(_checked_gather(call, given), call, given)


def _gather_on_host(*args: Any, given: Results | None = None) -> Results:
    call = _gather_call(args, given)
    described = _checked_gather(call, given)
    if call.backend == "triton":
        raise no_triton_error(call.caches[0].device.type)
    if call.backend == "interpret":
        return _bumped(_read_triton.interpret_gather(described, call, given), given)
    return _gather_portably(described, call, given)


def _gather_portably(described: Gather, call: GatherCall, given: Results | None) -> Results:
    layer = call.layer if call.layer_index is None else call.layer_index
    computed = _torch_read.gather(
        described, tuple(call.caches), call.block_tables, call.seq_lens, call.k_scale, call.v_scale, layer
    )
    return _copied(computed, given)


def _checked_gather(call: GatherCall, given: Results | None) -> Gather:
    described = describe_gather(call)
    check_address(call.caches[0], described.cache.format)
    if given is not None:
        check_gather_results(described, given)
        check_results_apart(GATHER_RESULTS, given, gather_inputs(call))
    return described


def _gather_fake(*args: Any, given: Results | None = None) -> Results:
    call = _gather_call(args, given)
    described = describe_gather(call)
    if given is not None:
        check_gather_results(described, given)
        return given
    dtype = getattr(torch, described.format.name)
    key, value = (call.caches[0].new_empty(shape, dtype=dtype) for shape in described.shapes)
    return key, value


def _copied(computed: Results, given: Results | None) -> Results:
    """Results in the tensors given for them."""
    if given is None:
        return computed
    for result, new in zip(given, computed, strict=True):
        result.copy_(new)
    return given


def _bumped(results: Results, given: Results | None) -> Results:
    """Tells autograd that given tensors changed, as torch's own in-place operations do."""
    if given is not None and not given[0].is_inference():
        torch.autograd.graph.increment_version(given)
    return results


def _define(schema: str, on_gpu: Callable[..., Any], on_host: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines an op that returns new tensors."""
    op = _register(schema, on_gpu, on_host, fake)
    name = schema.partition("(")[0]

    def one_by_one(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Results, tuple[int, int]]:
        """vmap: a call for each item."""
        refuse_gradients(name, *(a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)))
        results = [op(*_item(args, in_dims, i)) for i in range(info.batch_size)]
        first, second = (torch.stack(parts) for parts in zip(*results, strict=True))
        return (first, second), (0, 0)

    torch.library.register_vmap(f"torchkv::{name}", one_by_one, lib=_library)
    return op


def _define_out(
    schema: str,
    results: tuple[str, str],
    on_gpu: Callable[..., Any],
    on_host: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Defines its twin, whose first two arguments, `results`, are the tensors to write to."""

    def with_given(function: Callable[..., Any]) -> Callable[..., None]:
        def run(first: Tensor, second: Tensor, *args: Any) -> None:
            function(*args, given=(first, second))

        return run

    name, _, arguments = schema.removesuffix(" -> (Tensor, Tensor)").partition("(")
    name += "_out"
    out_schema = f"{name}(Tensor(a!) {results[0]}, Tensor(b!) {results[1]}, {arguments} -> ()"
    op = _register(out_schema, *map(with_given, (on_gpu, on_host, fake)))

    def one_by_one(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[None, None]:
        refuse_gradients(name, *(a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)))
        if in_dims[0] is None or in_dims[1] is None:
            raise ValueError("vmap must map the tensors that are given for results")
        for i in range(info.batch_size):
            op(*_item(args, in_dims, i))
        return None, None

    torch.library.register_vmap(f"torchkv::{name}", one_by_one, lib=_library)
    return op


def _item(args: Sequence[Any], in_dims: Sequence[Any], i: int) -> list[Any]:
    """The arguments of one item of a batch."""

    def pick(arg: Any, dim: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [pick(a, d) for a, d in zip(arg, dim or [None] * len(arg), strict=True)]
        return arg if dim is None else arg.select(dim, i)

    return [pick(a, d) for a, d in zip(args, in_dims, strict=True)]


def _register(schema: str, on_gpu: Callable[..., Any], on_host: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_host, "CPU")
    _library.impl(name, on_gpu, "CUDA")  # ROCm builds of torch use the same key
    torch.library.register_fake(f"torchkv::{name}", fake, lib=_library)
    return getattr(torch.ops.torchkv, name).default


attention = _define(_ATTENTION, _attention_on_gpu, _attention_on_host, _attention_fake)
attention_out = _define_out(_ATTENTION, ("out", "lse"), _attention_on_gpu, _attention_on_host, _attention_fake)
gather = _define(_GATHER, _gather_on_gpu, _gather_on_host, _gather_fake)
gather_out = _define_out(_GATHER, ("key", "value"), _gather_on_gpu, _gather_on_host, _gather_fake)
