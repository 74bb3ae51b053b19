"""Quantised caches under JAX's transformations: right, and in place, scale caches too."""

import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.oracle import write as reference
from tests.cases.arrays import make_case, random_normal, run_oracle, with_case
from tests.cases.jax_quantised import (
    KINDS,
    LAYERS,
    assert_in_place,
    assert_same,
    case_of,
    draws,
    inputs_of,
    latent_arrays,
    mesh_of,
    place,
    write,
)

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
@pytest.mark.parametrize("kind", ["scale caches", "nvfp4", "int8 of a layer and head"])
def test_scan_over_layers_in_a_loop_over_steps(kind, layout):
    more = {"scale_layout": "layer head block slot"} if layout == "PACKED_HND" and kind == "scale caches" else {}
    case = case_of(kind, **{"layout": layout, "num_layers": LAYERS, "layer": 0} | more)
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
        ("int8 of a layer and head", {}),
        ("int8 of a layer and head", {"layout": "block layer slot head dim"}),
        ("int8 of a layer and head", {"layout": "head layer block slot dim"}),
        ("int8 of a layer and head", {"scales": "layer"}),
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
    if not any(
        f"{name} layer" in more.get(key, "") for key in ("layout", "scale_layout") for name in ("block", "head")
    ):
        assert_in_place(step.lower(*batch).compile(), batch[2])
    assert_same(step(*batch), [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


@pytest.mark.parametrize("layout", ["NHD", "block layer slot head dim"])
@pytest.mark.parametrize("batched", ["layer", "scales", "slots"])
def test_vmap_over_some_with_scales_of_layers(batched, layout):
    """Each item has its own layer's scale, whether layers or scales are the batch, and none where it has no layer."""
    case = case_of("int8 of a layer and head", layout=layout, num_blocks=4)
    key, value, memory, slots, scales = inputs_of(case)
    shared = {"layer": jnp.int32(1), "scales": scales, "slots": slots}
    batches = {
        "layer": jnp.array([2, 0, 5], jnp.int32),
        "scales": [jnp.stack([s, 2 * s, s / 3]) for s in scales],
        "slots": jnp.stack([slots, slots + 1, slots - 2]),
    }
    run = jax.vmap(
        lambda x: write(case, key, value, memory, x["slots"], x["scales"], x["layer"]),
        in_axes=({name: 0 if name == batched else None for name in shared},),
    )
    got = run(shared | {batched: batches[batched]})
    for i in range(3):
        item = shared | {batched: jax.tree.map(operator.itemgetter(i), batches[batched])}
        k_scale, v_scale = map(np.asarray, item["scales"])
        want = with_case(case, layer=int(item["layer"]), k_scale=k_scale, v_scale=v_scale)
        want = with_case(want, slot_mapping=np.asarray(item["slots"]))
        assert_same([array[i] for array in got], run_oracle(want))


# ---- sharding


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("quantised", "layout"),
    [
        (q, x)
        for q in ("scale caches", "int8 of a head", "int8 of a layer and head")
        for x in ("NHD", "HND", "KV_NHD", "PACKED_NHD", "INTERLEAVED")
    ]
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
