"""Caches that share memory: an error where elements do, none where they do not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchkv
from tests.cases.arrays import bits, from_torch, make_case, random_bits, run_oracle, to_torch
from tests.cases.bad_writes import FORMATS, OVERLAP, valid
from tests.cases.write_ways import in_jax, in_torch
from torchkv._memory import share_elements


def poison(*shape):
    return to_torch(random_bits(np.random.default_rng(7), shape, "bfloat16"))


def overlapping_caches():
    buffer = poison(10, 4, 3, 16)
    flat = poison(2 * 6 * 4 * 3 * 16).flatten()
    wide = poison(6, 4, 4, 16)
    return {
        "the same": (buffer[:6], buffer[:6]),
        "a view": (buffer[:6], buffer[:6].view(6, 4, 3, 16)),
        "two blocks": (buffer[0:6], buffer[4:10]),
        "value first": (buffer[1:7], buffer[0:6]),
        "one element": (flat[:1152].view(6, 4, 3, 16), flat[1151:2303].view(6, 4, 3, 16)),
        "two heads": (wide[:, :, :3], wide[:, :, 1:]),
        "one block of every other": (
            torch.as_strided(flat, (6, 4, 3, 16), (384, 48, 16, 1), 0)[:3],
            torch.as_strided(flat, (6, 4, 3, 16), (192, 48, 16, 1), 384 + 191)[:3],
        ),
    }


def separate_caches():
    buffer = poison(12, 4, 3, 16)
    return {
        "halves": (buffer[:6], buffer[6:]),
        "halves, value first": (buffer[6:], buffer[:6]),
        "unbind(0)": poison(2, 6, 4, 3, 16).unbind(0),
        "unbind(1)": poison(6, 2, 4, 3, 16).unbind(1),
        "every other block": (buffer[::2], buffer[1::2]),
        "every other head": (poison(6, 4, 6, 16)).unflatten(2, (3, 2)).unbind(3),
        "every other element": poison(6, 4, 3, 16, 2).unbind(4),
        "side by side": poison(6, 4, 3, 32).split(16, dim=3),
    }


def call_with(key_cache, value_cache, backend):
    tensors = {name: to_torch(x) for name, x in valid("flash").items() if "cache" not in name}
    extra = {"key_cache": key_cache, "value_cache": value_cache, "backend": backend}
    size = key_cache.shape[0] * 4
    slots = torch.tensor([3, size - 1, -1, 0, 9])
    return torchkv.reshape_and_cache_flash(**tensors | extra | {"slot_mapping": slots})


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", overlapping_caches())
def test_overlapping_caches(name, backend, launches):
    key_cache, value_cache = overlapping_caches()[name]
    before = key_cache.clone(), value_cache.clone()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call_with(key_cache, value_cache, backend)
    assert str(error.value) == OVERLAP
    assert not launches
    for cache, old in zip((key_cache, value_cache), before, strict=True):
        np.testing.assert_array_equal(bits(from_torch(cache)), bits(from_torch(old)))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", separate_caches())
def test_caches_of_one_buffer_that_do_not_overlap(name, backend):
    key_cache, value_cache = separate_caches()[name]
    case = make_case(np.random.default_rng(1), num_tokens=5, num_heads=3, head_size=16, num_blocks=6, block_size=4)
    case.caches = [from_torch(key_cache).copy(), from_torch(value_cache).copy()]
    assert key_cache.untyped_storage().data_ptr() == value_cache.untyped_storage().data_ptr()
    arguments = (
        to_torch(case.key),
        to_torch(case.value),
        key_cache,
        value_cache,
        to_torch(case.slot_mapping),
    )
    torchkv.reshape_and_cache_flash(*arguments, backend=backend)
    for cache, want in zip((key_cache, value_cache), run_oracle(case), strict=True):
        np.testing.assert_array_equal(bits(from_torch(cache)), bits(want))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            lambda: poison(1, 4, 3, 16).expand(6, -1, -1, -1),
            "value_cache axis block with stride 0 puts its 6 elements in one place",
        ),
        (
            lambda: poison(6, 4, 1, 16).expand(-1, -1, 3, -1),
            "value_cache axis head with stride 0 puts its 3 elements in one place",
        ),
        (
            lambda: poison(6, 4, 3, 16).as_strided((6, 4, 3, 16), (96, 48, 16, 1)),
            "value_cache axis block with stride 96 overlaps the axes inside it, which reach 192 elements",
        ),
    ],
    ids=["expanded blocks", "expanded heads", "blocks half over each other"],
)
def test_a_cache_that_overlaps_itself(view, message, backend, launches):
    cache = view()
    before = bits(from_torch(cache))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call_with(poison(6, 4, 3, 16), cache, backend)
    assert str(error.value) == message
    assert not launches
    np.testing.assert_array_equal(bits(from_torch(cache)), before)


@st.composite
def strided_views(draw):
    """Two views of one buffer, of up to three axes, any strides, any offsets."""
    views = []
    buffer = torch.zeros(400)
    for _ in range(2):
        shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        strides = [draw(st.integers(0, 24)) for _ in shape]
        views.append(buffer.as_strided(shape, strides, draw(st.integers(0, 100))))
    return views


def places(view):
    grids = np.indices(tuple(view.shape)).reshape(view.dim(), math.prod(view.shape))
    return set((view.storage_offset() + np.array(view.stride()) @ grids).tolist())


@settings(max_examples=500, deadline=None)
@given(strided_views())
def test_share_elements(views):
    a, b = views
    assert share_elements(a, b) == share_elements(b, a) == bool(places(a) & places(b))


def test_elements_that_lie_half_over_each_other():
    memory = bytearray(64)
    a = torch.frombuffer(memory, dtype=torch.bfloat16, count=8)
    b = torch.frombuffer(memory, dtype=torch.bfloat16, count=8, offset=15)
    c = torch.frombuffer(memory, dtype=torch.bfloat16, count=8, offset=17)
    assert share_elements(a, b)
    assert share_elements(b, a)
    assert not share_elements(a, c)
    assert not share_elements(c, a)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"kv_cache_dtype": None}, ValueError,
         f"kv_cache_dtype must be {FORMATS}, got None"),
        ({"kv_cache_dtype": ["fp8"]}, ValueError,
         f"kv_cache_dtype must be {FORMATS}, got ['fp8']"),
        ({"k_scale": "1"}, TypeError, "k_scale must be a number or an array of float32, got '1'"),
        ({"v_scale": False}, TypeError, "v_scale must be a number or an array of float32, got False"),
        ({"layer": 1.5}, TypeError, "layer must be an int or an integer scalar, got 1.5"),
        ({"layer": True}, TypeError, "layer must be an int or an integer scalar, got True"),
        ({"layout": 3}, TypeError, "layout must be a pattern string or a CacheLayout, got 3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("run", [in_jax, in_torch])
def test_arguments_of_wrong_types(run, options, kind, message):
    with pytest.raises(kind) as error:
        run("flash", valid("flash") | options, {})
    assert str(error.value) == message
