"""Reads in torch into tensors that are given for the results."""

import math

import numpy as np
import torch

import torchkv
from tests.cases.arrays import to_torch
from tests.cases.reads import make_read
from tests.cases.torch_ops import attention_arguments

BACKENDS = ("torch", "interpret")


READS = {
    "decode": {},
    "window and sinks": {"query_lens": (0, 1, 3, 2), "padding": 1, "sliding_window": 4, "sinks": True},
    "no tokens": {"seq_lens": (), "query_lens": ()},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, a scale for each head": {"kv_cache_dtype": "int8", "granularity": "token_head"},
    "latent": {"layout": "MLA", "head_size": 48},
    "layers": {"num_layers": 2, "layer": 1},
}


def read_case(name="decode"):
    rng = np.random.default_rng(3)
    case = make_read(rng, **{k: v for k, v in READS[name].items() if k != "sinks"})
    if "sinks" in READS[name]:
        case.options["sinks"] = rng.standard_normal(case.query.shape[1]).astype(np.float32)
    return case


def results_of(case, fill=7.0):
    tokens, heads, _ = case.query.shape
    out = torch.full((tokens, heads, case.head_size_v), fill, dtype=to_torch(case.query).dtype)
    return out, torch.full((tokens, heads), fill)


def attend(case, **more):
    return case.call(torchkv, to_torch, return_lse=True, **more)


def gather_arguments(case):
    caches = tuple(to_torch(c) for c in case.caches)
    options = {n: v for n, v in case.options.items() if n in ("layout", "layer", "kv_cache_dtype", "scale_layout")}
    for name in ("k_scale", "v_scale"):
        scale = case.options.get(name)
        options[name] = to_torch(scale) if isinstance(scale, np.ndarray) else scale
    if case.layout.latent:
        options["head_size_v"] = case.head_size_v
    tables, lengths = to_torch(case.block_tables), to_torch(case.seq_lens)
    return (caches[0] if len(caches) == 1 else caches, tables, lengths, 21), options


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def part(shape, offset):
    """A contiguous float32 tensor that begins `4 * offset` bytes after a multiple of 64."""
    memory = torch.full((math.prod(shape) + 32,), 7.0)
    first = -memory.data_ptr() % 64 // 4 + offset
    return memory[first:][: math.prod(shape)].view(shape)


def op_arguments(name="decode"):
    case = read_case(name)
    options = case.options
    caches = [to_torch(c) for c in case.caches]
    starts = None if case.query_start_loc is None else to_torch(case.query_start_loc)
    for cache in caches:  # it compares values, and finds NaN unequal to itself
        cache.copy_(torch.randn(cache.shape))
    arguments = attention_arguments(
        to_torch(case.query), caches, to_torch(case.block_tables), to_torch(case.seq_lens), query_start_loc=starts,
        layout=options["layout"].pattern,
    )  # fmt: skip
    return arguments, results_of(case)
