"""Calls of the ops that read a cache: their arguments under their names, and the contract's verdict on them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from kvcore.arrays import ArraySpec, array_names
from kvcore.contract.cache import CacheArguments
from kvcore.contract.checks import check_devices, check_result
from kvcore.contract.read import Attention, AttentionOptions, Gather, check_attention, check_gather
from torchkv._arguments import maybe_spec, spec_of

Results = tuple[Tensor, Tensor]
"""Result and log-sum-exp, or key and value."""


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


def attention_inputs(call: AttentionCall) -> dict[str, Tensor | None]:
    """What `paged_attention` reads, by the names of its arguments."""
    return {
        "query": call.query, **_named(call.caches), "block_tables": call.block_tables, "seq_lens": call.seq_lens,
        "query_start_loc": call.query_start_loc, "sinks": call.sinks, "k_scale": call.k_scale,
        "v_scale": call.v_scale, "layer": call.layer_index,
    }  # fmt: skip


def gather_inputs(call: GatherCall) -> dict[str, Tensor | None]:
    """What `gather_kv` reads, by the names of its arguments."""
    return {
        **_named(call.caches), "block_tables": call.block_tables, "seq_lens": call.seq_lens, "k_scale": call.k_scale,
        "v_scale": call.v_scale, "layer": call.layer_index,
    }  # fmt: skip


def _named(caches: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(array_names(len(caches)), caches, strict=True))


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
        spec_of(call.block_tables),
        spec_of(call.seq_lens),
        maybe_spec(call.query_start_loc),
        maybe_spec(call.sinks),
        AttentionOptions(call.scale, call.causal, call.sliding_window, call.soft_cap),
        _cache_of(call),
        call.head_size_v,
    )


def describe_gather(call: GatherCall) -> Gather:
    """What the contract says of a call; tensors may be fake."""
    return check_gather(
        spec_of(call.block_tables),
        spec_of(call.seq_lens),
        call.max_len,
        call.dtype,
        _cache_of(call),
        call.head_size,
        call.head_size_v,
    )


def _cache_of(call: AttentionCall | GatherCall) -> CacheArguments:
    """The cache of a call, as the contract is told of it."""
    return CacheArguments(
        caches=[spec_of(c) for c in call.caches],
        kv_cache_dtype=call.kv_cache_dtype,
        k_scale=maybe_spec(call.k_scale),
        v_scale=maybe_spec(call.v_scale),
        layout=call.layout,
        layer=call.layer if call.layer_index is None else spec_of(call.layer_index),
        scale_layout=call.scale_layout,
    )


ATTENTION_RESULTS, GATHER_RESULTS = ("out", "lse"), ("out[0]", "out[1]")
"""What errors call tensors that are given for results."""


def check_attention_results(described: Attention, results: Results) -> None:
    """Checks tensors that are given for the result and the log-sum-exp; they may be fake.

    Raises:
        ValueError: a shape or a device does not fit, or one is not contiguous.
        TypeError: a dtype does not fit.
    """
    shape = described.out_shape
    wanted = ((shape, described.query.dtype), (shape[:2], "float32"))
    _check_results(ATTENTION_RESULTS, results, wanted, ("query", described.query))


def check_gather_results(described: Gather, results: Results) -> None:
    """Likewise, for key and value."""
    wanted = [(shape, described.format.name) for shape in described.shapes]
    _check_results(GATHER_RESULTS, results, wanted, ("block_tables", described.block_tables))


def _check_results(
    names: Sequence[str],
    results: Results,
    wanted: Sequence[tuple[tuple[int, ...], str]],
    home: tuple[str, ArraySpec],
) -> None:
    specs = [spec_of(r) for r in results]
    for name, spec, (shape, dtype) in zip(names, specs, wanted, strict=True):
        check_result(name, spec, shape, dtype)
    check_devices(list(zip(names, specs, strict=True)), *home)
