"""What only one framework has to refuse: backends, Refs, devices, views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jaxkv
import torchkv
from tests.cases.arrays import bits, from_torch, to_torch
from tests.cases.bad_writes import OVERLAP, array, stacked, valid
from tests.cases.write_ways import WAYS, assert_caches, cache_names, in_jax, in_torch, split


@pytest.mark.parametrize("op", ["flash", "diffkv"])
@pytest.mark.parametrize("backend", ["xla", "cuda", ""])
def test_backends_of_torch(op, backend):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        in_torch(op, valid(op), {}, backend)
    assert str(error.value) == f"backend must be None, 'triton', 'torch' or 'interpret', got {backend!r}"


@pytest.mark.parametrize("way", ["jax", "jax, tracing", "jax, Refs"])
@pytest.mark.parametrize("op", ["flash", "diffkv"])
@pytest.mark.parametrize("backend", ["torch", "cuda", ""])
def test_backends_of_jax(op, way, backend):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        WAYS[way](op, valid(op) | {"backend": backend}, {})
    assert str(error.value) == f"backend must be None, 'triton', 'xla' or 'interpret', got {backend!r}"


@pytest.mark.parametrize("op", ["flash", "diffkv"])
def test_triton_needs_a_gpu(op):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        in_torch(op, valid(op), {}, "triton")
    assert str(error.value) == "backend 'triton' needs a CUDA or ROCm device, got cpu"
    with jax.default_device("cpu"), pytest.raises(ValueError) as error:  # noqa: PT011
        in_jax(op, valid(op) | {"backend": "triton"}, {})
    assert str(error.value) == "backend 'triton' needs a CUDA or ROCm device, got cpu"


def test_one_ref_and_one_array():
    arguments = {name: jnp.asarray(x) for name, x in valid("flash").items()}
    for name in ("key_cache", "value_cache"):
        with pytest.raises(TypeError) as error:
            jaxkv.reshape_and_cache_flash(**arguments | {name: jax.new_ref(arguments[name])})
        assert str(error.value) == "key_cache and value_cache must be two jax.Refs or two arrays, got one of each"


@pytest.mark.parametrize("layer", [2**32, -(2**32) + 1])
def test_numpy_layers_that_int32_would_wrap_write_nothing(layer):
    arguments = valid("flash") | stacked
    new = jaxkv.reshape_and_cache_flash(**arguments, layer=np.array(layer))
    left = dict(zip(cache_names("flash"), new, strict=True))
    assert_caches(left, {name: arguments[name] for name in left})


def test_one_ref_as_both_caches(launches):
    arguments = {name: jnp.asarray(x) for name, x in valid("flash").items()}
    cache = jax.new_ref(arguments["key_cache"])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jaxkv.reshape_and_cache_flash(**arguments | {"key_cache": cache, "value_cache": cache})
    assert str(error.value) == OVERLAP
    assert not launches


def test_one_ref_as_both_caches_under_jit():
    arguments = {name: jnp.asarray(x) for name, x in valid("flash").items()}
    cache = jax.new_ref(arguments.pop("key_cache"))
    del arguments["value_cache"]
    step = jax.jit(lambda cache, rest: jaxkv.reshape_and_cache_flash(key_cache=cache, value_cache=cache, **rest))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        step(cache, arguments)
    assert str(error.value) == OVERLAP


ELSEWHERE = ["key", "value", "value_cache", "slot_mapping", "k_scale", "v_scale", "layer"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_another_device(name, launches):
    arguments = valid("flash") | stacked | {"layer": array((1,), "int64")}
    arguments |= {"k_scale": array((1,), "float32"), "v_scale": array((), "float32")}
    arrays, rest = split(arguments)
    tensors = {key: to_torch(x) for key, x in arrays.items()}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        torchkv.reshape_and_cache_flash(**tensors, **rest)
    assert str(error.value) == f"{name} must be on device cpu, as key_cache, got meta"
    assert not launches
    for cache in ("key_cache", "value_cache"):
        if cache != name:
            np.testing.assert_array_equal(bits(from_torch(tensors[cache])), bits(arrays[cache]))


def test_a_cache_on_another_device():
    tensors = {key: to_torch(x) for key, x in valid("diffkv").items()}
    tensors["kv_cache"] = tensors["kv_cache"].to("meta")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        torchkv.reshape_and_cache_flash_diffkv(**tensors)
    assert str(error.value) == "key must be on device meta, as kv_cache, got cpu"


def test_fake_cuda_tensors_on_another_device():
    with FakeTensorMode():
        tensors = {key: torch.empty(x.shape, dtype=torch.float32) for key, x in valid("flash").items()}
        tensors["slot_mapping"] = torch.empty(5, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError) as error:  # noqa: PT011
            torchkv.reshape_and_cache_flash(**tensors)
    assert str(error.value) == "slot_mapping must be on device cpu, as key_cache, got cuda:0"
