"""jaxkv.rope_and_cache with heads split over eight devices, without a collective."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from tests.cases.jax_ropes import assert_same
from tests.cases.rope import MLA, NORMS, RopeCase, run_oracle

CASE = RopeCase("a call", integers="int32", num_heads=8, num_q_heads=16, num_tokens=3, **NORMS)


def mesh_of(kind, shape=(8,), names=("tp",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def cache_specs(call):
    return [P(*("tp" if "head" in axis else None for axis in axes)) for axes in call.options["layout"].arrays]


def place(call, mesh, query="tp", rows="tp", caches=None):
    """The call's arrays on the mesh: query, key, value, caches, and the rest."""
    specs = [P(None, query, None), *[P(None, rows, None)] * 2]
    arrays = [
        jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 3 else P()))
        for x, spec in zip((call.query, call.key, call.value), specs, strict=True)
    ]
    caches = [
        jax.device_put(cache, NamedSharding(mesh, spec))
        for cache, spec in zip(call.caches, caches or cache_specs(call), strict=True)
    ]
    rest = [call.positions, call.cos_sin, call.slot_mapping, call.options["q_norm"], call.options["k_norm"]]
    whole = NamedSharding(mesh, P())
    return *arrays, caches, [None if x is None else jax.device_put(x, whole) for x in rest]


def function(call, **more):
    options = call.options | more

    def step(query, key, value, caches, rest):
        positions, cos_sin, slots, q_norm, k_norm = rest
        options.update(q_norm=q_norm, k_norm=k_norm)
        return jaxkv.rope_and_cache(query, key, value, caches, positions, cos_sin, slots, **options)

    return step


def assert_no_collective(compiled):
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["NHD", "HND", "PACKED_NHD", "INTERLEAVED", "layer block slot head dim"])
def test_heads(layout, kind):
    layers = {"num_layers": 2, "layer": 1} if "layer" in layout else {}
    call = replace(CASE, layout="NHD" if layers else layout, **layers).make()
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        inputs = place(call, mesh)
        step = jax.jit(function(call), donate_argnums=3)
        compiled = step.lower(*inputs).compile()
        assert_no_collective(compiled)
        assert compiled.memory_analysis().alias_size_in_bytes >= sum(c.nbytes for c in call.caches) // 8
        query, *new = step(*inputs)
    assert query.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp", None)), 3)
    for cache, spec in zip(new, cache_specs(call), strict=True):
        assert cache.sharding.is_equivalent_to(NamedSharding(mesh, spec), cache.ndim)
    assert_same([query, *new], run_oracle(call))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("num_q_heads", [8, 24, 12])
def test_any_number_of_query_heads(num_q_heads, kind):
    """12 are no multiple of 8 devices: each device rotates all of them. KV heads are split all the same."""
    call = replace(CASE, num_q_heads=num_q_heads).make()
    mesh = mesh_of(kind)
    split = "tp" if num_q_heads % 8 == 0 else None
    with jax.set_mesh(mesh):
        inputs = place(call, mesh, query=split)
        step = jax.jit(function(call))
        assert_no_collective(step.lower(*inputs).compile())
        query, *new = step(*inputs)
    assert query.sharding.is_equivalent_to(NamedSharding(mesh, P(None, split, None)), 3)
    assert_same([query, *new], run_oracle(call))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "options", [MLA | {"num_q_heads": 8}, {"num_heads": 1, "num_q_heads": 8}], ids=["MLA", "1 head"]
)
def test_one_head_is_on_every_device_and_query_heads_are_split(options, kind):
    call = RopeCase("one head", **{"integers": "int32", "num_tokens": 3} | options).make()
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        inputs = place(call, mesh, rows=None, caches=[P()] * len(call.caches))
        step = jax.jit(function(call), donate_argnums=3)
        assert_no_collective(step.lower(*inputs).compile())
        query, *new = step(*inputs)
    assert query.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp", None)), 3)
    assert all(cache.sharding.is_fully_replicated for cache in new)
    assert_same([query, *new], run_oracle(call))


def test_the_split_of_the_caches_spreads_to_query():
    """Within a program that says nothing of query: as `paged_attention` will want it."""
    call = CASE.make()
    mesh = mesh_of(AxisType.Auto)
    _, *inputs = place(call, mesh)
    step = jax.jit(lambda *inputs: function(call)(jnp.asarray(call.query) * 1, *inputs))
    rotated, *new = step(*inputs)
    assert rotated.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp", None)), 3)
    assert_same([rotated, *new], run_oracle(call))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    call = CASE.make()
    mesh = mesh_of(AxisType.Auto)
    rows, caches = P(None, "tp"), cache_specs(call)
    local = jax.shard_map(
        function(call), mesh=mesh, in_specs=(rows, rows, rows, caches, P()), out_specs=(rows, *caches),
        check_vma=check_vma,
    )  # fmt: skip
    assert_same(jax.jit(local)(*place(call, mesh)), run_oracle(call))


def test_shard_map_of_query_heads_over_one_cache():
    """Of MLA, every device writes the same rows, and rotates queries of its own: caches do not become varying."""
    call = RopeCase("rows", **MLA | {"num_q_heads": 8, "integers": "int32"}).make()
    mesh = mesh_of(AxisType.Auto)
    heads = P(None, "tp")
    local = jax.shard_map(function(call), mesh=mesh, in_specs=(heads, P(), P(), P(), P()), out_specs=(heads, P()))
    inputs = place(call, mesh, rows=None, caches=[P()])
    assert_same(jax.jit(local)(*inputs), run_oracle(call))


def test_heads_left_to_the_compiler_inside_a_shard_map():
    """The mesh's other axis is the user's: its devices have the same."""
    call = replace(CASE, num_heads=4, num_q_heads=8).make()
    mesh = mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    local = jax.shard_map(function(call), mesh=mesh, axis_names={"dp"}, in_specs=P(), out_specs=P(), check_vma=False)
    assert_same(jax.jit(local)(*place(call, mesh)), run_oracle(call))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_formats_and_sections(kind):
    mesh = mesh_of(kind)
    for options in (
        {"kv_cache_dtype": "fp8_e4m3", "scales": "head"}, {"kv_cache_dtype": "int8", "per_token_head": True},
        {"sections": (2, 3, 3)},
    ):  # fmt: skip
        call = replace(CASE, **options).make()
        own = [P(None, None, "tp")] * 2 if "per_token_head" in options else []
        with jax.set_mesh(mesh):
            inputs = place(call, mesh, caches=[*cache_specs(call), *own])
            assert_same(jax.jit(function(call))(*inputs), run_oracle(call))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("axis", "spec"), [("slot", P(None, "tp")), ("dim", P(None, None, None, "tp"))])
def test_any_other_split_raises(kind, axis, spec):
    call, mesh = CASE.make(), mesh_of(kind)
    inputs = place(call, mesh, caches=[spec] * 2)
    for way in (function(call), jax.jit(function(call))):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^a cache may be split over heads only") as error:
            way(*inputs)
        assert f"got axis {axis} split over tp" in str(error.value)


def test_caches_must_be_split_alike():
    call, mesh = CASE.make(), mesh_of(AxisType.Auto)
    inputs = place(call, mesh, caches=[P(None, None, "tp"), P()])
    with pytest.raises(ValueError, match=r"^key_cache and value_cache must be split alike over heads"):
        function(call)(*inputs)


# ---- views of heads


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_views_of_groups(kind):
    """A projection whose query, key and value heads lie in groups, one for each KV head."""
    call, mesh = CASE.make(), mesh_of(kind)
    tokens, size = call.query.shape[0], call.query.shape[2]
    groups = [x.reshape(tokens, 8, -1, size) for x in (call.query, call.key, call.value)]
    qkv = jnp.concatenate([jnp.asarray(x) for x in groups], axis=2)
    with jax.set_mesh(mesh):
        *_, caches, rest = place(call, mesh)
        qkv = jax.device_put(qkv, NamedSharding(mesh, P(None, "tp", None, None)))

        def step(qkv, caches, rest):
            views = [jaxkv.heads(qkv, *ends) for ends in ((0, 2), (2, 3), (3, 4))]
            return function(call)(*views, caches, rest)

        compiled = jax.jit(step).lower(qkv, caches, rest).compile()
        assert_no_collective(compiled)
        query, *new = jax.jit(step)(qkv, caches, rest)
    assert query.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp", None)), 3)
    assert_same([query, *new], run_oracle(call))
