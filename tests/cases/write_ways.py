"""Ways to make one call of a writer: in JAX and torch, eager, interpreted and traced."""

import jax
import jax.numpy as jnp
import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

import jaxkv
import torchkv
from kvcore.oracle import write as reference
from tests.cases.arrays import bits, from_torch, to_torch


def function(module, op):
    return module.reshape_and_cache_flash if op == "flash" else module.reshape_and_cache_flash_diffkv


def split(arguments):
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def cache_names(op):
    return ["key_cache", "value_cache"] if op == "flash" else ["kv_cache"]


def in_jax(op, arguments, left):
    arrays, rest = split(arguments)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    left |= {name: arrays[name] for name in cache_names(op)}
    new = function(jaxkv, op)(**arrays, **rest)
    left |= zip(cache_names(op), new if op == "flash" else [new], strict=True)


def in_jax_tracing(op, arguments, left):
    arrays, rest = split(arguments)
    left |= {name: arrays[name] for name in cache_names(op)}
    jax.jit(lambda arrays: function(jaxkv, op)(**arrays, **rest)).trace(arrays)


def in_jax_refs(op, arguments, left):
    arrays, rest = split(arguments)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    refs = {name: jax.new_ref(arrays.pop(name)) for name in cache_names(op)}
    try:
        assert function(jaxkv, op)(**arrays, **refs, **rest) is None
    finally:
        left |= {name: ref[...] for name, ref in refs.items()}


def in_torch(op, arguments, left, backend=None):
    arrays, rest = split(arguments)
    tensors = {name: to_torch(x.copy()) for name, x in arrays.items()}
    try:
        assert function(torchkv, op)(**tensors, **rest, backend=backend) is None
    finally:
        left |= {name: from_torch(tensors[name]) for name in cache_names(op)}


def in_torch_interpreted(op, arguments, left):
    in_torch(op, arguments, left, backend="interpret")


def in_torch_tracing(op, arguments, left):
    arrays, rest = split(arguments)
    left |= {name: arrays[name] for name in cache_names(op)}
    mode = FakeTensorMode()
    tensors = {name: mode.from_tensor(to_torch(x)) for name, x in arrays.items()}
    with mode:
        assert function(torchkv, op)(**tensors, **rest) is None


WAYS = {
    "jax": in_jax,
    "jax, tracing": in_jax_tracing,
    "jax, Refs": in_jax_refs,
    "torch": in_torch,
    "torch, interpreted": in_torch_interpreted,
    "torch, tracing": in_torch_tracing,
}


def assert_caches(left, want):
    for name, cache in want.items():
        np.testing.assert_array_equal(bits(np.asarray(left[name])), bits(cache))


def assert_writes(way, op, arguments):
    """The call is a good one: it leaves the oracle's caches, or, where it is traced only, raises nothing."""
    left = {}
    with jax.enable_x64(True):
        WAYS[way](op, arguments, left)
    if "tracing" not in way:
        arrays = [arguments[name].copy() for name in cache_names(op)]
        layer = arguments.get("layer")
        function(reference, op)(
            arguments["key"],
            arguments["value"],
            *arrays,
            arguments["slot_mapping"],
            layout=arguments.get("layout", "NHD" if op == "flash" else "PACKED_NHD"),
            layer=None if layer is None else int(np.reshape(layer, ())),
        )
        assert_caches(left, dict(zip(cache_names(op), arrays, strict=True)))
        assert any((bits(a) != bits(arguments[n])).any() for n, a in zip(cache_names(op), arrays, strict=True))
