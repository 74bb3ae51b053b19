"""precompile: what it compiles serves the calls, and nothing runs or changes."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from tests.cases.arrays import random_normal
from tests.cases.jax_compiling import COMPILING

HEADS, GROUP, DIM, POISON = 2, 2, 16, 55.0


def draw(*shape, seed=0):
    return jnp.asarray(random_normal(np.random.default_rng(seed), shape, "float32"))


def make_cache(**options):
    cache = jaxkv.PagedKVCache.create(
        **(dict(num_blocks=6, block_size=4, num_heads=HEADS, head_size=DIM, dtype="float32", num_layers=2) | options)
    )
    return jax.tree.map(lambda x: jnp.full(x.shape, POISON, x.dtype), cache)


def make_inputs(batch):
    return {
        "query": draw(batch, HEADS * GROUP, DIM), "key": draw(batch, HEADS, DIM, seed=1),
        "value": draw(batch, HEADS, DIM, seed=2), "cos_sin": draw(8, DIM, seed=3),
        "positions": jnp.full(batch, 3, jnp.int32),
        "slots": jnp.arange(batch) * 4 + 3, "tables": jnp.arange(batch)[:, None], "lens": jnp.full(batch, 4, jnp.int32),
    }  # fmt: skip


def step(cache, inputs):
    """A model's decode step, but for all that is not the cache's."""
    rows = [inputs[name] for name in ("query", "key", "value", "positions", "cos_sin", "slots")]
    query, cache = cache.rope_and_cache(*rows, layer=1)
    return cache.attend(query, inputs["tables"], inputs["lens"], layer=1), cache


def described(arrays):
    return jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), arrays)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- jitted functions


@pytest.mark.parametrize("describe", [described, lambda arrays: arrays], ids=["described", "given"])
def test_a_step_that_was_jitted_compiles_nothing(describe):
    decode = jax.jit(lambda *x: step(*x), donate_argnums=0)
    batches = {batch: make_inputs(batch) for batch in (1, 3)}
    cache, new = make_cache(), make_inputs(2)
    programs = {batch: jaxkv.precompile(decode, *describe((cache, each))) for batch, each in batches.items()}
    assert all(np.all(np.asarray(array) == POISON) for array in cache.caches)
    assert programs[1].memory_analysis().alias_size_in_bytes >= cache.caches[0].nbytes * 2  # the cache is donated
    want = {batch: step(cache, each) for batch, each in batches.items()}
    for batch, each in batches.items():
        fresh = jax.tree.map(jnp.copy, cache)
        COMPILING.clear()
        assert_same(decode(fresh, each), want[batch])
        assert not COMPILING
        assert fresh.caches[0].is_deleted()
    decode(cache, new)
    assert COMPILING


def test_static_arguments_of_a_jitted_function():
    gather = jax.jit(jaxkv.gather_kv, static_argnames=("max_len", "layer", "layout"))
    cache = make_cache()
    arguments = (cache.caches, jnp.array([[1, 0]]), jnp.array([5]))
    options = {"max_len": 6, "layer": 1, "layout": cache.spec.layout}
    program = jaxkv.precompile(gather, *described(arguments), **options)
    COMPILING.clear()
    got = gather(*arguments, **options)
    assert not COMPILING
    assert_same(program(*arguments), got)


def test_arrays_on_devices_are_described_with_their_shardings():
    mesh, inputs = jax.make_mesh((2,), ("tp",)), make_inputs(2)
    arguments = jax.device_put(
        (make_cache(num_layers=None).caches, inputs["query"], inputs["tables"], inputs["lens"]),
        (NamedSharding(mesh, P(None, None, "tp")), *[NamedSharding(mesh, P())] * 3),
    )
    whole = jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)
    for descriptions, compiles in ((whole, False), (described(arguments), True)):
        decode = jax.jit(lambda caches, query, *rest: jaxkv.paged_attention(query, caches, *rest))
        jaxkv.precompile(decode, *descriptions)
        COMPILING.clear()
        jax.block_until_ready(decode(*arguments))
        assert bool(COMPILING) == compiles


# ---- functions that were not


def test_a_step():
    cache, inputs = make_cache(), make_inputs(3)
    program = jaxkv.precompile(step, *described((cache, inputs)))
    assert_same(program(cache, inputs), step(cache, inputs))
    assert not cache.caches[0].is_deleted()


QUERY, TABLES, LENS = draw(2, HEADS * GROUP, DIM), jnp.array([[1, 0], [3, 2]]), jnp.array([5, 2])


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": np.float32(2)},
        {"kv_cache_dtype": "fp8", "k_scale": [0.5, 0.25], "layout": jaxkv.CacheLayout.NHD, "return_lse": True},
        {"kv_cache_dtype": "int8", "sliding_window": np.int64(3), "soft_cap": 20.0, "sinks": None, "backend": "xla"},
        {"kv_cache_dtype": "int8", "layer": np.int32(1), "layout": "layer block slot head dim"},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_are_no_arrays(options):
    caches = [jnp.asarray(np.random.default_rng(i).integers(0, 100, (6, 4, HEADS, DIM), np.uint8)) for i in (0, 1)]
    if "layer" in options:
        caches = [jnp.stack([cache, cache[::-1]]) for cache in caches]
    arguments = (QUERY, caches, TABLES, LENS)
    program = jaxkv.precompile(jaxkv.paged_attention, *described(arguments), **options)
    assert_same(program(*arguments), jax.jit(lambda *x: jaxkv.paged_attention(*x, **options))(*arguments))


@pytest.mark.parametrize("dtype", ["float32", np.float16, jnp.bfloat16, np.dtype("float32"), None], ids=repr)
def test_dtypes_are_no_arrays(dtype):
    cache = jaxkv.PagedKVCache.create(num_blocks=6, block_size=4, num_heads=HEADS, head_size=DIM, dtype="float32")
    cache = cache.write(draw(3, HEADS, DIM), draw(3, HEADS, DIM, seed=1), jnp.array([4, 5, 6]))
    program = jaxkv.precompile(cache.gather, TABLES, LENS, 6, dtype=dtype)
    assert_same(program(cache, TABLES, LENS), cache.gather(TABLES, LENS, 6, dtype=dtype))


def test_a_method_of_a_described_cache():
    empty = jax.eval_shape(make_cache)
    rows = draw(3, HEADS, DIM), draw(3, HEADS, DIM, seed=1)
    slots = jnp.array([4, -1, 23])
    program = jaxkv.precompile(empty.write, *described((*rows, slots)), layer=1)
    cache = make_cache()
    assert_same(program(cache, *rows, slots), cache.write(*rows, slots, layer=1))


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["plain", "jitted"])
def test_partials(jit):
    def attend(query, cache, tables, lens):
        return cache.attend(query, tables, lens)

    cache = make_cache(num_layers=None)
    half = functools.partial(functools.partial(jit(attend), QUERY), tables=TABLES)
    program = jaxkv.precompile(half, described(cache), lens=described(LENS))
    got = program(QUERY, cache, tables=TABLES, lens=LENS)
    assert_same(got, half(cache, lens=LENS))


def test_what_is_no_array_in_a_pytree():
    caches = draw(6, 4, HEADS, DIM, seed=4), draw(6, 4, HEADS, DIM, seed=5)

    def attend(arrays, options):
        return jaxkv.paged_attention(arrays["query"], caches, TABLES, LENS, scale=arrays["scale"], **options)

    arrays = {"query": QUERY, "scale": 0.5}
    program = jaxkv.precompile(attend, arrays, {"soft_cap": 3.0})
    assert_same(program({"query": QUERY, "scale": None}), attend(arrays, {"soft_cap": 3.0}))


def test_views_of_heads():
    projected = draw(2, HEADS * GROUP + 2 * HEADS, DIM)
    cache = make_cache(num_layers=None)

    def front(qkv, cache):
        key, value = jaxkv.heads(qkv, 4, 6), jaxkv.heads(qkv, 6, 8)
        return cache.write(key, value, jnp.array([3, 4])).attend(jaxkv.heads(qkv, 0, 4), TABLES, LENS)

    assert_same(jaxkv.precompile(front, described(projected), cache)(projected, cache), front(projected, cache))
    view = jaxkv.heads(projected, 0, 4)
    program = jaxkv.precompile(cache.attend, jaxkv.heads(described(projected), 0, 4), TABLES, LENS)
    assert_same(program(cache, view, TABLES, LENS), cache.attend(view, TABLES, LENS))


# ---- nothing runs


def test_nothing_runs():
    seen = []

    def told(x):
        jax.debug.callback(seen.append, x)
        return x * 2

    program = jaxkv.precompile(told, LENS)
    jax.effects_barrier()
    assert seen == []
    program(LENS)
    jax.effects_barrier()
    assert len(seen) == 1


def test_references_keep_what_they_hold():
    refs = [jax.new_ref(jnp.full((6, 4, HEADS, DIM), POISON)) for _ in range(2)]
    rows = draw(3, HEADS, DIM), draw(3, HEADS, DIM, seed=1)
    jaxkv.precompile(jaxkv.reshape_and_cache_flash, *rows, *refs, jnp.array([4, 5, 6]))
    assert all(np.all(np.asarray(ref[...]) == POISON) for ref in refs)


# ---- threads


def test_threads():
    decode = jax.jit(lambda *x: step(*x))
    cache = make_cache()
    batches = [1, 2, 3] * 2
    with ThreadPoolExecutor(len(batches)) as pool:
        programs = list(
            pool.map(lambda batch: jaxkv.precompile(decode, *described((cache, make_inputs(batch)))), batches)
        )
    for batch, program in zip(batches, programs, strict=True):
        inputs = make_inputs(batch)
        COMPILING.clear()
        got = decode(cache, inputs)
        assert not COMPILING
        assert_same(program(cache, inputs), got)


# ---- errors


@pytest.mark.parametrize("change", [
    {"query": ShapeDtypeStruct((2, 4, DIM), jnp.int32)}, {"query": ShapeDtypeStruct((2, 3, DIM), jnp.float32)},
    {"kv_cache_dtype": "fp9"}, {"layer": 2}, {"soft_cap": -1.0}, {"backend": "triton"},
], ids=str)  # fmt: skip
def test_errors_are_those_of_the_call(change):
    given = {"query": QUERY, "block_tables": TABLES, "seq_lens": LENS}
    cache = make_cache()
    arguments = {**given, "caches": cache.caches, "layout": cache.spec.layout, "layer": 1} | change
    real = {n: jnp.ones(x.shape, x.dtype) if isinstance(x, ShapeDtypeStruct) else x for n, x in arguments.items()}
    with pytest.raises((ValueError, TypeError)) as call:
        jaxkv.paged_attention(**real)
    with pytest.raises(call.type) as ahead:
        jaxkv.precompile(jaxkv.paged_attention, **arguments)
    assert str(ahead.value) == str(call.value)


@pytest.mark.parametrize(("function", "got"), [(None, "NoneType"), (3, "int"), (QUERY, "ArrayImpl")])
def test_what_cannot_be_called(function, got):
    with pytest.raises(TypeError, match=rf"^function must be callable, got {got}$"):
        jaxkv.precompile(function, QUERY)


def test_python_that_depends_on_data():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jaxkv.precompile(lambda lens: lens if lens[0] > 3 else -lens, LENS)
