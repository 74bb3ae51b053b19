"""Caches split over eight devices along any axis but `block`: copies and zeros without a collective, in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.layout import CacheLayout
from tests.cases.blocks import PAIRS, assert_same, make_blocks, run_oracle

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
SIZES = {"num_heads": 8, "block_size": 8, "head_size": 16}


def mesh_of(kind, shape=(8,), names=("tp",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def split(layout, name):
    """Specs that split one axis of each array."""
    return [P(*("tp" if name in axis else None for axis in axes)) for axes in CacheLayout.of(layout).arrays]


def assert_local(compiled, memory):
    found, size = compiled.memory_analysis(), sum(array.nbytes for array in memory) // 8
    assert found.alias_size_in_bytes >= size
    assert found.temp_size_in_bytes < size
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())


@KINDS
@pytest.mark.parametrize(("layout", "axis"), [
    ("NHD", "head"), ("HND", "head"), ("PALLAS", "head"), ("KV_NHD", "head"), ("INTERLEAVED", "head"),
    ("NHD", "slot"), ("NHD", "dim"), ("layer block slot head dim", "layer"), ("PACKED_NHD", "k+v"),
])  # fmt: skip
def test_any_axis_of_a_block(layout, axis, kind):
    layers = {"num_layers": 8} if "layer" in layout else {}
    mesh, specs = mesh_of(kind), split(layout, axis)
    for indices in (PAIRS["circle with branches"], [1, -1, 6]):
        case = make_blocks(np.random.default_rng(0), indices, layout=layout.removeprefix("layer "), **SIZES, **layers)

        def step(memory, indices, case=case):
            return case.call(jaxkv, memory, indices)

        with jax.set_mesh(mesh):
            memory = [
                jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(case.memory, specs, strict=True)
            ]
            index = jax.device_put(case.indices, NamedSharding(mesh, P()))
            jitted = jax.jit(step, donate_argnums=0)
            assert_local(jitted.lower(memory, index).compile(), memory)
            eager = step(memory, index)
            new = jitted(memory, index)
        for array, spec in zip(new, specs, strict=True):
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)
        assert_same(new, run_oracle(case))
        assert_same(eager, run_oracle(case))


@KINDS
def test_scale_caches_are_split_with_the_caches(kind):
    mesh = mesh_of(kind)
    case = make_blocks(np.random.default_rng(1), PAIRS["tree"], kv_cache_dtype="int8", per_token_head=True, **SIZES)
    specs = [*split("NHD", "head"), P(None, None, "tp"), P(None, None, "tp")]
    with jax.set_mesh(mesh):
        memory = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(case.memory, specs, strict=True)]
        step = jax.jit(lambda memory, indices: case.call(jaxkv, memory, indices), donate_argnums=0)
        index = jax.device_put(case.indices, NamedSharding(mesh, P()))
        assert_local(step.lower(memory, index).compile(), memory)
        assert_same(step(memory, index), run_oracle(case))


def test_a_cache_of_nvfp4_split_over_heads():
    """Which no writer could use: a block's scales lie behind all its elements. To be copied, they need not be found."""
    mesh = mesh_of(AxisType.Auto)
    case = make_blocks(np.random.default_rng(2), PAIRS["swap"], **SIZES | {"head_size": 32}, kv_cache_dtype="nvfp4")
    memory = [jax.device_put(array, NamedSharding(mesh, P(None, None, "tp"))) for array in case.memory]
    assert_same(jax.jit(lambda m: case.call(jaxkv, m, case.indices))(memory), run_oracle(case))


@KINDS
def test_blocks_are_not_split(kind):
    case = make_blocks(np.random.default_rng(3), PAIRS["swap"], num_blocks=16)
    mesh = mesh_of(kind)
    memory = [jax.device_put(array, NamedSharding(mesh, P("tp"))) for array in case.memory]

    def call(*memory):
        return case.call(jaxkv, memory, case.indices)

    for way in (call, jax.jit(call), jax.jit(lambda *memory: call(*(m * 1 for m in memory)))):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^a cache whose blocks") as error:
            way(*memory)
        assert str(error.value) == (
            "a cache whose blocks are moved must not be split over them, got axis block split over tp; jax.shard_map "
            "can give each device blocks of its own"
        )


def test_shard_map_over_blocks_of_each_device():
    mesh = mesh_of(AxisType.Auto)
    case = make_blocks(np.random.default_rng(4), [[0, 1]], num_blocks=16)
    call = jax.jit(
        jax.shard_map(
            lambda memory, indices: case.call(jaxkv, memory, indices), mesh=mesh, in_specs=(P("tp"), P()),
            out_specs=P("tp"),
        ),
        donate_argnums=0,
    )  # fmt: skip
    memory = [jax.device_put(array, NamedSharding(mesh, P("tp"))) for array in case.memory]
    index = jnp.asarray(case.indices)
    assert_local(call.lower(memory, index).compile(), memory)
    case.indices = np.array([[i, i + 1] for i in range(0, 16, 2)], np.int32)
    assert_same(call(memory, index), run_oracle(case))


def test_heads_left_to_the_compiler_inside_a_shard_map_over_blocks():
    mesh = mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    case = make_blocks(np.random.default_rng(5), [[0, 1], [1, 2]], num_blocks=16, num_heads=4)
    call = jax.jit(
        jax.shard_map(
            lambda memory, indices: case.call(jaxkv, memory, indices), mesh=mesh, axis_names={"dp"},
            in_specs=(P("dp"), P()), out_specs=P("dp"),
        )
    )  # fmt: skip
    memory = [jax.device_put(array, NamedSharding(mesh, P("dp", None, "tp"))) for array in case.memory]
    index = jnp.asarray(case.indices)
    case.indices = np.concatenate([case.indices, case.indices + 8])
    assert not re.findall(r"all-gather|all-reduce|all-to-all", call.lower(memory, index).compile().as_text())
    assert_same(call(memory, index), run_oracle(case))


def test_blocks_left_to_the_compiler_inside_a_shard_map_raise():
    mesh = mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    case = make_blocks(np.random.default_rng(6), [[0, 1]], num_blocks=16, num_heads=4)
    call = jax.shard_map(
        lambda memory, indices: case.call(jaxkv, memory, indices), mesh=mesh, axis_names={"dp"},
        in_specs=(P(None, None, "dp"), P()), out_specs=P(None, None, "dp"),
    )  # fmt: skip
    memory = [jax.device_put(array, NamedSharding(mesh, P("tp", None, "dp"))) for array in case.memory]
    with pytest.raises(
        ValueError, match=r"^a cache whose blocks are moved must not be split over them, got axis block"
    ):
        jax.jit(call)(memory, jnp.asarray(case.indices))


def test_a_batch_split_over_devices():
    mesh = mesh_of(AxisType.Auto)
    cases = [make_blocks(np.random.default_rng(seed), PAIRS["circle"]) for seed in range(8)]
    for case, pairs in zip(cases, (PAIRS["circle"], PAIRS["chain"] + [[-1, -1]]) * 4, strict=True):
        case.indices = np.array(pairs, np.int32)
    batch = [np.stack(x) for x in zip(*(case.memory for case in cases), strict=True)]
    pairs = np.stack([case.indices for case in cases])
    with jax.set_mesh(mesh):
        memory = [jax.device_put(array, NamedSharding(mesh, P("tp"))) for array in batch]
        index = jax.device_put(pairs, NamedSharding(mesh, P("tp")))
        step = jax.jit(jax.vmap(lambda memory, indices: cases[0].call(jaxkv, memory, indices)), donate_argnums=0)
        assert_local(step.lower(memory, index).compile(), memory)
        new = step(memory, index)
    assert_same(new, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])
