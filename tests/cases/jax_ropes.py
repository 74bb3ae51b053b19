"""Calls of jaxkv.rope_and_cache, and what they give."""

import jax.numpy as jnp
import numpy as np

import jaxkv
from tests.cases.arrays import bits


def call_jax(call, **options):
    """The results of a `RopeCall`, on copies of its caches."""
    return call(jaxkv.rope_and_cache, jnp.asarray, list(map(jnp.asarray, call.caches)), **options)


def assert_same(got, want):
    """Results have the shapes, dtypes and bits of the oracle's."""
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        different = np.flatnonzero(bits(np.asarray(g)) != bits(w))
        assert not different.size, f"{different.size} bytes of result {i} differ, first {different[:4]}"
