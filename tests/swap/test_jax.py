"""jaxkv.swap_blocks under JAX's transformations: right, in place in either memory; Refs; meshes; a cache's methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.oracle import blocks as reference
from tests.cases.arrays import random_bits
from tests.cases.blocks import assert_same
from tests.cases.swaps import PAIRS, in_host, make_swap, run_oracle

SIDES = pytest.mark.parametrize("host", ["source", "destination"])
BACKENDS = pytest.mark.parametrize("backend", ["xla", "interpret"])
LAYOUTS = ["NHD", "HEAD_MAJOR", "PALLAS", "KV_NHD", "layer block slot head dim", "block slot (head kv) dim"]
SWAP = jax.jit(jaxkv.PagedKVCache.swap_blocks, donate_argnums=1, static_argnames="backend")


def big(seed=0, layout="NHD", **options):
    """A case with more in its caches than is moved."""
    layers = {"num_layers": 2} if "layer" in layout else {}
    pairs = [[3, 70], [60, 0], [-1, 5], [63, 99], [64, 1], [5, 100]]
    return make_swap(
        np.random.default_rng(seed),
        pairs,
        num_blocks=(64, 100),
        layout=layout.removeprefix("layer "),
        **layers,
        **options,
    )


def arrays(case, host=None):
    sides = []
    for name, side in (("source", case.source), ("destination", case.destination)):
        memory = list(map(jnp.asarray, side.memory))
        sides.append(list(map(in_host, memory)) if name == host else memory)
    return *sides, jnp.asarray(case.pairs)


def function(case, **more):
    return lambda source, destination, pairs: case.call(jaxkv, source, destination, pairs, **more)


def got(new):
    return list(map(np.asarray, new))


def assert_in_place(compiled, memory):
    size, found = sum(array.nbytes for array in memory), compiled.memory_analysis()
    assert found.alias_size_in_bytes >= size
    assert found.temp_size_in_bytes < size / 2


@SIDES
@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])  # of fp8, XLA's CPU code copies the cache, as for writes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_with_donation_updates_the_same_buffers(layout, dtype, host):
    case = big(layout=layout, cache_dtype=dtype)
    source, destination, pairs = arrays(case, host)
    step = jax.jit(function(case), donate_argnums=1)
    assert_in_place(step.lower(source, destination, pairs).compile(), destination)
    before = [array.unsafe_buffer_pointer() for array in destination]
    new = step(source, destination, pairs)
    assert [array.unsafe_buffer_pointer() for array in new] == before
    assert {a.sharding.memory_kind for a in new} == {"pinned_host" if host == "destination" else "device"}
    assert_same(got(new), run_oracle(case))
    assert_same(got(source), case.source.memory)


def test_without_donation_the_destination_stays_as_it_was():
    case = big()
    given = arrays(case, "destination")
    assert_same(got(jax.jit(function(case))(*given)), run_oracle(case))
    assert_same(got(function(case)(*given)), run_oracle(case))
    assert_same(got(given[1]), case.destination.memory)


@SIDES
def test_a_scan_carries_the_destination(host):
    cases = [big(seed) for seed in range(3)]
    source, destination, _ = arrays(cases[0], host)
    every = jnp.stack([jnp.asarray(np.roll(case.pairs, i, axis=0)) for i, case in enumerate(cases)])
    every = every.at[..., 1].add(jnp.arange(3)[:, None])

    def steps(source, destination, every):
        def step(memory, pairs):
            return list(function(cases[0])(source, memory, pairs)), None

        return lax.scan(step, destination, every)[0]

    step = jax.jit(steps, donate_argnums=1)
    assert_in_place(step.lower(source, destination, every).compile(), destination)
    case = cases[0]
    for pairs in np.asarray(every):
        case.source.indices = pairs
        case.destination.caches = run_oracle(case)
    assert_same(got(step(source, destination, every)), case.destination.caches)


@BACKENDS
def test_refs(backend):
    case = make_swap(np.random.default_rng(1), PAIRS["apart"], kv_cache_dtype="int8", per_token_head=True)
    source, destination, pairs = arrays(case)
    refs = [jax.new_ref(array) for array in destination]
    assert function(case, backend=backend)(source, refs, pairs) is None
    assert_same([ref[...] for ref in refs], run_oracle(case))


@SIDES
@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap(layout, backend, host):
    cases = [big(seed, layout=layout) for seed in range(2)]
    sides = [
        [jnp.stack(x) for x in zip(*(side.memory for side in each), strict=True)]
        for each in ([c.source for c in cases], [c.destination for c in cases])
    ]
    source, destination = (
        list(map(in_host, side)) if name == host else side
        for name, side in zip(("source", "destination"), sides, strict=True)
    )
    every = jnp.stack([jnp.asarray(np.roll(case.pairs, i, axis=0)) for i, case in enumerate(cases)])
    step = jax.jit(jax.vmap(function(cases[0], backend=backend)), donate_argnums=1)
    if backend == "xla":
        assert_in_place(step.lower(source, destination, every).compile(), destination)
    want = [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)]
    assert_same(got(step(source, destination, every)), want)


def test_vmap_of_one_source_to_each_destination():
    cases = [make_swap(np.random.default_rng(seed), PAIRS["apart"]) for seed in range(2)]
    cases[1].source = cases[0].source
    destination = [jnp.stack(x) for x in zip(*(c.destination.memory for c in cases), strict=True)]
    source, _, pairs = arrays(cases[0])
    new = jax.vmap(function(cases[0]), in_axes=(None, 0, None))(source, destination, pairs)
    assert_same(got(new), [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])
    nested = jax.vmap(jax.vmap(function(cases[0]), in_axes=(None, 0, None)), in_axes=(None, 0, None))
    twice = nested(source, [a[None] for a in destination], pairs)
    assert_same([a[0] for a in twice], got(new))


def test_no_gradients():
    source, destination, pairs = arrays(make_swap(np.random.default_rng(2), PAIRS["apart"], dtype="float32"))
    with pytest.raises(NotImplementedError, match=r"jaxkv.swap_blocks is not differentiable"):
        jax.grad(lambda source: jaxkv.swap_blocks(source, destination, pairs)[0].sum())(source)


def test_lists_and_numpy_arrays_are_pairs():
    case = make_swap(np.random.default_rng(3), PAIRS["apart"])
    for pairs in (PAIRS["apart"], np.array(PAIRS["apart"]), tuple(map(tuple, PAIRS["apart"]))):
        assert_same(got(case.call(jaxkv, case.source.memory, case.destination.memory, pairs)), run_oracle(case))
    assert_same(got(case.call(jaxkv, case.source.memory, case.destination.memory, [])), case.destination.memory)


# ---- meshes


def mesh_cache(kind, **options):
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(kind,), devices=jax.devices()[:4])
    return mesh, jaxkv.PagedKVCache.create(
        num_blocks=8, block_size=2, num_heads=4, head_size=8, num_layers=4, **options
    )


@pytest.mark.parametrize("split", ["heads", "layers"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_caches_that_are_split(kind, split):
    """Each device moves its own part: no collective, in place, in its own pinned memory."""
    rng = np.random.default_rng(4)
    mesh, cache = mesh_cache(kind, kv_cache_dtype="int8", per_token_head=True)
    specs = cache.partition_spec(**{split: "tp"})
    bits = [random_bits(rng, a.shape, a.dtype.name) for a in cache._memory]
    shardings = [NamedSharding(mesh, s) for s in specs._memory]
    cache = cache._with([jax.device_put(a, s) for a, s in zip(bits, shardings, strict=True)])
    host = cache.create_host(num_blocks=16)
    for array, sharding in zip(host._memory, shardings, strict=True):
        assert array.sharding == sharding.with_memory_kind("pinned_host")
    pairs = jnp.array([[0, 15], [7, 3], [-1, 2], [8, 4]])
    compiled = SWAP.lower(cache, host, pairs).compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute"))
    host = SWAP(cache, host, pairs * 0 - 1)  # what create_host made may be memory of NumPy's, which XLA leaves alone
    before = [[s.data.unsafe_buffer_pointer() for s in a.addressable_shards] for a in host._memory]
    host = SWAP(cache, host, pairs)
    assert [[s.data.unsafe_buffer_pointer() for s in a.addressable_shards] for a in host._memory] == before
    assert {a.sharding.memory_kind for a in host._memory} == {"pinned_host"}
    want = [np.zeros_like(a, shape=(a.shape[0], 16, *a.shape[2:])) for a in bits]
    reference.swap_blocks(bits, want, np.asarray(pairs), [1] * 4)
    assert_same(got(host._memory), want)
    cache = SWAP(host, cache, jnp.array([[15, 1], [3, 2]]))
    reference.swap_blocks(want, bits, [[15, 1], [3, 2]], [1] * 4)
    assert_same(got(cache._memory), bits)
    assert {a.sharding.memory_kind for a in cache._memory} == {"device"}


def test_a_cache_split_over_blocks_is_refused():
    mesh, cache = mesh_cache(AxisType.Auto)
    sharding = NamedSharding(mesh, P(None, "tp"))
    split = [jax.device_put(a, sharding) for a in cache.caches]
    with pytest.raises(ValueError, match="a cache whose blocks are moved must not be split over them"):
        jaxkv.swap_blocks(cache.caches, split, [[0, 1]], layout=cache.spec.layout)


# ---- PagedKVCache


@BACKENDS
@pytest.mark.parametrize("options", [
    {}, {"layout": "HND", "num_layers": 2}, {"kv_cache_dtype": "nvfp4", "head_size": 32},
    {"kv_cache_dtype": "int4", "per_token_head": True, "num_layers": 2},
    {"layout": "KV_NHD", "kv_cache_dtype": "int8", "per_token_head": True, "scale_layout": "head block slot"},
    {"layout": "MLA", "num_heads": 1, "head_size_v": 8}, {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": 0.25},
], ids=str)  # fmt: skip
def test_a_cache(options, backend):
    rng = np.random.default_rng(5)
    cache = jaxkv.PagedKVCache.create(**{"num_blocks": 7, "block_size": 4, "num_heads": 2, "head_size": 16} | options)
    host = cache.create_host(num_blocks=11)
    assert (host.num_blocks, host.spec.shapes) == (11, tuple(a.shape for a in host.caches))
    assert {a.sharding.memory_kind for a in host._memory} == {"pinned_host"}
    assert cache.create_host(memory=cache.nbytes).spec == cache.spec
    bits = [[random_bits(rng, a.shape, a.dtype.name) for a in each._memory] for each in (cache, host)]
    cache = cache._with(list(map(jnp.asarray, bits[0])))
    host = host._with([in_host(jnp.asarray(a)) for a in bits[1]])
    axes = [names.index(("block",)) for names in cache.spec.layout.arrays]
    if cache.spec.scale_layout is not None:
        axes += [names.index(("block",)) for names in cache.spec.scale_layout.arrays]
        axes = axes if len(axes) == len(bits[0]) else [*axes, axes[-1]]
    host = SWAP(cache, host, jnp.array(PAIRS["no blocks"]), backend=backend)  # static scales are donated, too
    cache = SWAP(host, cache, jnp.array([[2, 0], [10, 6], [-1, 3]]), backend=backend)
    reference.swap_blocks(bits[0], bits[1], PAIRS["no blocks"], axes)
    reference.swap_blocks(bits[1], bits[0], [[2, 0], [10, 6]], axes)
    assert_same(got(cache._memory), bits[0])
    assert_same(got(host._memory), bits[1])
    assert {a.sharding.memory_kind for a in host._memory} == {"pinned_host"}
