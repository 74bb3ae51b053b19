"""`rope_and_cache` with views of heads for query, key and value: the bits of the oracle's, as with arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.cases.heads import KINDS, columns_of, hide, rope_views, view_of
from tests.cases.jax_ropes import assert_same
from tests.cases.rope import MLA, RopeCase, run_oracle

BACKENDS = pytest.mark.parametrize("backend", ["xla", "interpret"])
SIZES = {"num_heads": 4, "integers": "int32", "slots": (3, -1, 39, 8, 40, 17)}
OPTIONS = {
    "plain": {},
    "norms": dict(q_weights="float32", k_weights="bfloat16", rope="gptj", rotary_dim=8),
    "fp8 by head": dict(kv_cache_dtype="fp8", scales="head"),
    "token and head": dict(kv_cache_dtype="int8", per_token_head=True),
    "diffkv": dict(layout="PACKED_NHD", head_size_v=32, k_weights="float32"),
    "sections": dict(sections=(2, 4, 2), rotary_dim=16),
}


@BACKENDS
@pytest.mark.parametrize(("options", "kind"), [
    *(("norms", kind) for kind in KINDS), *((name, "two of a group") for name in OPTIONS), ("plain", "flat"),
])  # fmt: skip
def test_every_kind(options, kind, backend):
    call = RopeCase(options, **(SIZES | OPTIONS[options])).make()
    views = {name: view_of(getattr(call, name), kind, i) for i, name in enumerate(("query", "key", "value"))}
    assert_same(rope_views(call, views, backend=backend), run_oracle(call))


@BACKENDS
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_one_is_a_view_and_the_others_are_arrays(name, backend):
    call = RopeCase("one", **SIZES).make()
    assert_same(rope_views(call, {name: view_of(getattr(call, name), "heads")}, backend=backend), run_oracle(call))


@BACKENDS
@pytest.mark.parametrize("more", [{}, {"k_weights": "float32"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_rows_of_mla(more, backend):
    call = RopeCase("mla", **({**MLA, "integers": "int32"} | more)).make()
    views = {"query": view_of(call.query, "flat"), "key": columns_of(call.key), "value": columns_of(call.value, 1)}
    assert_same(rope_views(call, views, backend=backend), run_oracle(call))


def test_one_projection_in_a_donated_step():
    call = RopeCase("step", **SIZES).make()
    size = call.query.shape[-1]
    parts = [array.reshape(len(array), 4, -1, size) for array in (call.query, call.key, call.value)]
    projection = jnp.asarray(np.concatenate(parts, axis=2))

    def step(projection, caches):
        rows = [jaxkv.heads(projection, *part) for part in ((0, 2), (2, 3), (3, 4))]
        return jaxkv.rope_and_cache(*rows, caches, call.positions, call.cos_sin, call.slot_mapping, **call.options)

    caches = [jnp.asarray(np.concatenate([cache] * 64)) for cache in call.caches]
    compiled = jax.jit(step, donate_argnums=1).lower(projection, caches).compile()
    size = sum(c.nbytes for c in caches)
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2
    assert_same(jax.jit(step)(projection, list(map(jnp.asarray, call.caches))), run_oracle(call))


@pytest.mark.parametrize("kind", ["flat", "two of a group"])
@pytest.mark.parametrize("layout", ["NHD", "PALLAS"], ids=["folded", "a loop"])
def test_vmap(layout, kind):
    calls = [RopeCase("batch", layout=layout, **SIZES).make(seed) for seed in (0, 1)]
    hidden = {
        name: [hide(getattr(c, name), kind, i) for i, c in enumerate(calls)] for name in ("query", "key", "value")
    }
    arrays = {name: jnp.stack([jnp.asarray(array) for array, *_ in found]) for name, found in hidden.items()}
    caches = [jnp.stack(x) for x in zip(*(map(jnp.asarray, c.caches) for c in calls), strict=True)]
    positions = jnp.stack([jnp.asarray(c.positions) for c in calls])

    def step(arrays, caches, positions):
        views = [
            jaxkv.heads(arrays[name], start, stop, head_size=size)
            for name, ((_, start, stop, size), *_) in hidden.items()
        ]
        call = calls[0]
        slots = jnp.asarray(call.slot_mapping)
        return jaxkv.rope_and_cache(*views, caches, positions, jnp.asarray(call.cos_sin), slots, **call.options)

    for call in calls:
        call.slot_mapping = calls[0].slot_mapping
    got = jax.vmap(step)(arrays, caches, positions)
    assert_same(got, [np.stack(x) for x in zip(*map(run_oracle, calls), strict=True)])


def test_the_caches_method():
    cache = jaxkv.PagedKVCache.create(num_blocks=5, block_size=8, num_heads=4, head_size=16, dtype="bfloat16")
    call = RopeCase("method", **SIZES).make()
    rest = call.positions, call.cos_sin, call.slot_mapping
    want, want_cache = cache.rope_and_cache(call.query, call.key, call.value, *rest)
    views = [view_of(getattr(call, name), "one of a group") for name in ("query", "key", "value")]
    got, got_cache = cache.rope_and_cache(*views, *rest)
    assert_same([got, *got_cache.caches], [want, *want_cache.caches])
    assert (np.asarray(got_cache.caches[0], np.float32) != 0).any()


def test_a_gpu_is_given_the_array_itself(monkeypatch):
    from jaxkv._triton.launch import jt

    given = []

    def triton_call(*arguments, out_type, **_):
        given.append([a.shape for a in arguments if hasattr(a, "shape")])
        return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), out_type)

    monkeypatch.setattr(jt, "triton_call", triton_call)
    call = RopeCase("lowered", **SIZES).make()
    views = {name: view_of(getattr(call, name), "two of a group") for name in ("query", "key", "value")}
    traced = jax.jit(lambda views: rope_views(call, views)).trace(views)
    assert "stablehlo.slice" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert given[0][:3] == [view.array.shape for view in views.values()]
