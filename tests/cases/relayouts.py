"""Caches to move for tests: filled with random bits, in both frameworks, and what is right."""

import jax.numpy as jnp
import numpy as np
import torch

import jaxkv
import torchkv
from kvcore.formats import FLOATS, KV_CACHE_DTYPES
from kvcore.oracle import read, write
from kvcore.oracle import relayout as oracle
from kvcore.oracle.views import scale_views, views
from kvcore.relayout import between
from tests.cases.arrays import bits, from_torch, random_bits, to_torch

PAIRS = ((3, 0), (-1, 4), (5, 11), (12, 2), (15, 7), (99, 6), (1, 10**6), (0, 13), (11, 12), (2, -5))
SIZES = dict(num_heads=2, head_size=32, dtype="bfloat16")
FORMATS = {
    "bfloat16": {},
    "float32": dict(dtype="float32"),
    "V of another size": dict(head_size_v=16),
    "fp8": dict(kv_cache_dtype="fp8"),
    "int4": dict(kv_cache_dtype="int4"),
    "nvfp4": dict(kv_cache_dtype="nvfp4"),
    "int8, scales of tokens": dict(kv_cache_dtype="int8", per_token_head=True),
}


def arrays_of(rng, **extents):
    """A cache of random bits, as a spec and NumPy's arrays: caches, then scale caches."""
    spec = torchkv.PagedKVCache.create(**extents).spec
    shapes = [(shape, spec.dtype) for shape in spec.shapes] + [(shape, "float32") for shape in spec.scale_shapes]
    return spec, [random_bits(rng, shape, dtype) for shape, dtype in shapes]


def cache_of(module, spec, arrays, device="cpu"):
    """A framework's cache of these arrays, copied."""
    if module is torchkv:
        arrays = [to_torch(array.copy(), device) for array in arrays]
    else:
        arrays = [jnp.asarray(array) for array in arrays]
    count = len(spec.shapes)
    return module.PagedKVCache(tuple(arrays[:count]), spec, *arrays[count:])


def memory_of(cache):
    """Arrays of a cache, NumPy's: caches, then scale caches."""
    back = from_torch if isinstance(cache.caches[0], torch.Tensor) else np.asarray
    return [back(a) for a in (*cache.caches, *((cache.k_scale, cache.v_scale) if cache.spec.scale_layout else ()))]


def logical(spec, arrays):
    """Views `[layer, block, slot, …]` of all that slots hold."""
    stored = KV_CACHE_DTYPES[spec.kv_cache_dtype] or FLOATS[spec.dtype]
    count = len(spec.shapes)
    found = [
        part for side in views(arrays[:count], spec.layout, spec.head_size, spec.head_size_v, stored) for part in side
    ]
    if arrays[count:]:
        patterns = ", ".join(" ".join(a for (a,) in axes if a != "dim") for axes in spec.scale_layout.arrays)
        found += scale_views(arrays[count:], patterns.replace(", ", ","), spec.layout)
    return [view for view in found if view is not None]


def wanted(source, destination, pairs):
    """Arrays of the destination as they are to be, given a spec and arrays of each cache."""
    (spec, old), (target, new) = source, [destination[0], [a.copy() for a in destination[1]]]
    if pairs is None:
        pairs = [(i, i) for i in range(spec.num_blocks * spec.block_size)]
    oracle.relayout(logical(spec, old), logical(target, new), pairs)
    return new


WAYS = {
    "jax xla": (jaxkv, "xla"),
    "jax interpret": (jaxkv, "interpret"),
    "torch": (torchkv, "torch"),
    "torch interpret": (torchkv, "interpret"),
}


def move(module, backend, source, destination, pairs, device="cpu", **options):
    """Arrays of the destination, moved to."""
    old, new = (cache_of(module, *cache, device) for cache in (source, destination))
    if pairs is not None:
        pairs = torch.as_tensor(pairs, device=device) if module is torchkv else np.asarray(pairs)
    returned = module.relayout(old, new, pairs, backend=backend, **options)
    for array, before in zip(memory_of(old), source[1], strict=True):
        np.testing.assert_array_equal(bits(array), bits(before))
    return memory_of(new if module is torchkv else returned)


def assert_moves(source, destination, pairs, ways=WAYS, device="cpu"):
    want = wanted(source, destination, pairs)
    for name, way in ways.items():
        for got, array in zip(move(*way, source, destination, pairs, device=device), want, strict=True):
            np.testing.assert_array_equal(bits(got), bits(array), err_msg=name)
    return want


def requantised(source, destination, pairs, scales=((None, None), (None, None))):
    """Arrays of the destination as they are to be where numbers move: gathered by the oracle, written by the oracle.

    `scales` are static ones, of keys and of values, of the source and of the destination.
    """
    (spec, old), (target, new) = source, [destination[0], [a.copy() for a in destination[1]]]
    if pairs is None:
        pairs = [(i, i) for i in range(spec.num_blocks * spec.block_size)]
    count, slots = len(spec.shapes), spec.num_blocks * spec.block_size
    pairs = np.array([p for p in pairs if 0 <= p[0] < slots], np.int64).reshape(-1, 2)
    patterns = [s and s.pattern.replace(" dim", "") for s in (spec.scale_layout, target.scale_layout)]
    for layer in [None] if spec.num_layers is None else range(spec.num_layers):
        key, value = read.gather_slots(
            old[:count], pairs[:, 0], dtype=np.dtype(between(spec, target)), head_size=spec.head_size,
            head_size_v=spec.head_size_v, kv_cache_dtype=spec.kv_cache_dtype, layout=spec.layout,
            **dict(zip(("k_scale", "v_scale"), old[count:] or scales[0], strict=True)), scale_layout=patterns[0],
            layer=layer,
        )  # fmt: skip
        count_new = len(target.shapes)
        write.write_rows(
            key, value, new[:count_new], pairs[:, 1], target.kv_cache_dtype, scales[1], target.layout, layer,
            new[count_new:], patterns[1],
        )  # fmt: skip
    return new


def with_scales(module, cache, scales, device="cpu"):
    """A cache with static scales of keys and of values, unless its heads have their own."""
    if cache.spec.scale_layout is not None:
        return cache
    array = (lambda a: to_torch(a, device)) if module is torchkv else jnp.asarray
    return module.PagedKVCache(cache.caches, cache.spec, *(None if s is None else array(s) for s in scales))


def requantise(module, backend, source, destination, pairs, scales=((None, None), (None, None)), device="cpu"):
    """Arrays of the destination after `relayout(…, requantise=True)` of caches with static scales."""
    old, new = (
        with_scales(module, cache_of(module, *cache, device), of, device)
        for cache, of in zip((source, destination), scales, strict=True)
    )
    if pairs is not None:
        pairs = torch.as_tensor(pairs, device=device) if module is torchkv else np.asarray(pairs)
    returned = module.relayout(old, new, pairs, requantise=True, backend=backend)
    for array, before in zip(memory_of(old), source[1], strict=True):
        np.testing.assert_array_equal(bits(array), bits(before))
    return memory_of(new if module is torchkv else returned)


def assert_requantises(source, destination, pairs, scales=((None, None), (None, None)), ways=WAYS, device="cpu"):
    want = requantised(source, destination, pairs, scales)
    for name, way in ways.items():
        for got, array in zip(requantise(*way, source, destination, pairs, scales, device), want, strict=True):
            np.testing.assert_array_equal(bits(got), bits(array), err_msg=name)
    return want
