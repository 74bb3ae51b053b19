"""On a GPU, precompile: afterwards a decode step compiles nothing, and gives what it should."""

import numpy as np
import pytest

from tests.cases.arrays import random_normal, to_torch
from tests.cases.gpu import DEVICE, HAS_GPU

pytestmark = pytest.mark.gpu

BATCHES, HEADS, GROUP, DIM, POISON = (1, 8), 4, 4, 64, 55.0
CACHE = {"num_blocks": 32, "block_size": 16, "num_heads": HEADS, "head_size": DIM, "num_layers": 2}


def make_inputs(batch):
    """A step's arrays: each sequence has two blocks of its own, and is at position 20."""
    rng = np.random.default_rng(batch)
    blocks = rng.permutation(32)[: 2 * batch].astype(np.int32).reshape(batch, 2)
    angles = np.outer(np.arange(64), 1e-4 ** np.linspace(0, 1, DIM // 2))
    return {
        "rows": [random_normal(rng, (batch, heads, DIM), "bfloat16") for heads in (HEADS * GROUP, HEADS, HEADS)],
        "positions": np.full(batch, 20, np.int32),
        "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        "slots": blocks[:, 1] * 16 + 4,
        "tables": blocks,
        "lens": np.full(batch, 21, np.int32),
    }


def refuse(*args, **options):
    raise AssertionError("a kernel is compiled")


@pytest.mark.gpu_smoke
def test_torch(monkeypatch):
    import torch

    import kvcore.run.compiler
    import torchkv

    cache = torchkv.PagedKVCache.create(**CACHE, device=DEVICE)
    for tensor in cache.caches:
        tensor.fill_(POISON)
    host = cache.to("cpu") if HAS_GPU else torchkv.PagedKVCache(tuple(c.clone() for c in cache.caches), cache.spec)

    def step(inputs, cache=cache, backend=None):
        rows = [*inputs["rows"], inputs["positions"], inputs["cos_sin"], inputs["slots"]]
        query = cache.rope_and_cache(*rows, layer=1, backend=backend)
        return cache.attend(query, inputs["tables"], inputs["lens"], layer=1, backend=backend)

    def tensors(batch, device):
        return torch.utils._pytree.tree_map(lambda x: to_torch(x, device), make_inputs(batch))

    for batch in BATCHES:
        kernels = torchkv.precompile(step, tensors(batch, "meta"))
        assert kernels >= 2 if HAS_GPU else kernels == 0
    assert all((tensor == POISON).all() for tensor in cache.caches)
    monkeypatch.setattr(kvcore.run.compiler, "compile_kernel", refuse)
    for batch in BATCHES:
        out = step(tensors(batch, DEVICE))
        torch.testing.assert_close(out.cpu(), step(tensors(batch, "cpu"), host, "torch"), rtol=2e-2, atol=2e-2)
    assert all(map(torch.equal, [c.cpu() for c in cache.caches], host.caches))


@pytest.mark.gpu_smoke
def test_jax(monkeypatch):
    import jax
    import jax.numpy as jnp

    import jaxkv
    from jaxkv._triton.launch import jt
    from tests.cases.jax_compiling import COMPILING

    def make_cache():
        return jax.tree.map(lambda x: jnp.full_like(x, POISON), jaxkv.PagedKVCache.create(**CACHE))

    def step(cache, inputs, backend=None):
        rows = [*inputs["rows"], inputs["positions"], inputs["cos_sin"], inputs["slots"]]
        query, cache = cache.rope_and_cache(*rows, layer=1, backend=backend)
        return cache.attend(query, inputs["tables"], inputs["lens"], layer=1, backend=backend), cache

    decode = jax.jit(lambda *arrays: step(*arrays), donate_argnums=0)
    wanted = jax.jit(lambda *arrays: step(*arrays, "xla"))
    inputs = {batch: jax.tree.map(jnp.asarray, make_inputs(batch)) for batch in BATCHES}
    cache, plain = make_cache(), make_cache()
    for batch in BATCHES:
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (cache, inputs[batch]))
        assert isinstance(jaxkv.precompile(decode, *described), jax.stages.Compiled)
    assert all((array == POISON).all() for array in cache.caches)
    monkeypatch.setattr(jt.triton_lib.TritonFunction, "_compile_kernel", refuse)
    for batch in BATCHES:
        want, plain = wanted(plain, inputs[batch])
        COMPILING.clear()
        out, cache = decode(cache, inputs[batch])
        assert not COMPILING
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, want)), rtol=2e-2, atol=2e-2)
    for array, other in zip(cache.caches, plain.caches, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (array, other)))
