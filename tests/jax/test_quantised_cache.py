"""jaxkv.PagedKVCache with quantised contents."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.layout import CacheLayout
from kvcore.oracle import write as reference
from tests.cases.jax_quantised import LAYERS, draws, mesh_of, over_heads

BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 12, 4, 2, 32


SLOTS = np.array([28, 29, 30, 31, 8, 9, 16, 17, 18], np.int32)  # 6 tokens of the first sequence, 3 of the second


TABLES, LENS = np.array([[7, 2, 9], [4, 11, -1]], np.int32), np.array([6, 3], np.int32)


KEY, VALUE, QUERY = draws(9, HEADS, HEAD_SIZE), draws(9, HEADS, HEAD_SIZE) * 2, draws(2, HEADS * 3, HEAD_SIZE)


K_SCALES, V_SCALES = map(np.asarray, reference.kv_scales(KEY, VALUE, "int8", "head"))


OF_LAYERS = [np.stack([s * 1e9, s, s * 1e-9]) for s in (K_SCALES, V_SCALES)]  # good ones for layer 1


def create(**options):
    defaults = dict(
        num_layers=LAYERS, num_blocks=BLOCKS, block_size=BLOCK_SIZE, num_heads=HEADS, head_size=HEAD_SIZE,
        dtype="float32", kv_cache_dtype="int8", per_token_head=True,
    )  # fmt: skip
    return jaxkv.PagedKVCache.create(**(defaults | options))


def expected():
    exact = create(kv_cache_dtype="auto", per_token_head=False)
    exact = exact.write(jnp.asarray(KEY), jnp.asarray(VALUE), SLOTS, layer=1)
    return exact.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "PACKED_HND", "scale_layout": "layer block head slot"},
        {"kv_cache_dtype": "fp8"},
        {"per_token_head": False, "k_scale": K_SCALES, "v_scale": V_SCALES},
        {"per_token_head": False, "k_scale": OF_LAYERS[0], "v_scale": OF_LAYERS[1]},
        {"per_token_head": False, "k_scale": OF_LAYERS[0], "v_scale": OF_LAYERS[1][:, :1], "layout": "PACKED_NHD"},
        {"per_token_head": False, "kv_cache_dtype": "nvfp4", "k_scale": 0.002, "v_scale": 0.003},
        {"per_token_head": False, "kv_cache_dtype": "nvfp4", "layout": "KV_NHD"},
    ],
)
def test_a_cache_is_written_and_attended(options):
    cache = create(**options)
    cache = cache.write(jnp.asarray(KEY), jnp.asarray(VALUE), SLOTS, layer=1)
    bound = {"int8": 0.1, "fp8": 0.3}.get(cache.spec.kv_cache_dtype, 1)
    got = cache.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=1)
    np.testing.assert_allclose(got, expected(), atol=bound)
    key, value = cache.gather(jnp.asarray(TABLES), jnp.asarray(LENS), 7, layer=1, dtype="float32")
    np.testing.assert_allclose(key[0, :6], KEY[:6], atol=bound)
    np.testing.assert_allclose(value[1, :3], VALUE[6:], atol=bound)
    assert not np.asarray(key[0, 6:]).any()
    if cache.spec.scale_layout is not None:
        assert cache.nbytes == sum(a.nbytes for a in jax.tree.leaves(cache))


def test_a_pytree_with_scale_caches_donated_and_scanned():
    cache = create(num_blocks=256, layout="PACKED_NHD")
    assert len(jax.tree.leaves(cache)) == 3
    assert jax.eval_shape(lambda c: c, cache).spec == cache.spec

    def step(cache):
        def one_layer(cache, layer):
            cache = cache.write(jnp.asarray(KEY), jnp.asarray(VALUE), jnp.asarray(SLOTS), layer=layer)
            return cache, cache.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=layer)

        return lax.scan(one_layer, cache, jnp.arange(2))

    compiled = jax.jit(step, donate_argnums=0).lower(cache).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes // 2
    new, out = compiled(cache)
    assert cache.k_scale.is_deleted()
    np.testing.assert_allclose(out, np.stack([expected()] * 2), atol=0.1)
    assert new.k_scale[:2].any()
    assert not new.k_scale[2].any()


def test_a_cache_vmapped():
    caches = jax.tree.map(lambda a: jnp.stack([a, a]), create(num_layers=None))
    keys = jnp.stack([KEY, KEY * 8])
    caches = jax.vmap(lambda cache, key: cache.write(key, jnp.asarray(VALUE), jnp.asarray(SLOTS)))(caches, keys)
    np.testing.assert_array_equal(caches.caches[0][0], caches.caches[0][1])
    np.testing.assert_array_equal(caches.k_scale[0] * 8, caches.k_scale[1])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED", "KV_NHD"])
def test_a_loop_over_layers_copies_no_array(layout, heads):
    """XLA's CPU code moves axes of one element about: a copy of all scales, where each device has one head."""
    cache = create(layout=layout, num_heads=heads, num_blocks=4099)  # a number that nothing else has
    key, query = jnp.ones((9, heads, HEAD_SIZE)), jnp.ones((2, heads, HEAD_SIZE))

    def step(layer, carried):
        cache, out = carried
        cache = cache.write(key, key, SLOTS, layer=layer)
        return cache, out + cache.attend(query, jnp.asarray(TABLES), jnp.asarray(LENS), layer=layer)

    loop = jax.jit(lambda cache: lax.fori_loop(0, LAYERS, step, (cache, jnp.zeros_like(query))), donate_argnums=0)
    compiled = loop.lower(cache).compile()
    assert "4099" in compiled.as_text()
    assert not re.findall(r"= \w+\[[\d,]*4099[\d,]*\]\S* copy\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.02 * cache.nbytes


@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scales", ["token and head", "head", "layer and head"])
def test_a_cache_with_heads_over_devices(scales, kind, layout):
    mesh = mesh_of(kind, 2)
    sharding = over_heads(mesh, CacheLayout.of(layout).with_layer().arrays[0])
    rows, whole = NamedSharding(mesh, P(None, "tp", None)), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        options: dict = {}
        if scales != "token and head":
            spec, arrays = (P("tp"), (K_SCALES, V_SCALES)) if scales == "head" else (P(None, "tp"), OF_LAYERS)
            own = [jax.device_put(s, NamedSharding(mesh, spec)) for s in arrays]
            options = {"per_token_head": False, "k_scale": own[0], "v_scale": own[1]}
        cache = create(layout=layout, sharding=sharding, **options)
        key, value, query = (jax.device_put(x, rows) for x in (KEY, VALUE, QUERY))
        tables, lens, slots = (jax.device_put(x, whole) for x in (TABLES, LENS, SLOTS))

        def run(cache, key, value, query, tables, lens, slots):
            cache = cache.write(key, value, slots, layer=1)
            out = cache.attend(query, tables, lens, layer=1)
            return cache, out, cache.gather(tables, lens, 7, layer=1, dtype="float32")[0]

        compiled = jax.jit(run, donate_argnums=0).lower(cache, key, value, query, tables, lens, slots).compile()
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
        assert "tp" in cache.k_scale.sharding.spec
        cache, out, keys = compiled(cache, key, value, query, tables, lens, slots)
    np.testing.assert_allclose(out, expected(), atol=0.1)
    np.testing.assert_allclose(keys[0, :6], KEY[:6], atol=0.02)
    assert out.sharding.spec[1] == "tp"
    assert keys.sharding.spec[2] == "tp"


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["MLA", "slot layer block latent"])
@pytest.mark.parametrize(("name", "bound"), [("auto", 1e-6), ("fp8_ds_mla", 0.2), ("int8", 0.03), ("nvfp4", 0.6)])
def test_a_latent_cache(name, bound, layout):
    kv_c, k_pe, query = draws(9, 512), draws(9, 64), draws(2, 3, 576)
    scale = {"int8": np.array([[1e9], [0.04], [0]], np.float32), "nvfp4": 0.002}.get(name)
    options = dict(
        num_heads=1, head_size=576, head_size_v=512, layout=layout, kv_cache_dtype=name, per_token_head=False,
        k_scale=scale,
    )  # fmt: skip
    cache = create(**options)
    write = jax.jit(lambda cache, *x: cache.write(*x, layer=1), donate_argnums=0)
    cache = write(cache, kv_c, k_pe, SLOTS)
    key, value = cache.gather(TABLES, LENS, 7, layer=1, dtype="float32")
    np.testing.assert_allclose(key[0, :6, 0], np.concatenate([kv_c, k_pe], 1)[:6], atol=bound)
    np.testing.assert_allclose(value[1, :3, 0], kv_c[6:], atol=bound)
    exact = create(**options | {"kv_cache_dtype": "auto", "k_scale": None}).write(kv_c, k_pe, SLOTS, layer=1)
    got, want = (c.attend(query, TABLES, LENS, layer=1) for c in (cache, exact))
    np.testing.assert_allclose(got, want, atol=bound * 2)


def test_a_layer_is_rotated_and_written_with_its_own_scale():
    cache = create(per_token_head=False, k_scale=OF_LAYERS[0], v_scale=OF_LAYERS[1])
    cos_sin = jnp.concatenate([jnp.ones((1, HEAD_SIZE // 2)), jnp.zeros((1, HEAD_SIZE // 2))], 1)
    query, places = jnp.zeros((9, HEADS, HEAD_SIZE)), np.zeros(9, np.int32)
    _, cache = cache.rope_and_cache(query, KEY, VALUE, places, cos_sin, SLOTS, rope="neox", layer=jnp.int32(1))
    key, value = cache.gather(TABLES, LENS, 7, layer=1, dtype="float32")
    np.testing.assert_allclose(key[0, :6], KEY[:6], atol=0.1)
    np.testing.assert_allclose(value[1, :3], VALUE[6:], atol=0.1)


BAD = {
    "k_scale": ({"k_scale": 0.5}, "k_scale must be None with per_token_head, which computes scales, got 0.5"),
    "v_scale": ({"v_scale": 0.5}, "v_scale must be None with per_token_head, which computes scales, got 0.5"),
    "v_scale of a latent layout": (
        {"layout": "MLA", "num_heads": 1, "per_token_head": False, "k_scale": 0.5, "v_scale": 0.5},
        "v_scale must be None for layout 'layer block slot latent', where k_scale is for both, got 0.5",
    ),
    "scale_layout": (
        {"per_token_head": False, "scale_layout": "layer block slot head"},
        "scale_layout must be None without per_token_head, got 'layer block slot head'",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_caches(bad):
    options, message = BAD[bad]
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        create(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_a_donated_cache_leaves_scales_to_whoever_gave_them(convert):
    """One scale for keys, for values, for another cache; and the array stays the caller's."""
    scale = convert(K_SCALES)
    cache, other = (create(per_token_head=False, k_scale=scale, v_scale=scale) for _ in range(2))
    write = jax.jit(jaxkv.PagedKVCache.write, donate_argnums=0)
    slots, layer = jnp.asarray(SLOTS), jnp.array(1)
    want = create(per_token_head=False, k_scale=K_SCALES, v_scale=K_SCALES).write(KEY, KEY, SLOTS, layer=1)
    for each in (cache, other):
        new = write(each, jnp.asarray(KEY), jnp.asarray(KEY), slots, layer=layer)
        np.testing.assert_array_equal(new.caches[0], want.caches[0])
        np.testing.assert_array_equal(new.caches[1], want.caches[1])
    np.testing.assert_array_equal(scale, K_SCALES)


LATENT = dict(layout="MLA", num_heads=1, head_size=16, head_size_v=12, k_scale=0.5, v_scale=None)


@pytest.mark.parametrize(("options", "make"), [
    ({}, lambda cache: cache.write(KEY, VALUE, SLOTS, layer=1)),
    ({}, lambda cache: cache.copy_blocks([[0, 1]])),
    ({}, lambda cache: create(per_token_head=False, k_scale=2.0).relayout(cache)),
    ({}, lambda cache: create(per_token_head=False, k_scale=2.0).swap_blocks(cache, [[0, 1]])),
    (LATENT, lambda cache: cache.write(KEY[:, 0, :12], KEY[:, 0, :4], SLOTS, layer=1)),
], ids=["write", "copy_blocks", "relayout", "swap_blocks", "latent"])  # fmt: skip
def test_what_is_made_of_a_cache_can_be_donated_and_leaves_it_as_it_was(options, make):
    """Outside jit, where each cache is one of its own."""
    cache = create(**(dict(per_token_head=False, k_scale=K_SCALES, v_scale=0.5) | options))
    want = [np.array(array) for array in jax.tree.leaves(cache)]
    new = make(cache)
    assert new.spec == cache.spec
    jax.jit(lambda cache: cache, donate_argnums=0)(new)
    assert all(array.is_deleted() for array in jax.tree.leaves(new))
    for array, before in zip(jax.tree.leaves(cache), want, strict=True):
        np.testing.assert_array_equal(array, before)


def test_scales_are_computed_by_one_program():
    """One op after the other would hold copies of the sample, and a NaN on the way would stop `jax.debug_nans`."""
    with jax.debug_nans(True):
        got = jaxkv.kv_scales(jnp.asarray(KEY), jnp.asarray(VALUE), "int8", "head")
    for scales, want in zip(got, (K_SCALES, V_SCALES), strict=True):
        np.testing.assert_array_equal(scales, want)
