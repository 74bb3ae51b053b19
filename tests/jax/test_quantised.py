"""Quantised caches under JAX's transformations: right, and in place, scale caches too."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from kvcore.oracle import write as reference
from tests.cases.arrays import bits, make_case, random_bits, random_normal, run_oracle, with_case

LAYERS = 3
KINDS = {
    "int8 of a head": dict(kv_cache_dtype="int8", scales="head"),
    "int8 in int8": dict(kv_cache_dtype="int8", cache_dtype="int8"),
    "fnuz": dict(kv_cache_dtype="fp8_e4m3fnuz"),
    "int4": dict(kv_cache_dtype="int4"),
    "nvfp4": dict(kv_cache_dtype="nvfp4", scales="head"),
    "scale caches": dict(kv_cache_dtype="int4", per_token_head=True),
    "scale caches of fp8": dict(kv_cache_dtype="fp8_e5m2", per_token_head=True),
}


def case_of(kind, **more):
    options = dict(num_blocks=64, head_size=32) | KINDS[kind] | more
    return make_case(np.random.default_rng(0), **options)


def inputs_of(case):
    """The op's arrays, the ones that are written in the middle."""
    scales = [jnp.asarray(s, jnp.float32) for s in (case.k_scale, case.v_scale) if s is not None]
    slots = jnp.asarray(case.slot_mapping, jnp.int32)
    return jnp.asarray(case.key), jnp.asarray(case.value), tuple(map(jnp.asarray, case.memory)), slots, scales


def write(case, key, value, memory, slots, scales, layer=None):
    """The op, as a function of arrays; always a tuple."""
    layer = case.layer if layer is None else layer
    more = {"scale_layout": case.scale_layout} if case.scale_caches else {}
    new = case.op(jaxkv)(
        key, value, *memory, slots, case.kv_cache_dtype, *scales, layout=case.layout, layer=layer, **more
    )
    return new if isinstance(new, tuple) or new is None else (new,)


def assert_same(got, want):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(np.asarray(w)), err_msg=f"array {i}")


def assert_in_place(compiled, memory):
    """All arrays are aliased, and no temporary has half the size of the largest."""
    sizes = [a.size * a.dtype.itemsize for a in memory]
    found = compiled.memory_analysis()
    assert found.alias_size_in_bytes >= sum(sizes)
    assert found.temp_size_in_bytes < max(sizes) / 2


LAYOUTS = ["NHD", "HND", "KV_NHD", "BLOCK_KV_HND", "PALLAS", "PACKED_NHD", "INTERLEAVED"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_jit_with_donation_updates_the_same_buffers(kind, layout):
    case = case_of(kind, layout=layout)
    step = jax.jit(functools.partial(write, case), donate_argnums=2)
    inputs = inputs_of(case)
    assert_in_place(step.lower(*inputs).compile(), case.memory)
    before = [a.unsafe_buffer_pointer() for a in inputs[2]]
    new = step(*inputs)
    assert [a.unsafe_buffer_pointer() for a in new] == before
    assert_same(new, run_oracle(case))


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "scale caches"])
def test_no_tokens(kind):
    case = case_of(kind, num_tokens=0)
    assert_same(jax.jit(functools.partial(write, case))(*inputs_of(case)), case.memory)


@pytest.mark.parametrize("per_token_head", [False, True])
@pytest.mark.parametrize("cache_dtype", ["float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_arrays_of_fp8(cache_dtype, per_token_head):
    """XLA copies these on a CPU, and rounds them as it likes where it may: the bits are the oracle's all the same."""
    kv_cache_dtype = cache_dtype.replace("float8", "fp8")
    case = make_case(
        np.random.default_rng(3), kv_cache_dtype=kv_cache_dtype, cache_dtype=cache_dtype, per_token_head=per_token_head
    )
    assert_same(jax.jit(functools.partial(write, case), donate_argnums=2)(*inputs_of(case)), run_oracle(case))


def test_without_donation_the_arguments_stay_as_they_were():
    case = case_of("scale caches")
    inputs = inputs_of(case)
    assert_same(write(case, *inputs), run_oracle(case))
    assert_same(inputs[2], case.memory)


@pytest.mark.parametrize("layout", ["NHD", "PACKED_HND", "head layer block slot dim"])
@pytest.mark.parametrize("kind", ["scale caches", "nvfp4"])
def test_scan_over_layers_in_a_loop_over_steps(kind, layout):
    more = {"scale_layout": "layer head block slot"} if layout == "PACKED_HND" and kind == "scale caches" else {}
    case = case_of(kind, layout=layout, num_layers=LAYERS, layer=0, **more)
    key, value, memory, slots, scales = inputs_of(case)

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(key, value, memory, slots, scales):
        def one_layer(memory, layer):
            return write(case, key, value, memory, slots, scales, layer), None

        def one_step(_, memory):
            return lax.scan(one_layer, memory, jnp.arange(LAYERS))[0]

        return lax.fori_loop(0, 2, one_step, memory)

    assert_in_place(decode.lower(key, value, memory, slots, scales).compile(), case.memory)
    want = case
    for layer in range(LAYERS):
        new = run_oracle(with_case(want, layer=layer))
        want = with_case(want, caches=new[: len(case.caches)], scale_caches=new[len(case.caches) :])
    assert_same(decode(key, value, memory, slots, scales), want.memory)


# ---- MLA


def latent_arrays(name, layers=(), dtype="bfloat16", num_blocks=32):
    rng = np.random.default_rng(1)
    units = stored_size(KV_CACHE_DTYPES[name], 576)
    cache = random_bits(rng, (*layers, num_blocks, 8, units), dtype if name == "auto" else "uint8")
    slots = np.array([3, -1, 255, 256, 0, 17, 16], np.int32)
    return random_bits(rng, (7, 512), dtype), random_bits(rng, (7, 64), dtype), cache, slots


@pytest.mark.parametrize("name", ["auto", "int4", "nvfp4", "fp8_ds_mla"])
def test_latent_rows_in_place(name):
    arrays = latent_arrays(name, layers=(2,))
    scale = None if name in ("auto", "fp8_ds_mla") else jnp.float32(0.37)
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, arrays[3], name, scale, layer=1)
    op = functools.partial(jaxkv.concat_and_cache_mla, kv_cache_dtype=name, scale=scale)

    step = jax.jit(lambda *x: op(*x[:4], layer=x[4]), donate_argnums=2)
    inputs = (*map(jnp.asarray, arrays), jnp.int32(1))
    assert_in_place(step.lower(*inputs).compile(), [want])
    before = inputs[2].unsafe_buffer_pointer()
    new = step(*inputs)
    assert new.unsafe_buffer_pointer() == before
    assert_same([new], [want])

    ref = jax.new_ref(jnp.asarray(arrays[2]))
    before = ref.unsafe_buffer_pointer()
    assert op(arrays[0], arrays[1], ref, arrays[3], layer=1) is None
    assert ref.unsafe_buffer_pointer() == before
    assert_same([ref[...]], [want])


def test_latent_rows_vmapped():
    arrays = latent_arrays("fp8_ds_mla")
    caches = jnp.stack([arrays[2], arrays[2][::-1]])
    op = functools.partial(jaxkv.concat_and_cache_mla, kv_cache_dtype="fp8_ds_mla")
    got = jax.vmap(lambda cache: op(arrays[0], arrays[1], cache, arrays[3]))(caches)
    want = np.array(caches)
    for cache in want:
        reference.concat_and_cache_mla(*arrays[:2], cache, arrays[3], "fp8_ds_mla")
    assert_same([got], [want])


# ---- Refs


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
@pytest.mark.parametrize("kind", ["scale caches", "nvfp4"])
def test_refs_are_updated_in_place(kind, layout, jit):
    case = case_of(kind, layout=layout)
    key, value, memory, slots, scales = inputs_of(case)
    refs = tuple(map(jax.new_ref, memory))
    before = [r.unsafe_buffer_pointer() for r in refs]
    call = functools.partial(write, case)
    assert (jax.jit(call) if jit else call)(key, value, refs, slots, scales) is None
    assert [r.unsafe_buffer_pointer() for r in refs] == before
    assert_same([r[...] for r in refs], run_oracle(case))


def test_refs_and_arrays_do_not_mix():
    case = case_of("scale caches")
    key, value, memory, slots, scales = inputs_of(case)
    mixed = (*map(jax.new_ref, memory[:2]), *memory[2:])
    with pytest.raises(TypeError) as error:
        write(case, key, value, mixed, slots, scales)
    assert str(error.value) == (
        "key_cache, value_cache, k_scale_cache and v_scale_cache must be four jax.Refs or four arrays, got some of each"
    )


def test_one_ref_for_both_scales_is_an_error():
    case = case_of("scale caches")
    key, value, memory, slots, scales = inputs_of(case)
    memory = list(map(jax.new_ref, memory[:3]))
    memory.append(memory[2])
    with pytest.raises(ValueError, match=r"^k_scale_cache and v_scale_cache must not overlap in memory$"):
        write(case, key, value, memory, slots, scales)


def test_scale_caches_are_read_from_refs():
    key = random_normal(np.random.default_rng(2), (4, 2, 16), "float32")
    refs = [jax.new_ref(jnp.zeros((2, 4, 2, 16), jnp.int8)) for _ in range(2)]
    refs += [jax.new_ref(jnp.full((2, 4, 2), jnp.nan)) for _ in range(2)]
    op = jaxkv.reshape_and_cache_flash_per_token_head_quant
    op(jnp.asarray(key), jnp.asarray(2 * key), *refs, jnp.arange(4), "int8")
    got = jaxkv.gather_kv(
        refs[:2], jnp.array([[0]]), jnp.array([4]), 4, dtype="float32", kv_cache_dtype="int8", k_scale=refs[2],
        v_scale=refs[3],
    )  # fmt: skip
    np.testing.assert_allclose(got[0][0], key, atol=np.abs(key).max() / 250)
    np.testing.assert_allclose(got[1][0], 2 * key, atol=np.abs(key).max() / 125)


# ---- vmap


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("scale caches", {}),  # blocks of the batch become one axis
        ("scale caches", {"scale_layout": "head block slot"}),  # the batch becomes an axis of layers
        ("scale caches", {"layout": "PACKED_HND"}),
        ("scale caches", {"num_layers": 2, "layer": 1}),
        ("scale caches", {"num_layers": 2, "layer": 1, "scale_layout": "block layer slot head"}),  # a loop
        ("nvfp4", {}),
        ("nvfp4", {"layout": "KV_NHD"}),
        ("int8 of a head", {"layout": "PALLAS"}),
    ],
)
def test_vmap(kind, more):
    cases = [
        make_case(np.random.default_rng(i), num_blocks=64, head_size=32,
                  slots=[3, -1, 600, 511, 512, 9], **(KINDS[kind] | more))
        for i in range(3)
    ]  # fmt: skip
    batch = jax.tree.map(lambda *x: jnp.stack(x), *map(inputs_of, cases))
    step = jax.jit(jax.vmap(functools.partial(write, cases[0])), donate_argnums=2)
    if "block layer" not in more.get("scale_layout", ""):
        assert_in_place(step.lower(*batch).compile(), batch[2])
    assert_same(step(*batch), [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


# ---- sharding


def mesh_of(kind, devices=4):
    return jax.make_mesh((devices,), ("tp",), axis_types=(kind,))


def over_heads(mesh, axes):
    return NamedSharding(mesh, P(*("tp" if "head" in axis else None for axis in axes)))


def place(case, mesh):
    """The case's arrays on the mesh, heads split."""
    key, value, memory, slots, scales = inputs_of(case)
    pattern = case.scale_layout or ("layer " if case.layout.has_layer else "") + "block slot head"
    axes = [*case.layout.arrays, *[[(name,) for name in pattern.split()]] * len(case.scale_caches)]
    rows = NamedSharding(mesh, P(None, "tp", None))
    return (
        jax.device_put(key, rows),
        jax.device_put(value, rows),
        tuple(jax.device_put(a, over_heads(mesh, x)) for a, x in zip(memory, axes, strict=True)),
        jax.device_put(slots, NamedSharding(mesh, P(None))),
        [jax.device_put(s, NamedSharding(mesh, P("tp" if s.ndim else None) if s.ndim else P())) for s in scales],
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("quantised", "layout"),
    [(q, x) for q in ("scale caches", "int8 of a head") for x in ("NHD", "HND", "KV_NHD", "PACKED_NHD", "INTERLEAVED")]
    + [("nvfp4", "PALLAS")],
)
def test_heads_over_devices(quantised, layout, kind):
    more = {"scale_layout": "head block slot"} if layout == "HND" and quantised == "scale caches" else {}
    case, mesh = case_of(quantised, layout=layout, num_heads=8, **more), mesh_of(kind)
    with jax.set_mesh(mesh):
        inputs = place(case, mesh)
        step = jax.jit(functools.partial(write, case), donate_argnums=2)
        compiled = step.lower(*inputs).compile()
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
        found, size = compiled.memory_analysis(), sum(a.nbytes for a in case.memory) // 4
        assert found.alias_size_in_bytes >= size
        assert found.temp_size_in_bytes < size / 2
        new = step(*inputs)
    for array, old in zip(new, place(case, mesh)[2], strict=True):
        assert array.sharding.is_equivalent_to(old.sharding, array.ndim)
    assert_same(new, run_oracle(case))


def test_scale_caches_follow_caches_that_are_split():
    """Without a sharding of their own they get one, and the values are right."""
    case, mesh = case_of("scale caches", num_heads=8), mesh_of(AxisType.Auto)
    key, value, memory, slots, scales = place(case, mesh)
    alone = [jax.device_put(np.asarray(a), NamedSharding(mesh, P())) for a in memory[2:]]
    assert_same(
        jax.jit(functools.partial(write, case))(key, value, (*memory[:2], *alone), slots, scales), run_oracle(case)
    )


def test_heads_of_nvfp4_inside_regions_are_not_split():
    """A device would have elements of all heads, or scales of some: its part is no cache."""
    case, mesh = case_of("nvfp4", num_heads=8), mesh_of(AxisType.Auto)
    key, value, memory, slots, scales = place(case, mesh)
    step = jax.jit(functools.partial(write, case))
    for call in (step, functools.partial(write, case)):
        with pytest.raises(ValueError, match=r"^a cache of nvfp4") as error:
            call(key, value, memory, slots, scales)
        assert str(error.value) == (
            "a cache of nvfp4 may be split over heads only where its layout has them before block, as in "
            "'head block slot dim', got 'block slot head dim' split over tp; jax.shard_map can give each device a "
            "cache of its own heads"
        )
    whole = NamedSharding(mesh, P())
    memory = tuple(jax.device_put(np.asarray(a), whole) for a in inputs_of(case)[2])
    new = step(key, value, memory, slots, scales)  # of keys that are split, it writes all everywhere
    assert_same(new, run_oracle(case))
    tables, lens = (jax.device_put(np.int32(x), whole) for x in ([[0, 2]], [16]))
    query = jax.device_put(draws(1, 16, 32), NamedSharding(mesh, P(None, "tp")))
    options = dict(kv_cache_dtype="nvfp4", k_scale=scales[0], v_scale=scales[1])
    finite = tuple(a & 0x37 for a in new)  # no scale is NaN
    out = jax.jit(lambda q, c: jaxkv.paged_attention(q, c, tables, lens, **options))(query, finite)
    alone = [np.asarray(x) for x in (query, *finite, tables, lens)]
    want = jaxkv.paged_attention(
        alone[0], alone[1:3], *alone[3:], kv_cache_dtype="nvfp4", k_scale=case.k_scale, v_scale=case.v_scale
    )
    np.testing.assert_allclose(out, want, rtol=1e-5)


# ---- PagedKVCache

BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 12, 4, 2, 32
SLOTS = np.array([28, 29, 30, 31, 8, 9, 16, 17, 18], np.int32)  # 6 tokens of the first sequence, 3 of the second
TABLES, LENS = np.array([[7, 2, 9], [4, 11, -1]], np.int32), np.array([6, 3], np.int32)


def draws(*shape):
    return random_normal(np.random.default_rng(sum(shape)), shape, "float32")


KEY, VALUE, QUERY = draws(9, HEADS, HEAD_SIZE), draws(9, HEADS, HEAD_SIZE) * 2, draws(2, HEADS * 3, HEAD_SIZE)
K_SCALES, V_SCALES = map(np.asarray, reference.kv_scales(KEY, VALUE, "int8", "head"))


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


@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scales", ["token and head", "head"])
def test_a_cache_with_heads_over_devices(scales, kind, layout):
    mesh = mesh_of(kind, 2)
    sharding = over_heads(mesh, CacheLayout.of(layout).with_layer().arrays[0])
    rows, whole = NamedSharding(mesh, P(None, "tp", None)), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        options: dict = {}
        if scales == "head":
            own = [jax.device_put(s, NamedSharding(mesh, P("tp"))) for s in (K_SCALES, V_SCALES)]
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


@pytest.mark.parametrize("layout", ["MLA", "slot layer block latent"])
@pytest.mark.parametrize(("name", "bound"), [("auto", 1e-6), ("fp8_ds_mla", 0.2), ("int8", 0.03), ("nvfp4", 0.6)])
def test_a_latent_cache(name, bound, layout):
    kv_c, k_pe, query = draws(9, 512), draws(9, 64), draws(2, 3, 576)
    scale = {"int8": 0.04, "nvfp4": 0.002}.get(name)
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
