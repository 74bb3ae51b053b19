"""jaxkv.rope_and_cache, bit for bit as the oracle: without kernels, and in Triton's interpreter."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from kvcore.formats import KV_CACHE_DTYPES
from tests.cases import rope
from tests.cases.arrays import bits, random_bits, random_normal
from tests.cases.bad_ropes import BAD, BEYOND, valid
from tests.cases.rope import CASES, run_oracle

BY_NAME = {case.name: case for case in CASES}


def assert_same(got, want):
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        different = np.flatnonzero(bits(np.asarray(g)) != bits(w))
        assert not different.size, f"{different.size} bytes of result {i} differ, first {different[:4]}"


def call_jax(call, **options):
    return call(jaxkv.rope_and_cache, jnp.asarray, list(map(jnp.asarray, call.caches)), **options)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, backend):
    call = case.make()
    with jax.enable_x64(case.integers == "int64"):
        got, want = call_jax(call, backend=backend), run_oracle(call)
    if backend == "xla" and "subnormal" in case.name:  # XLA's CPU code reads them as zeros, and writes none
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(np.float32(g), np.float32(w), atol=2.0**-125)
        return
    assert_same(got, want)
