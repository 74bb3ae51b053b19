"""On a GPU: slots that are read, or moved to other caches, against the oracle, in both frameworks; graphs."""

import numpy as np
import pytest

from kvcore.layout import CONSTANTS as LAYOUTS
from kvcore.layout import CacheLayout
from tests.cases.arrays import bits
from tests.cases.gathers import SLOTS, read_slots, wanted_slots
from tests.cases.gpu import DEVICE, HAS_GPU, captured
from tests.cases.reads import make_read
from tests.cases.relayouts import (
    FORMATS,
    PAIRS,
    SIZES,
    arrays_of,
    assert_moves,
    assert_requantises,
    cache_of,
    memory_of,
    requantised,
    wanted,
)

pytestmark = pytest.mark.gpu

HEADS = [name for name in LAYOUTS if not CacheLayout.of(name).latent]


def ways():
    import jaxkv
    import torchkv

    return {"torch": (torchkv, None), "jax": (jaxkv, None)}


def two(rng, source, destination, **more):
    blocks = dict(num_blocks=4, block_size=4), dict(num_blocks=5, block_size=3)
    return [
        arrays_of(rng, **(SIZES | of | more | given)) for of, given in zip(blocks, (source, destination), strict=True)
    ]


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_slots_are_read(layout):
    import jax.numpy as jnp

    import jaxkv
    import torchkv
    from tests.cases.arrays import from_torch, to_torch

    slots = np.array(SLOTS, np.int64)
    for options in ({}, dict(kv_cache_dtype="fp8"), dict(kv_cache_dtype="nvfp4")):
        case = make_read(np.random.default_rng(0), layout=layout, num_layers=2, layer=1, **options)
        want = wanted_slots(case, slots, "float32")
        for way in (
            (torchkv, lambda a: to_torch(a.copy(), DEVICE), from_torch, None),
            (jaxkv, jnp.asarray, np.asarray, None),
        ):
            for got, array in zip(read_slots(case, slots, "float32", *way), want, strict=True):
                np.testing.assert_array_equal(bits(got), bits(array))


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("layout", HEADS)
def test_layouts(layout, layers):
    rng = np.random.default_rng(1)
    for there, here in ((layout, "NHD"), ("HND", layout)):
        source, destination = two(rng, dict(layout=here), dict(layout=there), num_layers=layers)
        assert_moves(source, destination, np.array(PAIRS, np.int64), ways(), DEVICE)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    source, destination = two(np.random.default_rng(2), {}, dict(layout="HND"), num_layers=2, **FORMATS[name])
    assert_moves(source, destination, np.array(PAIRS, np.int32), ways(), DEVICE)


REQUANTISED = {
    name: dict(kv_cache_dtype=name, per_token_head=of_tokens)
    for name, of_tokens in (("fp8", False), ("fp8_e5m2", False), ("int8", True), ("int4", False), ("nvfp4", False))
} | {"bfloat16": {}, "float16": dict(dtype="float16"), "float32": dict(dtype="float32")}


@pytest.mark.parametrize("old", REQUANTISED)
@pytest.mark.parametrize("new", REQUANTISED)
def test_other_formats(old, new):
    """Random bits, read and written by one kernel, with static scales of layers and heads."""
    rng = np.random.default_rng(7)
    source, destination = two(rng, REQUANTISED[old], dict(layout="HND") | REQUANTISED[new], num_layers=2, num_heads=3)
    scales = [[rng.uniform(0.01, 2, (2, 3)).astype(np.float32) for _ in range(2)] for _ in range(2)]
    assert_requantises(source, destination, np.array(PAIRS, np.int32), scales, ways(), DEVICE)


@pytest.mark.parametrize("new", ["fp8", "int8", "nvfp4"])
@pytest.mark.parametrize("layout", HEADS)
def test_other_formats_of_layouts(layout, new):
    if new == "nvfp4" and layout == "HEAD_MAJOR":
        new = "int4"  # nvfp4 wants dim to be the last axis
    rng, of = np.random.default_rng(8), REQUANTISED[new]
    sizes = dict(num_heads=5, head_size=80)
    for old, new_ in ((dict(layout=layout), of | dict(layout="HND")), (of | dict(layout="NHD"), dict(layout=layout))):
        source, destination = two(rng, old, new_, **sizes)
        assert_requantises(source, destination, np.array(PAIRS, np.int64), ways=ways(), device=DEVICE)


@pytest.mark.gpu_smoke
def test_many_of_another_format():
    rng, n = np.random.default_rng(9), 300 if HAS_GPU else 20
    source, destination = two(
        rng, dict(num_blocks=n, block_size=16), dict(num_blocks=2 * n, block_size=8, kv_cache_dtype="fp8"),
        num_layers=2, num_heads=8, head_size=128,
    )  # fmt: skip
    scales = (None, None), [np.float32([0.5]), np.float32([0.7])]
    pairs = np.stack([rng.permutation(16 * n)[:n], rng.permutation(16 * n)[:n]], axis=1)
    assert_requantises(source, destination, pairs, scales, ways(), DEVICE)
    assert_requantises(source, destination, None, scales, ways(), DEVICE)


def test_latent_caches():
    sizes = dict(num_heads=1, head_size=576, head_size_v=512, kv_cache_dtype="fp8_ds_mla", layout="block slot latent")
    assert_moves(*two(np.random.default_rng(3), {}, {}, **sizes), np.array(PAIRS, np.int32), ways(), DEVICE)


def test_many():
    rng, n = np.random.default_rng(4), 3000 if HAS_GPU else 100
    for layout in ("NHD", "HND", "HEAD_MAJOR"):
        source, destination = two(
            rng, dict(num_blocks=n, block_size=16), dict(num_blocks=2 * n, block_size=8, layout=layout), num_layers=2
        )
        pairs = np.stack([rng.permutation(16 * n)[:n], rng.permutation(16 * n)[:n]], axis=1)
        assert_moves(source, destination, pairs, ways(), DEVICE)
    assert_moves(source, destination, None, ways(), DEVICE)


@pytest.mark.parametrize("options", [{}, dict(kv_cache_dtype="fp8")], ids=["bits", "numbers"])
def test_cuda_graph(options):
    import torch

    import torchkv

    source, destination = two(np.random.default_rng(5), {}, dict(layout="HND") | options)
    old, new = cache_of(torchkv, *source, DEVICE), cache_of(torchkv, *destination, DEVICE)
    pairs = torch.full((len(PAIRS), 2), -1, device=DEVICE)

    def step():
        old.relayout(new, pairs)
        return torch.zeros(1, device=DEVICE)

    _, replay = captured(step)
    pairs.copy_(torch.tensor(PAIRS))
    replay()
    expected = (requantised if options else wanted)(source, destination, PAIRS)
    for got, want in zip(memory_of(new), expected, strict=True):
        np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize("options", [{}, dict(kv_cache_dtype="fp8")], ids=["bits", "numbers"])
def test_jax_in_place(options):
    import jax

    import jaxkv

    source, destination = two(np.random.default_rng(6), {}, dict(layout="HND") | options)
    old, new = cache_of(jaxkv, *source), cache_of(jaxkv, *destination)
    before = [array.unsafe_buffer_pointer() for array in new.caches]
    got = jax.jit(lambda new, old, pairs: old.relayout(new, pairs), donate_argnums=0)(new, old, np.array(PAIRS))
    assert [array.unsafe_buffer_pointer() for array in got.caches] == before
    expected = (requantised if options else wanted)(source, destination, PAIRS)
    for array, want in zip(memory_of(got), expected, strict=True):
        np.testing.assert_array_equal(bits(array), bits(want))
