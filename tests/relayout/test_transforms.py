"""relayout under JAX's transformations and shardings, and as torch knows it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
import torchkv
from tests.cases.arrays import bits, from_torch
from tests.cases.relayouts import PAIRS, SIZES, arrays_of, cache_of, memory_of, wanted

PAIRS = np.array(PAIRS, np.int32)


def two(rng, **extents):
    source = arrays_of(rng, **(SIZES | dict(num_blocks=4, block_size=4) | extents))
    return source, arrays_of(rng, **(SIZES | dict(num_blocks=5, block_size=3, layout="HND") | extents))


def assert_same(cache, want):
    for got, array in zip(memory_of(cache), want, strict=True):
        np.testing.assert_array_equal(bits(got), bits(array))


# ---- JAX


@pytest.mark.parametrize("new", [{}, dict(kv_cache_dtype="fp8")], ids=["bits", "numbers"])
@pytest.mark.parametrize("layers", [None, 2])
def test_in_place_where_donated(layers, new):
    source = jaxkv.PagedKVCache.create(**SIZES, num_blocks=64, block_size=16, num_layers=layers)
    destination = jaxkv.PagedKVCache.create(**(SIZES | new), num_blocks=128, block_size=8, num_layers=layers)
    step = jax.jit(lambda new, old, pairs: old.relayout(new, pairs), donate_argnums=0)
    compiled = step.lower(destination, source, PAIRS).compile()
    memory = compiled.memory_analysis()
    nbytes = sum(array.nbytes for array in destination.caches)
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes < nbytes // 2
    before = [array.unsafe_buffer_pointer() for array in destination.caches]
    got = compiled(destination, source, PAIRS)
    assert [array.unsafe_buffer_pointer() for array in got.caches] == before


VMAPS = {
    "one call": {},
    "one call, scale caches": dict(kv_cache_dtype="int8", per_token_head=True),
    "a loop": dict(num_layers=2),
}


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize(
    "batched", ["source", "destination", "pairs", "source destination", "source destination pairs"]
)
@pytest.mark.parametrize("extents", VMAPS.values(), ids=VMAPS)
def test_vmap(extents, batched, backend):
    rng = np.random.default_rng(0)
    here, there = dict(num_blocks=4, block_size=4), dict(num_blocks=5, block_size=3)
    sources, destinations = (
        [arrays_of(rng, **(SIZES | of | extents)) for _ in range(3 if name in batched else 1)]
        for of, name in ((here, "source"), (there, "destination"))
    )
    every = [PAIRS, np.roll(PAIRS, 1, axis=1), PAIRS[::-1]][: 3 if "pairs" in batched else 1]

    def given(name, caches):
        caches = [cache_of(jaxkv, *cache) for cache in caches]
        return (jax.tree.map(lambda *a: jnp.stack(a), *caches), 0) if name in batched else (caches[0], None)

    (old, of_old), (new, of_new) = given("source", sources), given("destination", destinations)
    pairs, of_pairs = (jnp.asarray(np.stack(every)), 0) if "pairs" in batched else (jnp.asarray(PAIRS), None)
    move = jax.vmap(lambda old, new, pairs: old.relayout(new, pairs, backend=backend), (of_old, of_new, of_pairs))
    for function in (move, jax.jit(move)):
        got = memory_of(function(old, new, pairs))
        for i in range(3):
            source, destination, some = (found[i % len(found)] for found in (sources, destinations, every))
            for array, want in zip(got, wanted(source, destination, some), strict=True):
                np.testing.assert_array_equal(bits(array[i]), bits(want))


def test_vmap_of_all_slots_and_of_a_vmap():
    rng = np.random.default_rng(1)
    here, there = dict(num_blocks=3, block_size=4), dict(num_blocks=5, block_size=3, layout="HND")
    sources, destinations = ([arrays_of(rng, **SIZES, **of) for _ in range(4)] for of in (here, there))
    old, new = (
        jax.tree.map(lambda *a: jnp.stack(a).reshape(2, 2, *a[0].shape), *(cache_of(jaxkv, *c) for c in caches))
        for caches in (sources, destinations)
    )
    got = jax.vmap(jax.vmap(lambda old, new: old.relayout(new)))(old, new)
    for array, *want in zip(
        memory_of(got), *(wanted(*both, None) for both in zip(sources, destinations, strict=True)), strict=True
    ):
        np.testing.assert_array_equal(bits(array.reshape(4, *array.shape[2:])), bits(np.stack(want)))


def test_vmap_is_in_place_where_blocks_are_in_front():
    source = jaxkv.PagedKVCache.create(**SIZES, num_blocks=64, block_size=16)
    destination = jaxkv.PagedKVCache.create(**SIZES, num_blocks=128, block_size=8, layout="HND")
    old, new = (jax.tree.map(lambda a: jnp.stack([a] * 4), cache) for cache in (source, destination))
    step = jax.jit(jax.vmap(lambda new, old, pairs: old.relayout(new, pairs), (0, 0, None)), donate_argnums=0)
    memory = step.lower(new, old, PAIRS).compile().memory_analysis()
    nbytes = sum(array.nbytes for array in new.caches)
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes < nbytes // 8


def test_scan_and_export_of_any_number_of_pairs():
    source, destination = two(np.random.default_rng(1))
    spec, target = source[0], destination[0]

    def call(key, value, key_cache, value_cache, pairs):
        old = jaxkv.PagedKVCache((key, value), spec)
        return old.relayout(jaxkv.PagedKVCache((key_cache, value_cache), target), pairs).caches

    arrays = [*source[1], *destination[1]]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    n = jax.export.symbolic_shape("n, 2")
    exported = jax.export.export(jax.jit(call))(*shapes, jax.ShapeDtypeStruct(n, np.int32))
    for pairs in (PAIRS, PAIRS[:3]):
        for got, want in zip(exported.call(*arrays, pairs), wanted(source, destination, pairs), strict=True):
            np.testing.assert_array_equal(bits(np.asarray(got)), bits(want))
    old, new = cache_of(jaxkv, *source), cache_of(jaxkv, *destination)
    scanned, _ = jax.lax.scan(lambda new, some: (old.relayout(new, some[None]), None), new, jnp.asarray(PAIRS))
    assert_same(scanned, wanted(source, destination, PAIRS))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("per_token_head", [False, True])
def test_heads_on_eight_devices(axis_type, per_token_head):
    options = dict(kv_cache_dtype="int8", per_token_head=True) if per_token_head else {}
    source, destination = two(np.random.default_rng(2), num_heads=8, num_layers=2, **options)
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(axis_type,))

    def put(spec, arrays):
        axes = [*spec.layout.arrays, *([a[:-1] for a in spec.scale_layout.arrays] if per_token_head else [])]
        return cache_of(
            jaxkv,
            spec,
            [
                jax.device_put(array, NamedSharding(mesh, P(*("tp" if "head" in axis else None for axis in names))))
                for array, names in zip(arrays, axes, strict=True)
            ],
        )

    with jax.set_mesh(mesh):
        old, new = put(*source), put(*destination)
        pairs = jax.device_put(PAIRS, NamedSharding(mesh, P(None, None)))
        step = jax.jit(lambda new, old, pairs: old.relayout(new, pairs), donate_argnums=0)
        compiled = step.lower(new, old, pairs).compile()
        got = compiled(new, old, pairs)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    assert_same(got, wanted(source, destination, PAIRS))


def placed(mesh, spec, arrays, split=("head",)):
    """A cache whose axes of these names are split over all devices."""
    specs = [P(*("tp" if axis[0] in split else None for axis in axes)) for axes in spec.layout.arrays]
    arrays = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    return cache_of(jaxkv, spec, arrays)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jit", [True, False])
def test_of_a_source_that_is_whole_each_device_takes_its_heads(axis_type, jit):
    source, destination = two(np.random.default_rng(3), num_heads=8, num_layers=2)
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        old, new = placed(mesh, *source, split=()), placed(mesh, *destination)
        pairs = jax.device_put(PAIRS, NamedSharding(mesh, P(None, None)))
        move = jax.jit(lambda new, old, pairs: old.relayout(new, pairs)) if jit else lambda n, o, p: o.relayout(n, p)
        got = move(new, old, pairs)
        assert [a.sharding.spec for a in got.caches] == [a.sharding.spec for a in new.caches]
    assert_same(got, wanted(source, destination, PAIRS))


REFUSED = {
    "blocks of the destination": (("head",), ("block",), {}, "a cache may be split over heads only, got axis block"),
    "blocks of the source": (("block",), ("head",), {}, "a cache may be split over heads only, got axis block"),
    "a destination that is whole": (
        ("head",), (), {}, "source must be split over heads as destination, over None, got tp",
    ),
    "heads that share regions": (
        (), ("head",), dict(kv_cache_dtype="nvfp4"), "a cache of nvfp4 may be split over heads only where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", REFUSED)
def test_splits_that_are_refused(case, axis_type):
    of_source, of_destination, options, text = REFUSED[case]
    rng = np.random.default_rng(3)
    extents = SIZES | dict(num_heads=8, num_blocks=8) | options
    source = arrays_of(rng, **extents, block_size=4)
    destination = arrays_of(rng, **extents | dict(layout="head block slot dim"), block_size=3)
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        old, new = placed(mesh, *source, split=of_source), placed(mesh, *destination, split=of_destination)
        with pytest.raises(ValueError, match=f"^{text}"):
            old.relayout(new, PAIRS)


def test_no_gradients_in_jax():
    source, destination = two(np.random.default_rng(4), dtype="float32")
    old, new = cache_of(jaxkv, *source), cache_of(jaxkv, *destination)

    def loss(key):
        return jaxkv.PagedKVCache((key, old.caches[1]), old.spec).relayout(new, PAIRS).caches[0].sum()

    with pytest.raises(NotImplementedError, match=r"^jaxkv.relayout is not differentiable"):
        jax.grad(loss)(old.caches[0])


# ---- torch


def arguments(old, new, pairs):
    return (
        *new.caches, None, None, list(old.caches), pairs, "auto", new.spec.layout.pattern, None,
        old.spec.layout.pattern, None, old.spec.head_size, None, None,
    )  # fmt: skip


def test_torch_knows_the_op():
    source, destination = two(np.random.default_rng(5), dtype="float32")
    old, new = cache_of(torchkv, *source), cache_of(torchkv, *destination)
    op = torch.ops.torchkv.relayout.default
    for pairs in (torch.tensor(PAIRS), None):
        if pairs is None:
            old = cache_of(
                torchkv,
                *arrays_of(np.random.default_rng(6), **SIZES | dict(dtype="float32"), num_blocks=2, block_size=4),
            )
        results = torch.library.opcheck(op, arguments(old, new, pairs))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("new", [{}, dict(kv_cache_dtype="fp8")], ids=["bits", "numbers"])
def test_compiled_in_one_graph(new):
    rng = np.random.default_rng(7)
    source = arrays_of(rng, **SIZES, num_blocks=4, block_size=4, num_layers=2)
    target = torchkv.PagedKVCache.create(**SIZES, **new, num_blocks=5, block_size=3, num_layers=2, layout="HND")
    old, like = cache_of(torchkv, *source), cache_of(torchkv, target.spec, memory_of(target))
    pairs = torch.tensor(PAIRS)

    def step(key, value, key_cache, value_cache, pairs):
        ours = torchkv.PagedKVCache((key, value), old.spec)
        ours.relayout(torchkv.PagedKVCache((key_cache, value_cache), target.spec), pairs)

    torch.compile(step, fullgraph=True, backend="aot_eager")(*old.caches, *target.caches, pairs)
    old.relayout(like, pairs)
    assert any(array.astype(np.float32).any() for array in memory_of(like))
    assert_same(target, memory_of(like))


def test_vmap_of_caches():
    sets = [two(np.random.default_rng(8 + i)) for i in range(2)]
    olds, news = ([cache_of(torchkv, *pair[i]) for pair in sets] for i in (0, 1))
    stacks = [torch.stack([c.caches[i] for c in caches]) for caches in (olds, news) for i in (0, 1)]
    spec, target = olds[0].spec, news[0].spec

    def one(key, value, key_cache, value_cache):
        torchkv.PagedKVCache((key, value), spec).relayout(
            torchkv.PagedKVCache((key_cache, value_cache), target), torch.tensor(PAIRS)
        )
        return key_cache

    torch.func.vmap(one)(*stacks)
    for i, pair in enumerate(sets):
        for got, want in zip(stacks[2:], wanted(*pair, PAIRS), strict=True):
            np.testing.assert_array_equal(bits(from_torch(got[i])), bits(want))


def test_no_gradients_in_torch():
    source, destination = two(np.random.default_rng(10))
    old, new = cache_of(torchkv, *source), cache_of(torchkv, *destination)
    old.caches[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^torchkv.relayout is not differentiable"):
        old.relayout(new, torch.tensor(PAIRS))
    with torch.no_grad():
        old.relayout(new, torch.tensor(PAIRS))


def test_versions_tell_autograd_what_changed():
    source, destination = two(np.random.default_rng(11))
    for backend in ("torch", "interpret"):
        old, new = cache_of(torchkv, *source), cache_of(torchkv, *destination)
        old.relayout(new, torch.tensor(PAIRS), backend=backend)
        assert all(t._version > 0 for t in new.caches)
        assert all(t._version == 0 for t in old.caches)
