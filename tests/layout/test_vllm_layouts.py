"""vLLM's six layouts, whose axis of layers is anywhere: their names, their memory, and every op on them."""

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
import torchkv
from kvcore.layout import CacheLayout
from tests.cases.arrays import assert_equals_oracle, make_case, to_torch
from tests.cases.gathers import assert_gathers
from tests.cases.jax_ropes import assert_same as assert_same_jax
from tests.cases.jax_ropes import call_jax
from tests.cases.layouts import VLLM
from tests.cases.quantised_reads import read_case
from tests.cases.quantised_writes import quantised_case
from tests.cases.reads import assert_near_oracle, make_read
from tests.cases.rope import RopeCase, run_oracle
from tests.cases.torch_ropes import assert_same, run_torch

NAMES = pytest.mark.parametrize("name", VLLM)


@NAMES
def test_names(name):
    layout = CacheLayout.from_vllm(name)
    assert layout == CacheLayout(VLLM[name]) == CacheLayout.from_vllm(f" {name.lower()}")
    assert layout.single_array
    assert layout.packed
    assert layout.has_layer
    assert layout.with_layer() is layout


def test_two_are_layouts_of_ours_with_layers_in_front():
    assert CacheLayout.from_vllm("LBHNC") == CacheLayout.PACKED_HND.with_layer()
    assert CacheLayout.from_vllm("LBNHC") == CacheLayout.PACKED_NHD.with_layer()


@pytest.mark.parametrize("name", ["", "NHD", "LBHN", "BLHNC ,", "LNBHC"])
def test_other_names(name):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CacheLayout.from_vllm(name)
    assert str(error.value) == f"name must be one of LBHNC, LBNHC, LHBNC, BLHNC, BLNHC, BHLNC, got {name!r}"


@pytest.mark.parametrize("name", [None, 3, CacheLayout.NHD, b"LBHNC"])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError) as error:
        CacheLayout.from_vllm(name)
    assert str(error.value) == f"name must be a string, got {name!r}"


@NAMES
def test_memory(name):
    """Sizes and strides, by what the letters say."""
    sizes = dict(L=3, B=5, H=2, N=4, C=8 + 6)
    layout = CacheLayout.from_vllm(name)
    shape = tuple(sizes[letter] for letter in name)
    extents = dict(num_layers=3, num_blocks=5, num_heads=2, block_size=4, head_size=8, head_size_v=6)
    assert layout.shapes(**extents) == (shape,)
    places = np.arange(np.prod(shape)).reshape(shape).transpose([name.index(letter) for letter in "LBNHC"])
    (num_layers, *rest, size, size_v), key, value = layout.place([shape], head_size=8)
    assert (num_layers, *rest, size, size_v) == (3, 5, 4, 2, 8, 6)
    for address, want in ((key, places[..., :8]), (value, places[..., 8:])):
        np.testing.assert_array_equal(address.of(*np.ogrid[tuple(map(slice, want.shape))]), want)


# ---- every op


@NAMES
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8_e4m3", "scales": "head"}], ids=["auto", "fp8"])
def test_write(name, options):
    case = make_case(
        np.random.default_rng(0), layout=VLLM[name], head_size_v=24, num_layers=3, layer=1,
        slots=[3, -1, 39, 40, 0, 17, 16], **options,
    )  # fmt: skip
    assert_equals_oracle(case)


@NAMES
@pytest.mark.parametrize(("kv_cache_dtype", "granularity"), [("int8", "token and head"), ("nvfp4", "tensor")])
def test_quantised_write(name, kv_cache_dtype, granularity):
    assert_equals_oracle(quantised_case(kv_cache_dtype, granularity, VLLM[name], layer=2))


@NAMES
@pytest.mark.parametrize("query_lens", [None, (1, 0, 3, 2)], ids=["decode", "ragged"])
def test_attention(name, query_lens):
    case = make_read(
        np.random.default_rng(1), layout=VLLM[name], dtype="bfloat16", head_size_v=24, num_layers=3, layer=1,
        query_lens=query_lens,
    )  # fmt: skip
    assert_near_oracle(case)


@NAMES
@pytest.mark.parametrize(("kv_cache_dtype", "granularity"), [("int8", "token_head"), ("nvfp4", "tensor")])
def test_quantised_attention(name, kv_cache_dtype, granularity):
    assert_near_oracle(read_case(2, kv_cache_dtype, granularity, VLLM[name], num_layers=3, layer=2))


@NAMES
@pytest.mark.parametrize(("kv_cache_dtype", "granularity"), [("auto", "tensor"), ("int4", "head"), ("nvfp4", "tensor")])
def test_gather(name, kv_cache_dtype, granularity):
    case = read_case(3, kv_cache_dtype, granularity, VLLM[name], num_layers=3, layer=1, head_size_v=32)
    assert_gathers(case, 21, "bfloat16")


@NAMES
def test_rope(name):
    case = RopeCase("vllm", layout=VLLM[name], num_layers=3, layer=1, k_weights="bfloat16").make()
    want = run_oracle(case)
    for portable in (True, False):
        assert_same(run_torch(case, backend="torch" if portable else "interpret"), want)
        assert_same_jax(call_jax(case, backend="xla" if portable else "interpret"), want)


@NAMES
def test_a_cache(name):
    """Both twins: of two layers each sees its own; without its axis of layers it is a view that torch has."""
    rng = np.random.default_rng(4)
    key, value = (rng.standard_normal((6, 2, 16), np.float32) for _ in range(2))
    slots, tables, lens = np.array([9, 10, 11, 20, 21, 22]), np.array([[2, 5]], np.int32), np.array([7], np.int32)
    extents = dict(num_layers=2, num_blocks=6, block_size=4, num_heads=2, head_size=16, dtype="float32")
    ours = jaxkv.PagedKVCache.create(layout=CacheLayout.from_vllm(name), **extents)
    theirs = torchkv.PagedKVCache.create(layout=CacheLayout.from_vllm(name), **extents)
    step = jax.jit(lambda cache: cache.write(key, value, slots, layer=1), donate_argnums=0)
    compiled = step.lower(ours).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= ours.nbytes
    ours = compiled(ours)
    theirs.write(to_torch(key), to_torch(value), to_torch(slots), layer=1)
    np.testing.assert_array_equal(ours.caches[0], theirs.caches[0])
    for layer in (0, 1):
        got, _ = ours.gather(tables, lens, 7, layer=layer)
        same, _ = theirs.gather(to_torch(tables), to_torch(lens), 7, layer=layer)
        np.testing.assert_array_equal(got, same)
        np.testing.assert_array_equal(got[0, 1:], key if layer else np.zeros_like(key))
    view = theirs.caches[0].select(name.index("L"), 1)
    pattern = VLLM[name].replace("layer ", "")
    got, _ = torchkv.gather_kv(view, to_torch(tables), to_torch(lens), 7, layout=pattern, head_size=16)
    np.testing.assert_array_equal(got[0, 1:], key)


@pytest.mark.parametrize("name", ["BLHNC", "BHLNC", "LHBNC"])
def test_heads_over_devices(name):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = CacheLayout.from_vllm(name)
    split = NamedSharding(mesh, P(*("tp" if axis == ("head",) else None for axis in layout.arrays[0])))
    rows, whole = NamedSharding(mesh, P(None, "tp", None)), NamedSharding(mesh, P())
    cache = jaxkv.PagedKVCache.create(
        num_layers=2, num_blocks=6, block_size=4, num_heads=2, head_size=16, dtype="float32", layout=layout,
        sharding=split,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    key, query = (rng.standard_normal((3, heads, 16), np.float32) for heads in (2, 4))
    slots, tables, lens = np.array([8, 9, 22]), np.array([[2], [5], [1]], np.int32), np.array([2, 3, 0], np.int32)

    def run(cache, key, query):
        cache = cache.write(key, key, slots, layer=1)
        return cache, cache.attend(query, tables, lens, layer=1)

    alone = jaxkv.PagedKVCache(tuple(jax.device_put(c, jax.devices()[0]) for c in cache.caches), cache.spec)
    want = run(alone, key, query)
    operands = jax.device_put(key, rows), jax.device_put(query, rows)
    compiled = jax.jit(run, donate_argnums=0, out_shardings=(None, whole)).lower(cache, *operands).compile()
    got = compiled(cache, *operands)
    np.testing.assert_array_equal(got[0].caches[0], want[0].caches[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)


def test_torch_fakes():
    """Under torch.compile, strides of such a cache are as they are."""
    cache = torch.zeros(6, 2, 3, 4, 32)  # BHLNC
    key = torch.randn(3, 2, 16)

    def step(key, slots):
        torchkv.reshape_and_cache_flash_diffkv(key, key, cache, slots, layout=VLLM["BHLNC"], layer=2)
        return cache.sum()

    want = torch.zeros_like(cache)
    for token, slot in enumerate((5, 21, 6)):
        want[slot // 4, :, 2, slot % 4] = torch.cat([key[token], key[token]], -1)
    torch.compile(step, fullgraph=True, backend="aot_eager")(key, torch.tensor([5, 21, 6]))
    assert torch.equal(cache, want)
