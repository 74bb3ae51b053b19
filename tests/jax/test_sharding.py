"""Caches split by heads over eight devices, without a collective. (CPU devices; test_compiled.py has GPU programs.)"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from jaxkv._primitive import sharding
from kvcore.layout import CacheLayout
from tests.cases.arrays import bits, make_case, run_oracle

LAYOUTS = (
    "NHD",
    "HND",
    "HEAD_MAJOR",
    "PALLAS",
    "KV_NHD",
    "PACKED_NHD",
    "INTERLEAVED",
    "layer block slot head dim",
)


def mesh_of(kind, shape=(8,), names=("tp",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def head_spec(axes):
    return P(*("tp" if "head" in axis else None for axis in axes))


def case_for(layout):
    layered = CacheLayout.of(layout).has_layer
    return make_case(
        np.random.default_rng(0), layout=layout, num_heads=8, head_size=16,
        num_layers=2 if layered else None, layer=1 if layered else None,
    )  # fmt: skip


def place(case, mesh):
    """The case's arrays on the mesh, heads split."""
    rows = NamedSharding(mesh, P(None, "tp", None))
    caches = [
        jax.device_put(c, NamedSharding(mesh, head_spec(axes)))
        for c, axes in zip(case.caches, case.layout.arrays, strict=True)
    ]
    slots = jax.device_put(case.slot_mapping.astype(np.int32), NamedSharding(mesh, P(None)))
    return jax.device_put(case.key, rows), jax.device_put(case.value, rows), *caches, slots


def assert_same(got, want):
    for g, w in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(w))


def assert_local(compiled, cache_bytes):
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes // 8
    assert memory.temp_size_in_bytes < cache_bytes // 8 // 2
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads(layout, kind):
    case, mesh = case_for(layout), mesh_of(kind)

    def write(*x):
        return case.op(jaxkv)(*x, layout=case.layout, layer=case.layer)

    with jax.set_mesh(mesh):
        inputs = place(case, mesh)
        step = jax.jit(write, donate_argnums=tuple(range(2, len(inputs) - 1)))
        assert_local(step.lower(*inputs).compile(), sum(c.nbytes for c in case.caches))
        new = step(*inputs)
    for cache, axes in zip(new if isinstance(new, tuple) else (new,), case.layout.arrays, strict=True):
        assert cache.sharding.is_equivalent_to(NamedSharding(mesh, head_spec(axes)), cache.ndim)
    assert_same(new, run_oracle(case))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_heads_outside_jit(layout):
    case, mesh = case_for(layout), mesh_of(AxisType.Auto)
    assert_same(case.op(jaxkv)(*place(case, mesh), layout=case.layout), run_oracle(case))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_heads_of_explicit_shardings_without_a_mesh_in_context(layout):
    case, mesh = case_for(layout), mesh_of(AxisType.Explicit)
    write = jax.jit(lambda *x: case.op(jaxkv)(*x, layout=case.layout))
    assert_same(write(*place(case, mesh)), run_oracle(case))


def test_fp8_with_traced_scale_and_layer():
    case = make_case(np.random.default_rng(1), num_heads=8, head_size=16, num_layers=2, layer=1, kv_cache_dtype="fp8")
    mesh = mesh_of(AxisType.Auto)

    def write(scale, layer, *x):
        return jaxkv.reshape_and_cache_flash(*x, "fp8", scale, case.v_scale, layout=case.layout, layer=layer)

    new = jax.jit(write)(jnp.float32(case.k_scale), jnp.int32(1), *place(case, mesh))
    assert_same(new, run_oracle(case))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_shard_map(layout, check_vma):
    case, mesh = case_for(layout), mesh_of(AxisType.Auto)
    specs = tuple(head_spec(axes) for axes in case.layout.arrays)
    local = jax.shard_map(
        lambda *x: case.op(jaxkv)(*x, layout=case.layout),
        mesh=mesh,
        in_specs=(P(None, "tp"), P(None, "tp"), *specs, P()),
        out_specs=specs,
        check_vma=check_vma,
    )
    step = jax.jit(local, donate_argnums=tuple(range(2, 2 + len(specs))))
    inputs = place(case, mesh)
    assert_local(step.lower(*inputs).compile(), sum(c.nbytes for c in case.caches))
    assert_same(step(*inputs), run_oracle(case))


def test_shard_map_over_blocks_of_each_device():
    """Data parallel: every device has blocks and slots of its own; only tokens for it are its own business."""
    case = make_case(
        np.random.default_rng(2),
        num_blocks=16,
        num_heads=2,
        head_size=16,
        num_tokens=8,
        slots=range(0, 128, 16),
    )
    mesh = mesh_of(AxisType.Auto)

    def local(key, value, key_cache, value_cache, slots):
        first = jax.lax.axis_index("tp") * 16  # two blocks of eight slots a device
        mine = (slots >= first) & (slots < first + 16)
        return jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, jnp.where(mine, slots - first, -1))

    call = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("tp"), P("tp"), P()), out_specs=P("tp"))
    got = call(case.key, case.value, *case.caches, jnp.asarray(case.slot_mapping, jnp.int32))
    assert_same(got, run_oracle(case))


@pytest.mark.parametrize(
    ("axis", "spec"), [("block", P("tp")), ("slot", P(None, "tp")), ("dim", P(None, None, None, "tp"))]
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_any_other_split_raises(kind, axis, spec):
    case = make_case(np.random.default_rng(3), num_blocks=16, num_heads=8, head_size=16)
    mesh = mesh_of(kind)
    caches = [jax.device_put(c, NamedSharding(mesh, spec)) for c in case.caches]
    query, tables, lens = np.ones((1, 8, 16), case.key.dtype), np.array([[0, 1]]), np.array([9])
    slots = case.slot_mapping.astype(np.int32)

    def write(key_cache, value_cache):
        return jaxkv.reshape_and_cache_flash(case.key, case.value, key_cache, value_cache, slots)

    def write_refs(*caches):
        refs = [jax.new_ref(c) for c in caches]
        write(*refs)
        return [ref[...] for ref in refs]

    calls = [
        write,
        write_refs,
        lambda *caches: jaxkv.paged_attention(query, caches, tables, lens),
        lambda *caches: jaxkv.gather_kv(caches, tables, lens, 9),
    ]
    for call in calls:
        for way in (call, jax.jit(call), jax.jit(lambda *caches, call=call: call(*(c * 1 for c in caches)))):
            with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^a cache may be split over heads") as error:
                way(*caches)
            assert str(error.value) == (
                f"a cache may be split over heads only, got axis {axis} split over tp; jax.shard_map can give each "
                "device blocks of its own"
            )


def test_an_eager_call_checks_shardings_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(sharding, "_partitioned", None)
    mesh = mesh_of(AxisType.Auto)
    case = make_case(np.random.default_rng(3), num_blocks=16, num_heads=8, head_size=32, dtype="float16")
    caches = [jax.device_put(c, NamedSharding(mesh, P("tp"))) for c in case.caches]
    for call in (
        lambda: jaxkv.reshape_and_cache_flash(case.key, case.value, *caches, case.slot_mapping),
        lambda: jaxkv.paged_attention(case.key, caches, np.zeros((7, 2), np.int32), np.ones(7, np.int32)),
        lambda: jaxkv.gather_kv(caches, np.zeros((7, 2), np.int32), np.ones(7, np.int32), 3),
    ):
        with pytest.raises(ValueError, match=r"^a cache may be split over heads only, got axis block split over tp;"):
            call()


def test_other_errors_of_the_compiler_stay_what_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert sharding._refusal(error) is None


def test_a_mesh_axis_of_one_device_splits_nothing():
    case = make_case(np.random.default_rng(5), num_heads=8, head_size=16)
    mesh = mesh_of(AxisType.Auto, (1, 8), ("dp", "tp"))
    caches = [jax.device_put(c, NamedSharding(mesh, P("dp", None, "tp"))) for c in case.caches]
    slots = case.slot_mapping.astype(np.int32)
    assert_same(jaxkv.reshape_and_cache_flash(case.key, case.value, *caches, slots), run_oracle(case))
    assert_same(jax.jit(jaxkv.reshape_and_cache_flash)(case.key, case.value, *caches, slots), run_oracle(case))


SIZES = dict(num_blocks=8, block_size=8, num_heads=8, head_size=32, num_layers=8, dtype="float32")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("layout", "split", "axis"), [
    ("NHD", 4, "dim"), ("NHD", 2, "slot"), ("KV_NHD", 3, "slot"), ("PACKED_NHD", 4, "k+v"),
    ("block slot (kv head) dim", 3, "kv head"), ("MLA", 3, "latent"),
])  # fmt: skip
def test_a_cache_is_not_created_with_a_split_that_nothing_can_use(layout, split, axis, kind):
    sharding = NamedSharding(mesh_of(kind), P(*(None,) * split, "tp"))
    sizes = SIZES | ({"num_heads": 1} if layout == "MLA" else {})
    with pytest.raises(ValueError, match=r"^a cache may be split") as error:
        jaxkv.PagedKVCache.create(**sizes, layout=layout, sharding=sharding)
    assert str(error.value) == (
        f"a cache may be split over heads, blocks and layers only, got axis {axis} split over tp"
    )


@pytest.mark.parametrize("sharding", ["tp", P(None, None, "tp"), 2])
def test_a_cache_is_not_created_with_what_is_no_sharding(sharding):
    with pytest.raises(TypeError, match=r"^sharding must be") as error:
        jaxkv.PagedKVCache.create(**SIZES, sharding=sharding)
    assert str(error.value) == (
        f"sharding must be a jax.sharding.Sharding, as NamedSharding(mesh, spec), got {sharding!r}"
    )


def test_a_cache_is_created_on_a_device():
    device = jax.devices()[1]
    assert jaxkv.PagedKVCache.create(**SIZES, sharding=device).caches[0].devices() == {device}


@pytest.mark.parametrize(("layout", "spec", "scales"), [
    ("NHD", P("tp"), P("tp")), ("NHD", P(None, "tp"), P(None, "tp")),
    ("HND", P(None, None, "tp"), P(None, None, None, "tp")),
    ("INTERLEAVED", P(None, None, None, "tp"), P(None, None, None, "tp")),
    ("KV_NHD", P(None, None, "tp"), P(None, "tp")),
])  # fmt: skip
def test_a_cache_is_created_with_scales_split_alike(layout, spec, scales):
    mesh = mesh_of(AxisType.Auto)
    cache = jaxkv.PagedKVCache.create(
        **SIZES, layout=layout, kv_cache_dtype="int8", per_token_head=True, sharding=NamedSharding(mesh, spec)
    )
    assert all(c.sharding.is_equivalent_to(NamedSharding(mesh, spec), c.ndim) for c in cache.caches)
    for scale in (cache.k_scale, cache.v_scale):
        assert scale.sharding.is_equivalent_to(NamedSharding(mesh, scales), scale.ndim)


def test_a_cache_split_over_blocks_is_written_and_attended_within_shard_map():
    mesh = mesh_of(AxisType.Auto)
    sizes = SIZES | {"num_layers": None, "num_heads": 2}
    cache = jaxkv.PagedKVCache.create(**sizes, sharding=NamedSharding(mesh, P("tp")))
    key, value = (np.random.default_rng(n).standard_normal((8, 2, 32)).astype(np.float32) for n in (6, 7))

    def step(cache, key, value):  # a sequence of one token for each device, in slot 3 of its only block
        cache = cache.write(key, value, jnp.array([3]))
        return (
            cache,
            cache.gather(jnp.array([[0]]), jnp.array([4]), 4)[1][:, 3],
            cache.attend(key, jnp.array([[0]]), jnp.array([4]), sliding_window=1),
        )

    split = P("tp")
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(split,) * 3, out_specs=(split,) * 3))
    cache, values, attended = run(cache, key, value)
    np.testing.assert_array_equal(np.asarray(cache.caches[0])[:, 3], key)
    np.testing.assert_array_equal(values, value)
    np.testing.assert_allclose(attended, value, rtol=1e-6)


def test_a_mesh_with_more_axes():
    case, mesh = case_for("NHD"), mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    assert_same(jax.jit(jaxkv.reshape_and_cache_flash)(*place(case, mesh)), run_oracle(case))


def test_heads_left_to_the_compiler_inside_a_shard_map_over_blocks():
    """Blocks are split by hand over one mesh axis, heads by XLA over the other."""
    case = make_case(
        np.random.default_rng(4), num_blocks=16, num_heads=4, head_size=16, num_tokens=8, slots=range(0, 128, 16)
    )
    mesh = mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    rows = NamedSharding(mesh, P(None, "tp"))
    caches = [jax.device_put(c, NamedSharding(mesh, P("dp", None, "tp"))) for c in case.caches]

    def local(key, value, key_cache, value_cache, slots):
        first = jax.lax.axis_index("dp") * 64  # eight blocks of eight slots a device
        mine = (slots >= first) & (slots < first + 64)
        return jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, jnp.where(mine, slots - first, -1))

    call = jax.jit(
        jax.shard_map(
            local, mesh=mesh, axis_names={"dp"}, in_specs=(P(), P(), P("dp"), P("dp"), P()), out_specs=P("dp")
        )
    )
    inputs = (jax.device_put(case.key, rows), jax.device_put(case.value, rows), *caches)
    slots = jnp.asarray(case.slot_mapping, jnp.int32)
    assert_same(call(*inputs, slots), run_oracle(case))
    assert not re.findall(r"all-gather|all-reduce|all-to-all", call.lower(*inputs, slots).compile().as_text())


def test_the_interpreter_is_refused_where_xla_splits_and_runs_within_a_shard_map():
    mesh, case = mesh_of(AxisType.Auto), case_for("NHD")
    write = functools.partial(jaxkv.reshape_and_cache_flash, backend="interpret")
    with pytest.raises(ValueError, match="backend 'interpret' must have one device, or be within a shard_map"):
        jax.jit(write)(*place(case, mesh))
    tables, starts, lens = (jax.device_put(x, NamedSharding(mesh, P())) for x in (np.ones((1, 1), int), [0, 1], [1]))
    map_slots = jax.jit(lambda *x: jaxkv.slot_mapping(*x, 2, 1, backend="interpret"))
    with pytest.raises(ValueError, match="backend 'interpret' must have one device"):
        map_slots(tables, starts, lens)
    specs = P(None, "tp"), P(None, "tp"), *(P(None, None, "tp"),) * 2, P()
    split = jax.jit(jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=specs[2:4]))
    assert_same(split(*place(case, mesh)), run_oracle(case))
