"""jaxkv.slot_mapping under JAX's transformations, without and with 64-bit types, and on several devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from tests.cases.jax_compiling import COMPILING
from tests.cases.slots import SlotCase, make_slots

BACKENDS = pytest.mark.parametrize("backend", ["xla", "interpret"])


def arrays_of(case):
    """The arrays that there are, int32, and the function of them."""
    given = [case.block_tables, case.query_start_loc, case.seq_lens]
    arrays = [jnp.asarray(a, jnp.int32) for a in given if a is not None]

    def call(*x, **options):
        if case.query_start_loc is None:
            x = x[0], None, x[1]
        return jaxkv.slot_mapping(*x, case.block_size, case.num_tokens, **options)

    return arrays, call


@pytest.mark.x64
@BACKENDS
@pytest.mark.parametrize("options", [{}, dict(query_lens=None, padding=1)], ids=["ragged", "decode"])
def test_jit_and_scan(options, backend):
    case = make_slots(np.random.default_rng(0), **options)
    arrays, call = arrays_of(case)
    got = jax.jit(partial(call, backend=backend))(*arrays)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, case.wanted)

    def step(lens, _):
        return lens + 1, call(*arrays[:-1], lens, backend=backend)

    _, found = jax.jit(lambda lens: lax.scan(step, lens, length=3))(arrays[-1])
    for i, slots in enumerate(found):
        want = SlotCase(*[case.block_tables, case.query_start_loc, case.seq_lens + i], 4, case.num_tokens).wanted
        np.testing.assert_array_equal(slots, want)


@pytest.mark.x64
@pytest.mark.parametrize("dtype", ["int8", "int16", "int64", "uint8", "uint32", "uint64", list])
def test_integers_of_any_width(dtype):
    case = make_slots(np.random.default_rng(1))
    case.block_tables = np.abs(case.block_tables) % 100
    case.block_tables[1, 0] = 99
    convert = np.ndarray.tolist if dtype is list else lambda a: a.astype(dtype)
    np.testing.assert_array_equal(case.call(jaxkv.slot_mapping, convert), case.wanted)
    case.num_tokens = None
    np.testing.assert_array_equal(case.call(jaxkv.slot_mapping, convert), case.wanted)


@BACKENDS
@pytest.mark.parametrize("mapped", ["all", "tables", "lengths"])
def test_vmap(backend, mapped):
    cases = [make_slots(np.random.default_rng(n), seq_lens=(0, n, 5, 15 + n)) for n in range(1, 4)]
    columns = min(case.block_tables.shape[1] for case in cases)
    for case in cases:
        case.block_tables = case.block_tables[:, :columns]
    stacked = [np.stack(x) for x in zip(*(arrays_of(case)[0] for case in cases), strict=True)]
    _, call = arrays_of(cases[0])
    axes = {"all": (0, 0, 0), "tables": (0, None, None), "lengths": (None, None, 0)}[mapped]
    given = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]
    got = jax.vmap(partial(call, backend=backend), axes)(*given)
    for i, slots in enumerate(got):
        tables, starts, lens = (x[i] if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True))
        np.testing.assert_array_equal(slots, SlotCase(tables, starts, lens, 4, cases[0].num_tokens).wanted)


def test_in_front_of_a_write_whose_gradient_is_asked_for():
    """Integers have no gradients, and are in nobody's way."""
    case = make_slots(np.random.default_rng(2))
    arrays, call = arrays_of(case)
    grad = jax.grad(lambda x: (x * call(*arrays).astype(jnp.float32)).sum())(jnp.float32(1))
    assert float(grad) == case.wanted.sum()


def test_eager_calls_compile_once():
    case = make_slots(np.random.default_rng(3), padding=11)
    arrays, call = arrays_of(case)
    call(*arrays)
    COMPILING.clear()
    call(*arrays)
    assert not COMPILING


def test_precompile():
    case = make_slots(np.random.default_rng(4), padding=13)
    arrays, call = arrays_of(case)
    program = jaxkv.precompile(call, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))
    np.testing.assert_array_equal(program(*arrays), case.wanted)


@pytest.mark.x64
@pytest.mark.parametrize("decode", [False, True])
def test_export_with_open_sizes(decode):
    scope = jax.export.SymbolicScope()
    shapes = ["s,w", "s"] if decode else ["s,w", "s+1", "s"]
    specs = [jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), jnp.int32) for shape in shapes]

    def call(tables, *rest):
        return jaxkv.slot_mapping(tables, *(None, *rest)[-2:], 4, None if decode else 17)

    exported = jax.export.deserialize(jax.export.export(jax.jit(call))(*specs).serialize())
    for seed, lens in enumerate(((3,), (0, 1, 5, 19))):
        queries = None if decode else (3, 1, 2, 7)[: len(lens)]
        case = make_slots(np.random.default_rng(seed), seq_lens=lens, query_lens=queries)
        case.num_tokens = case.num_tokens if decode else 17
        np.testing.assert_array_equal(exported.call(*arrays_of(case)[0]), case.wanted)


# ---- devices


def mesh_of(kind, shape=(8,), names=("dp",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_all_devices_have_needs_no_communication(kind):
    mesh = mesh_of(kind)
    case = make_slots(np.random.default_rng(5))
    arrays, call = arrays_of(case)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(arrays, NamedSharding(mesh, P()))
        step = jax.jit(call)
        text = step.lower(*arrays).compile().as_text()
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
        got = step(*arrays)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, P()), 1)
        np.testing.assert_array_equal(got, case.wanted)
        np.testing.assert_array_equal(call(*arrays), case.wanted)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_is_split_comes_to_every_device(kind):
    mesh = mesh_of(kind)
    case = make_slots(np.random.default_rng(6), seq_lens=(3, 9, 0, 1, 5, 19, 2, 2), query_lens=(3, 2, 0, 1, 1, 7, 1, 2))
    arrays, call = arrays_of(case)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, NamedSharding(mesh, P(s))) for a, s in zip(arrays, ("dp", None, "dp"), strict=True)]
        np.testing.assert_array_equal(jax.jit(call)(*arrays), case.wanted)
        np.testing.assert_array_equal(call(*arrays), case.wanted)


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_maps_sequences_of_its_own(check_vma):
    mesh = mesh_of(AxisType.Auto)
    case = make_slots(np.random.default_rng(7), seq_lens=range(3, 19), query_lens=None)
    arrays, call = arrays_of(SlotCase(case.block_tables, None, case.seq_lens))
    local = jax.shard_map(call, mesh=mesh, in_specs=(P("dp"), P("dp")), out_specs=P("dp"), check_vma=check_vma)
    np.testing.assert_array_equal(jax.jit(local)(*arrays), case.wanted)


def test_within_a_shard_map_over_another_axis():
    mesh = mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    case = make_slots(np.random.default_rng(8), seq_lens=range(3, 19), query_lens=None)
    arrays, call = arrays_of(SlotCase(case.block_tables, None, case.seq_lens))
    local = jax.shard_map(call, mesh=mesh, axis_names={"dp"}, in_specs=(P("dp"), P("dp")), out_specs=P("dp"))
    arrays = [jax.device_put(a, NamedSharding(mesh, P(("dp", "tp")))) for a in arrays]
    np.testing.assert_array_equal(jax.jit(local)(*arrays), case.wanted)


def test_slots_go_to_a_write_within_one_jit():
    """The front of a step: from tables and lengths alone to what attention sees."""
    rng = np.random.default_rng(9)
    tables, starts, lens = np.array([[3, 1], [0, 2]]), np.array([0, 2, 5]), np.array([6, 3])
    key = rng.standard_normal((8, 1, 16), np.float32)
    cache = jaxkv.PagedKVCache.create(num_blocks=4, block_size=4, num_heads=1, head_size=16, dtype="float32")

    @partial(jax.jit, donate_argnums=0)
    def step(cache, key, tables, starts, lens):
        return cache.write(key, key, jaxkv.slot_mapping(tables, starts, lens, 4, len(key)))

    cache = step(cache, key, tables, starts, lens)
    got, _ = cache.gather(tables, lens, 6)
    np.testing.assert_array_equal(got[0, 4:], key[:2])
    np.testing.assert_array_equal(got[1, :3], key[2:5])
    assert np.count_nonzero(cache.caches[0]) == 5 * 16
