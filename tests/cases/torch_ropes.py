"""Calls of torchkv.rope_and_cache that tests share."""

import numpy as np
import torch

import torchkv
from tests.cases.arrays import bits, from_torch, to_torch
from tests.cases.rope import CASES
from tests.cases.torch_ops import positional

BY_NAME = {case.name: case for case in CASES}


def fresh(array):
    """A tensor with memory of its own."""
    return to_torch(array.copy())


def caches_of(call):
    return [fresh(cache) for cache in call.caches]


def rotate(call, caches, convert=fresh, **options):
    return call(torchkv.rope_and_cache, convert, caches, **options)


def run_torch(call, **options):
    """The new query, and the caches as they are then."""
    caches = caches_of(call)
    return [rotate(call, caches, **options), *caches]


def assert_same(got, want):
    assert len(got) == len(want)
    for i, (tensor, w) in enumerate(zip(got, want, strict=True)):
        g = from_torch(tensor)
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        different = np.flatnonzero(bits(g) != bits(w))
        assert not different.size, f"{different.size} bytes of result {i} differ, first {different[:4]}"


def op_arguments(call, op, caches, **more):
    """Arguments of torch.ops.torchkv.rope_and_cache, or of its twin with `out`, by their places."""
    options = {name: fresh(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()}
    layout, layer = options.pop("layout"), options.pop("layer")
    for name in ("k_scale", "v_scale"):
        if isinstance(options[name], float):
            options[name] = torch.tensor(options[name])
    names = ["key_cache", *(["value_cache"] if len(caches) % 2 == 0 else [])]
    names += ["k_scale_cache", "v_scale_cache"][: len(caches) - len(names)]
    given = {name: fresh(getattr(call, name)) for name in ("query", "key", "value", "positions", "cos_sin")}
    given |= {"slot_mapping": fresh(call.slot_mapping), **dict(zip(names, caches, strict=True)), **options}
    given |= {"layout": None if layout is None else layout.pattern, "layer": layer}
    return positional(op, **(given | more))
