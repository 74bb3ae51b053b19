"""Calls of torchkv's attention on the attention benchmarks' inputs, with the kernel that a plan chooses or another."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import torchkv
from benchmarks.attention_inputs import Inputs
from benchmarks.peers import Calls
from kvcore.plan.attention import AttentionPlan
from kvcore.plan.kernel import Target
from kvcore.run.gluon import launches_gluon
from torchkv._arguments import as_pattern, as_scale_pattern
from torchkv._call import AttentionCall
from torchkv._triton import attention


def ours(inputs: Inputs) -> Calls:
    """The op of torchkv."""
    caches = inputs.caches[0] if inputs.layout.single_array else inputs.caches
    arguments: dict[str, Any] = dict(zip(("k_scale", "v_scale"), inputs.scales, strict=True))
    arguments |= inputs.options | {"query_start_loc": inputs.query_starts}

    def call(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], Any]:
        return lambda: torchkv.paged_attention(query, caches, tables, inputs.seq_lens, **arguments)

    return [call(*each) for each in inputs.sets]


def with_kernel_for_every_gpu(inputs: Inputs) -> Calls:
    """The same, with the kernel that is launched where there is none for the GPU at hand."""
    launches = attention.Attentions(results=False)  # which has launched nothing yet

    def call(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], Any]:
        described = _call(inputs, query, tables)
        tensors = launches.tensors(described)
        return lambda: launches.launch(described, tensors)[1][0]

    calls = [call(*each) for each in inputs.sets]
    with mock.patch.object(attention, "launches_gluon", return_value=False):
        for each in calls:  # later calls launch what was compiled for these
            each()
    return calls


def plan_of(inputs: Inputs, target: Target, gluon: bool = True) -> AttentionPlan:
    """What torchkv launches for the first set.

    Args:
        inputs: The call's.
        target: On what.
        gluon: Whether kernels in Gluon may be chosen.
    """
    call = _call(inputs, inputs.queries[0], inputs.tables[0])
    launches = attention.Attentions(results=False)
    with mock.patch.object(attention, "launches_gluon", lambda target: gluon and launches_gluon(target)):
        return launches.prepare(call, call.check(), target, lambda kernel, pointers, aligned: None).kernels.plan


def _call(inputs: Inputs, query: torch.Tensor, tables: torch.Tensor) -> AttentionCall:
    case, reading = inputs.case, inputs.cache.spec.reading
    return AttentionCall(
        query=query,
        caches=inputs.caches,
        block_tables=tables,
        seq_lens=inputs.seq_lens,
        query_start_loc=inputs.query_starts,
        scale=None,
        causal=case.causal,
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        sinks=None,
        kv_cache_dtype=reading["kv_cache_dtype"],
        k_scale=inputs.scales[0],
        v_scale=inputs.scales[1],
        layout=as_pattern(reading["layout"]),
        layer=None,
        layer_index=None,
        head_size_v=reading["head_size_v"],
        backend=None,
        scale_layout=as_scale_pattern(reading["scale_layout"]),
    )
