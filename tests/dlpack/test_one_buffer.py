"""One cache, two frameworks: what one writes the other reads, in the same memory."""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxkv
import torchkv
from tests.cases.gpu import DEVICE, HAS_GPU

HERE = [
    pytest.param("cpu"),
    pytest.param(DEVICE, marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")], id="gpu"),
]
FORMATS = {
    "bfloat16": dict(),
    "float32": dict(dtype="float32", layout="HND"),
    "fp8": dict(kv_cache_dtype="fp8", k_scale=0.5, v_scale=2.0),
    "int8 with scales": dict(kv_cache_dtype="int8", per_token_head=True),
    "one array of layers": dict(layout="PACKED_NHD", num_layers=2),
}
TABLES, LENGTHS = [[2, 5]], [7]
SLOTS = [8, 9, 10, 11, 20, 21, 22]


@contextlib.contextmanager
def on(device):
    """Arrays of both frameworks are made on a device."""
    platform = "cpu" if device == "cpu" else "cuda"
    with jax.default_device(jax.devices(platform)[0]), torch.device(device):
        yield


def create(package, format):
    options = dict(FORMATS[format])
    if package is torchkv and "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return package.PagedKVCache.create(num_blocks=8, block_size=4, num_heads=2, head_size=16, **options)


def rows(seed=0):
    return np.random.default_rng(seed).normal(size=(2, len(SLOTS), 2, 16)).astype(np.float32)


def addresses(cache):
    arrays = [*cache.caches, *(s for s in (cache.k_scale, cache.v_scale) if s is not None)]
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a.unsafe_buffer_pointer() for a in arrays]


def layer_of(cache):
    return {} if cache.num_layers is None else {"layer": 1}


def write_torch(cache, key, value):
    dtype = torch.float32 if cache.spec.dtype == "float32" else torch.bfloat16
    cache.write(
        torch.tensor(key, dtype=dtype), torch.tensor(value, dtype=dtype), torch.tensor(SLOTS), **layer_of(cache)
    )
    if HAS_GPU:
        torch.cuda.synchronize()


def write_jax(cache, key, value):
    dtype = "float32" if cache.spec.dtype == "float32" else "bfloat16"
    step = jax.jit(lambda cache, *rows: cache.write(*rows, jnp.array(SLOTS), **layer_of(cache)), donate_argnums=0)
    return jax.block_until_ready(step(cache, jnp.asarray(key, dtype), jnp.asarray(value, dtype)))


def gathered(cache):
    as_array = torch.tensor if isinstance(cache.caches[0], torch.Tensor) else jnp.array
    key, value = cache.gather(as_array(TABLES), as_array(LENGTHS), max_len=7, **layer_of(cache))
    return [np.asarray(x.cpu().float() if isinstance(x, torch.Tensor) else x.astype(jnp.float32)) for x in (key, value)]


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_jax_owns_and_both_write(format, device):
    with on(device):
        cache, (key, value) = create(jaxkv, format), rows()
        before = addresses(cache)
        view = torchkv.from_dlpack(cache)
        assert addresses(view) == before
        assert view.spec == cache.spec
        write_torch(view, key, value)
        written = gathered(view)
        assert all(np.abs(w).max() > 0.5 for w in written)
        for ours, theirs in zip(gathered(cache), written, strict=True):
            np.testing.assert_array_equal(ours, theirs)

        del view
        gc.collect()
        cache = write_jax(cache, -key, value)  # in place, as torch has let go
        assert addresses(cache)[: len(cache.caches)] == before[: len(cache.caches)]
        view = torchkv.from_dlpack(cache)
        for ours, theirs, sign, old in zip(gathered(view), gathered(cache), (-1, 1), written, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(ours, sign * old)


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_torch_owns_and_jax_reads(format, device):
    with on(device):
        cache, (key, value) = create(torchkv, format), rows()
        view = jaxkv.from_dlpack(cache)
        assert addresses(view) == addresses(cache)
        assert view.spec == cache.spec
        write_torch(cache, key, value)
        for ours, theirs in zip(gathered(view), gathered(cache), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert np.abs(ours).max() > 0.5


@pytest.mark.parametrize("device", HERE)
def test_jax_does_not_write_while_torch_holds_the_memory(device):
    with on(device):
        cache, (key, value) = create(jaxkv, "bfloat16"), rows()
        view = torchkv.from_dlpack(cache)
        if device == "cpu":  # XLA copies
            assert addresses(write_jax(cache, key, value)) != addresses(view)
        else:
            with pytest.raises(jax.errors.JaxRuntimeError, match="external reference"):
                write_jax(cache, key, value)
        assert all((x == 0).all() for x in gathered(view))


@pytest.mark.parametrize("package", [jaxkv, torchkv])
def test_other_things_are_refused(package):
    with pytest.raises(TypeError, match="cache must be a PagedKVCache of jaxkv or torchkv, got list"):
        package.from_dlpack([1])
