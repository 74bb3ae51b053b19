"""jaxkv.copy_blocks and zero_blocks under JAX's transformations: right, and in place; Refs; a cache's methods."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from kvcore.plan import blocks as plan
from tests.cases.arrays import random_bits
from tests.cases.blocks import PAIRS, assert_same, make_blocks, moves, run_oracle

ZEROS = [3, -1, 0, 63, 5, 64]
LAYOUTS = ["NHD", "HEAD_MAJOR", "PALLAS", "KV_NHD", "layer block slot head dim", "block slot (head kv) dim"]


def big(seed=0, pairs=None, layout="NHD", **options):
    """A case with more in its caches than is moved."""
    rng = np.random.default_rng(seed)
    layers = {"num_layers": 2} if "layer" in layout else {}
    pairs = moves(rng, 64, 5) if pairs is None else pairs
    return make_blocks(rng, pairs, layout=layout.removeprefix("layer "), num_blocks=64, **layers, **options)


def function(case, **more):
    return lambda memory, indices: case.call(jaxkv, memory, indices, **more)


def arrays(case):
    return list(map(jnp.asarray, case.memory)), jnp.asarray(case.indices)


def assert_in_place(compiled, memory):
    size, found = sum(array.nbytes for array in memory), compiled.memory_analysis()
    assert found.alias_size_in_bytes >= size
    assert found.temp_size_in_bytes < size / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])  # of fp8, XLA's CPU code copies the cache, as for writes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_with_donation_updates_the_same_buffers(layout, dtype):
    for pairs in (None, ZEROS):
        case = big(pairs=pairs, layout=layout, cache_dtype=dtype)
        memory, indices = arrays(case)
        step = jax.jit(function(case), donate_argnums=0)
        assert_in_place(step.lower(memory, indices).compile(), memory)
        before = [array.unsafe_buffer_pointer() for array in memory]
        new = step(memory, indices)
        assert [array.unsafe_buffer_pointer() for array in new] == before
        assert_same(new, run_oracle(case))


def test_without_donation_the_argument_stays_as_it_was():
    case = big()
    memory, indices = arrays(case)
    assert_same(jax.jit(function(case))(memory, indices), run_oracle(case))
    assert_same(function(case)(memory, indices), run_oracle(case))
    assert_same(memory, case.memory)


def test_a_scan_carries_the_caches():
    cases = [big(seed) for seed in range(3)]
    memory, _ = arrays(cases[0])
    pairs = jnp.stack([arrays(case)[1] for case in cases])
    step = jax.jit(
        lambda memory, pairs: lax.scan(lambda m, p: (list(function(cases[0])(m, p)), None), memory, pairs)[0],
        donate_argnums=0,
    )
    assert_in_place(step.lower(memory, pairs).compile(), memory)
    want = cases[0].memory
    for case in cases:
        case.caches = want
        want = run_oracle(case)
    assert_same(step(memory, pairs), want)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("pairs", [PAIRS["circle"], [1, -1, 6]], ids=["copy", "zero"])
def test_refs(pairs, backend):
    case = make_blocks(np.random.default_rng(1), pairs, kv_cache_dtype="int8", per_token_head=True)
    memory, indices = arrays(case)
    refs = [jax.new_ref(array) for array in memory]
    assert function(case, backend=backend)(refs, indices) is None
    assert_same([ref[...] for ref in refs], run_oracle(case))

    def step(memory, indices):
        refs = [jax.new_ref(array) for array in memory]
        function(case, backend=backend)(refs, indices)
        return [jax.freeze(ref) for ref in refs]

    assert_same(jax.jit(step)(memory, indices), run_oracle(case))


# ---- vmap


@pytest.mark.parametrize("many", [1024, 1])
@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap(layout, backend, many, monkeypatch):
    monkeypatch.setattr(plan, "MANY_PAIRS", many)
    plan.plan_blocks.cache_clear()
    if backend == "xla" and many == 1:
        pytest.skip("nothing is planned")
    for indices in (None, ZEROS):
        cases = [big(seed, pairs=indices, layout=layout) for seed in range(2)]
        batch = [jnp.stack(x) for x in zip(*(case.memory for case in cases), strict=True)]
        every = jnp.stack([jnp.asarray(case.indices) for case in cases])
        step = jax.jit(jax.vmap(function(cases[0], backend=backend)), donate_argnums=0)
        if backend == "xla":
            assert_in_place(step.lower(batch, every).compile(), batch)
        assert_same(step(batch, every), [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])
    plan.plan_blocks.cache_clear()


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_vmap_of_caches_or_pairs_alone(backend):
    first, second = (make_blocks(np.random.default_rng(seed), PAIRS["tree"]) for seed in range(2))
    batch = [jnp.stack(x) for x in zip(first.memory, second.memory, strict=True)]
    got = jax.vmap(function(first, backend=backend), in_axes=(0, None))(batch, first.indices)
    assert_same(got, [np.stack(x) for x in zip(run_oracle(first), run_oracle(second), strict=True)])

    second = replace(first, indices=np.array(PAIRS["circle"] + [[-1, 0], [7, 1]], np.int32))
    pairs = jnp.stack([jnp.asarray(case.indices) for case in (first, second)])
    got = jax.vmap(function(first, backend=backend), in_axes=(None, 0))(list(map(jnp.asarray, first.memory)), pairs)
    assert_same(got, [np.stack(x) for x in zip(run_oracle(first), run_oracle(second), strict=True)])


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_vmap_of_vmap(backend):
    cases = [make_blocks(np.random.default_rng(seed), PAIRS["circle with branches"]) for seed in range(4)]
    batch = [jnp.stack(x).reshape(2, 2, *x[0].shape) for x in zip(*(case.memory for case in cases), strict=True)]
    step = jax.vmap(jax.vmap(function(cases[0], backend=backend), in_axes=(0, None)), in_axes=(1, None), out_axes=1)
    got = step(batch, cases[0].indices)
    want = [np.stack(x).reshape(2, 2, *x[0].shape) for x in zip(*map(run_oracle, cases), strict=True)]
    assert_same(got, want)


# ---- derivatives, export, integers


def test_differentiation_raises_and_names_the_way_out():
    for indices, name in ((PAIRS["swap"], "copy_blocks"), ([1, 2], "zero_blocks")):
        case = make_blocks(np.random.default_rng(2), indices, dtype="float32")
        memory, index = arrays(case)
        step = function(case)

        def loss(cache, value=memory[1], index=index, step=step):
            return step([cache, value], index)[0].sum()

        with pytest.raises(NotImplementedError) as error:
            jax.grad(loss)(memory[0])
        assert str(error.value) == f"jaxkv.{name} is not differentiable: apply jax.lax.stop_gradient to the caches"


@pytest.mark.parametrize("indices", [PAIRS["tree"], [1, 9, 3]], ids=["copy", "zero"])
def test_export(indices):
    case = make_blocks(np.random.default_rng(3), indices)
    memory, index = arrays(case)
    exported = jax.export.export(jax.jit(function(case)), platforms=["cpu", "tpu"])(memory, index)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(memory, index), run_oracle(case))


def test_export_with_any_number_of_pairs_and_blocks():
    case = make_blocks(np.random.default_rng(4), PAIRS["tree"])
    memory, index = arrays(case)
    scope = jax.export.SymbolicScope()

    def spec(array, first):
        shape = jax.export.symbolic_shape(f"{first}, {', '.join(map(str, array.shape[1:]))}", scope=scope)
        return jax.ShapeDtypeStruct(shape, array.dtype)

    specs = [spec(array, "b") for array in memory], spec(index, "n")
    exported = jax.export.export(jax.jit(function(case)), platforms=["cpu"])(*specs)
    for pairs in PAIRS["tree"], PAIRS["chain"]:
        case.indices = np.array(pairs, np.int32)
        assert_same(exported.call(*arrays(case)), run_oracle(case))
    with pytest.raises(ValueError, match=r"^pairs must have a static shape on cuda, where kernels depend on it"):
        jax.export.export(jax.jit(function(case)), platforms=["cuda"])(memory, specs[1])


@pytest.mark.x64
def test_integers_of_either_width(x64):
    case = make_blocks(np.random.default_rng(5), PAIRS["no blocks"])
    for backend in ("xla", "interpret"):
        index = jnp.asarray(case.indices.astype(np.int64 if x64 else np.int32))
        got = jax.jit(function(case, backend=backend))(list(map(jnp.asarray, case.memory)), index)
        assert_same(got, run_oracle(case))


def test_lists_and_numpy():
    case = make_blocks(np.random.default_rng(6), PAIRS["tree"])
    want = run_oracle(case)
    for indices in (case.indices.tolist(), case.indices.astype(np.uint8), tuple(map(tuple, case.indices.tolist()))):
        assert_same(jaxkv.copy_blocks(case.memory, indices), want)
    assert_same(jaxkv.copy_blocks(case.memory, np.zeros((0, 2), np.int32)), case.memory)
    assert_same(jaxkv.copy_blocks(case.memory, []), case.memory)
    assert_same(jaxkv.zero_blocks(case.memory, []), case.memory)
    assert_same(jaxkv.zero_blocks(case.caches[0], [1])[0][1:2], [np.zeros_like(case.caches[0][1])])


# ---- PagedKVCache


@pytest.mark.parametrize("options", [
    {}, {"layout": "HND", "num_layers": 2}, {"layout": "PACKED_NHD", "head_size_v": 24},
    {"kv_cache_dtype": "nvfp4", "head_size": 32}, {"kv_cache_dtype": "int4", "per_token_head": True, "num_layers": 2},
    {"layout": "KV_NHD", "kv_cache_dtype": "int8", "per_token_head": True, "scale_layout": "head block slot"},
    {"layout": "MLA", "num_heads": 1, "head_size_v": 8},
    {"layout": "MLA", "num_heads": 1, "head_size": 576, "head_size_v": 512, "kv_cache_dtype": "fp8_ds_mla"},
    {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": 0.25},
], ids=str)  # fmt: skip
def test_a_cache(options):
    rng = np.random.default_rng(7)
    sizes = {"num_blocks": 7, "block_size": 4, "num_heads": 2, "head_size": 16} | options
    cache = jaxkv.PagedKVCache.create(**sizes)
    count = len(cache.caches)
    memory = [random_bits(rng, array.shape, array.dtype.name) for array in cache._memory]
    cache = cache._with(list(map(jnp.asarray, memory)))
    scale_axes = [(options.get("scale_layout") or "block").split().index("block")] * 2
    axes = [names.index(("block",)) for names in cache.spec.layout.arrays]
    if options.get("num_layers"):
        scale_axes = [1, 1]
    from kvcore.oracle import blocks as reference

    step = jax.jit(lambda cache, pairs, blocks: cache.copy_blocks(pairs).zero_blocks(blocks), donate_argnums=0)
    new = step(cache, jnp.asarray(PAIRS["circle with branches"]), jnp.asarray([2, -1, 6]))
    axes = [*axes, *scale_axes][: len(memory)]
    reference.copy_blocks(memory, PAIRS["circle with branches"], axes)
    reference.zero_blocks(memory, [2, 6], axes)
    assert new.spec == cache.spec
    assert_same(new._memory, memory)
    if count == len(memory):
        assert (new.k_scale is None) == ("k_scale" not in options)
