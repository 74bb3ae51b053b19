"""jaxkv.rope_and_cache under JAX's transformations: right, and in place; exported; a cache's method."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from kvcore.layout import CacheLayout
from tests.cases.arrays import bits
from tests.cases.jax_ropes import assert_same
from tests.cases.rope import MLA, NORMS, RopeCase, run_oracle

LAYERS = 4


def make(**options):
    return RopeCase("a call", **{"integers": "int32", "num_tokens": 3, "num_q_heads": 4} | options).make()


def arrays(call):
    """A call's arrays, as a tree."""
    names = ("query", "key", "value", "caches", "positions", "cos_sin", "slot_mapping")
    inputs = {name: jax.tree.map(jnp.asarray, getattr(call, name)) for name in names}
    norms = {name: jnp.asarray(call.options[name]) for name in ("q_norm", "k_norm") if call.options[name] is not None}
    return inputs | norms


def function(call, **more):
    """The op as a function of `arrays`, and the caches as an argument of their own."""
    rest = {name: x for name, x in call.options.items() if name not in ("q_norm", "k_norm")} | more

    def step(caches, inputs):
        return jaxkv.rope_and_cache(**inputs | rest, caches=caches)

    return step


def split(inputs):
    return inputs["caches"], {name: x for name, x in inputs.items() if name != "caches"}


def assert_in_place(compiled, caches, parts=1):
    size = sum(c.nbytes for c in caches)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size // parts
    assert memory.temp_size_in_bytes < size // parts / 2


BIG = {"name": "big", "integers": "int32", "num_q_heads": 4}
KINDS = {
    "NHD": {}, "norms": NORMS, "HND": {"layout": "HND"}, "PACKED_NHD": {"layout": "PACKED_NHD"},
    "MLA": MLA | {"num_q_heads": 2, "k_weights": "float32"}, "fp8": {"kv_cache_dtype": "fp8"},
    "int8 by token and head": {"kv_cache_dtype": "int8", "per_token_head": True},
    "mrope": {"sections": (2, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_jit_with_donation_updates_the_same_buffers(options):
    call = grown(make(**options), 64)
    caches, inputs = split(arrays(call))
    step = jax.jit(function(call), donate_argnums=0)
    assert_in_place(step.lower(caches, inputs).compile(), caches)
    before = [c.unsafe_buffer_pointer() for c in caches]
    query, *new = step(caches, inputs)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    assert_same([query, *new], run_oracle(call))


def grown(call, times):
    """The call with more blocks in its caches: more than all that is computed beside them."""
    layout = call.options["layout"]
    axes = [*layout.arrays, *([CacheLayout.of("NHD").arrays[0][:3]] * 2)]
    latent = layout.latent
    for i, (cache, names) in enumerate(
        zip(call.caches, axes, strict=False) if not latent else [(call.caches[0], layout.arrays[0])]
    ):
        at = names.index(("block",))
        call.caches[i] = np.concatenate([cache] * times, axis=at)
    return call


def test_without_donation_the_argument_stays_as_it_was():
    call = make()
    caches, inputs = split(arrays(call))
    assert_same(jax.jit(function(call))(caches, inputs), run_oracle(call))
    assert_same(caches, call.caches)


@pytest.mark.parametrize("layout", ["NHD", "KV_NHD"])
def test_scan_over_layers_carries_one_cache(layout):
    call = grown(make(layout=layout, num_layers=LAYERS, layer=0), 32)
    caches, inputs = split(arrays(call))

    def decode(caches, inputs):
        def one_layer(caches, layer):
            query, *new = function(call, layer=layer)(caches, inputs)
            return new, query

        return lax.scan(one_layer, caches, jnp.arange(LAYERS))

    step = jax.jit(decode, donate_argnums=0)
    assert_in_place(step.lower(caches, inputs).compile(), caches)
    new, queries = step(caches, inputs)
    for layer in range(LAYERS):
        call.options["layer"] = layer
        query, *call.caches = run_oracle(call)
    assert_same(new, call.caches)
    for each in queries:
        assert_same([each], [query])


@pytest.mark.parametrize("layer", [-1, LAYERS, 2**31 - 1])
def test_a_traced_layer_out_of_range_writes_nothing(layer):
    call = make(num_layers=LAYERS, layer=1)
    caches, inputs = split(arrays(call))
    query, *new = jax.jit(lambda layer: function(call, layer=layer)(caches, inputs))(layer)
    assert_same([query, *new], [run_oracle(call)[0], *call.caches])


# ---- vmap


VMAP = {
    "NHD": {}, "PALLAS": {"layout": "PALLAS"}, "KV_NHD": {"layout": "KV_NHD"}, "HND": {"layout": "HND"},
    "MLA": MLA | {"num_q_heads": 2}, "int8 by token and head": {"kv_cache_dtype": "int8", "per_token_head": True},
    "mrope": {"sections": (2, 3, 3)}, "fewer slots": {"slots": (5, 41)}, "layers": {"num_layers": 2, "layer": 1},
    "layers inside": {"layout": "block layer slot head dim", "num_layers": 2, "layer": 1},
}  # fmt: skip


def batch_of(options, count=3):
    calls = [
        RopeCase("a batch", **{"integers": "int32", "num_tokens": 3} | NORMS | options).make(i) for i in range(count)
    ]
    for call in calls[1:]:  # one model
        call.cos_sin = calls[0].cos_sin
        call.options |= {name: calls[0].options[name] for name in ("q_norm", "k_norm")}
    return calls


@pytest.mark.parametrize("options", VMAP.values(), ids=VMAP)
def test_vmap(options):
    calls = [grown(call, 32) for call in batch_of(options)]
    shared = ("cos_sin", "q_norm", "k_norm")
    batch = jax.tree.map(lambda *x: jnp.stack(x), *map(arrays, calls))
    batch |= {name: arrays(calls[0])[name] for name in shared}
    caches, inputs = split(batch)
    axes = {name: None if name in shared else 0 for name in inputs}
    step = jax.jit(jax.vmap(function(calls[0]), in_axes=(0, axes)), donate_argnums=0)
    assert_in_place(step.lower(caches, inputs).compile(), caches)
    assert_same(step(caches, inputs), [np.stack(x) for x in zip(*map(run_oracle, calls), strict=True)])


@pytest.mark.parametrize("name", ["cos_sin", "q_norm", "k_norm", "positions", "query", "key", "slot_mapping", "caches"])
def test_vmap_of_one_argument(name):
    first, second = RopeCase("one", **NORMS, integers="int32", num_tokens=3).make(), None
    second = RopeCase("one", **NORMS, integers="int32", num_tokens=3).make()
    other = RopeCase("one", **NORMS, integers="int32", num_tokens=3).make(1)
    if name in second.options:
        second.options[name] = other.options[name]
    else:
        setattr(second, name, getattr(other, name) if name != "cos_sin" else first.cos_sin[::-1])
    inputs = arrays(first)
    inputs[name] = jax.tree.map(lambda *x: jnp.stack(x), inputs[name], arrays(second)[name])
    caches, inputs = split(inputs)
    axes = {n: 0 if n == name else None for n in inputs}
    got = jax.vmap(function(first), in_axes=(0 if name == "caches" else None, axes))(caches, inputs)
    assert_same(got, [np.stack(x) for x in zip(run_oracle(first), run_oracle(second), strict=True)])


# ---- derivatives, export


def test_differentiation_raises_and_names_the_way_out():
    call = make(dtype="float32")
    caches, inputs = split(arrays(call))
    with pytest.raises(NotImplementedError) as error:
        jax.grad(lambda query: function(call)(caches, inputs | {"query": query})[0].sum())(inputs["query"])
    assert str(error.value) == (
        "jaxkv.rope_and_cache is not differentiable: apply jax.lax.stop_gradient to query, key and value"
    )


def test_export():
    call = make(**NORMS)
    caches, inputs = split(arrays(call))
    exported = jax.export.export(jax.jit(function(call)), platforms=["cpu", "tpu"])(caches, inputs)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(caches, inputs), run_oracle(call))


@pytest.mark.parametrize(
    "options", [NORMS, MLA | {"num_q_heads": 2}, {"sections": (2, 3, 3)}], ids=["NHD", "MLA", "mrope"]
)
def test_export_with_any_number_of_tokens_blocks_and_positions(options):
    calls = [make(**options), make(**options, num_tokens=5)]
    calls[1] = grown(calls[1], 2)
    calls[1].cos_sin = np.concatenate([calls[1].cos_sin] * 2)
    inputs = list(map(arrays, calls))
    scope, sizes = jax.export.SymbolicScope(), {3: "t", 5: "b", 11: "p"}

    def spec(x, y):
        shape = ",".join(str(m) if m == n else sizes[m] for m, n in zip(x.shape, y.shape, strict=True))
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), x.dtype)

    specs = jax.tree.map(spec, *inputs)
    exported = jax.export.export(jax.jit(function(calls[0])), platforms=["cpu"])(*split(specs))
    for call, each in zip(calls, inputs, strict=True):
        assert_same(exported.call(*split(each)), run_oracle(call))


@pytest.mark.parametrize(("name", "shape"), [
    ("query", "(t, 4, 16)"), ("caches", "(b, 8, 2, 16)"), ("cos_sin", "(p, 16)"),
])  # fmt: skip
def test_kernels_need_every_size(name, shape):
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays(make()))
    scope = jax.export.SymbolicScope()

    def open_first(x):
        sizes = jax.export.symbolic_shape(shape.strip("()").split(",")[0], scope=scope)
        return jax.ShapeDtypeStruct((*sizes, *x.shape[1:]), x.dtype)

    for each in ("query", "key", "value", "positions", "slot_mapping") if name == "query" else (name,):
        inputs[each] = jax.tree.map(open_first, inputs[each])
    with pytest.raises(ValueError, match="must have a static shape") as error:
        jax.export.export(jax.jit(function(make())), platforms=["cuda"])(*split(inputs))
    named = "key_cache" if name == "caches" else name
    assert str(error.value) == f"{named} must have a static shape on cuda, where kernels depend on it, got {shape}"


@pytest.mark.x64
def test_integers_of_either_width(x64):
    call = make(num_layers=2, layer=1, positions=(0, -1, 10), slots=(39, -1, 40))
    for wide in ({"positions"}, {"slot_mapping"}, {"layer"}):
        inputs = (
            {name: x.astype(np.int64) if name in wide else x for name, x in arrays(call).items()}
            if x64
            else arrays(call)
        )
        layer = jnp.asarray(1, jnp.int64 if x64 and "layer" in wide else jnp.int32)
        caches, inputs = split(inputs)
        got = jax.jit(lambda layer, *x: function(call, layer=layer)(*x))(layer, caches, inputs)
        assert_same(got, run_oracle(call))


def test_numpy_integers_of_64_bits_do_not_wrap():
    call = make(num_tokens=4)
    call.positions = np.array([2**32, -(2**32) + 1, -1, 3])
    call.slot_mapping = np.array([2**32 + 1, 5, 2**33, 7])
    want = run_oracle(call)
    positions = np.where(call.positions >= 11, -1, call.positions)  # known ones past the table are an error
    got = jaxkv.rope_and_cache(
        call.query, call.key, call.value, call.caches, positions, call.cos_sin, call.slot_mapping, rope="neox"
    )
    assert_same(got, want)


# ---- PagedKVCache


@pytest.mark.parametrize("options", [
    {}, {"layout": "HND", "num_layers": 2, "layer": 1}, {"layout": "PACKED_NHD", "head_size_v": 24},
    {"kv_cache_dtype": "fp8", "scales": (0.5, 0.25)}, {"kv_cache_dtype": "int4", "per_token_head": True},
    {"layout": "KV_NHD", "kv_cache_dtype": "int8", "per_token_head": True, "scale_layout": "head block slot"},
    {"sections": (1, 3, 4)}, {"rotary_dim": 8, "rope": "gptj"},
    MLA, MLA | {"kv_cache_dtype": "fp8", "num_layers": 2, "layer": 0},
    MLA | {"kv_cache_dtype": "fp8_ds_mla", "head_size": 64, "rank": 512},
], ids=str)  # fmt: skip
def test_a_cache(options):
    case = RopeCase("a cache", **{"integers": "int32", "num_q_heads": 4} | NORMS | options)
    call = case.make()
    mla = {"num_heads": 1, "head_size": (case.rank or 0) + case.head_size, "head_size_v": case.rank}
    sizes = mla if case.latent else {n: getattr(case, n) for n in ("num_heads", "head_size", "head_size_v")}
    scales = {} if case.per_token_head or case.kv_cache_dtype == "auto" else {
        name: call.options[name] for name in ("k_scale", "v_scale")
    }  # fmt: skip
    cache = jaxkv.PagedKVCache.create(
        num_blocks=5, block_size=8, num_layers=case.num_layers, dtype=case.dtype, layout=case.layout,
        kv_cache_dtype=case.kv_cache_dtype, per_token_head=case.per_token_head, scale_layout=case.scale_layout,
        **sizes, **scales,
    )  # fmt: skip
    count = len(cache.caches)
    assert [(c.shape, c.dtype) for c in cache.caches] == [(c.shape, c.dtype) for c in call.caches[:count]]
    cache = replace(cache, caches=tuple(map(jnp.asarray, call.caches[:count])))
    if case.per_token_head:
        cache = replace(cache, **dict(zip(("k_scale", "v_scale"), map(jnp.asarray, call.caches[count:]), strict=True)))
    of_op = ("rope", "rotary_dim", "mrope_section", "q_norm", "k_norm", "eps", "layer")
    query, new = cache.rope_and_cache(
        call.query, call.key, call.value, call.positions, call.cos_sin, call.slot_mapping,
        **{name: call.options[name] for name in of_op},
    )  # fmt: skip
    own = [new.k_scale, new.v_scale] if case.per_token_head else []
    assert new.spec == cache.spec
    assert_same([query, *new.caches, *own], run_oracle(call))
    if not case.per_token_head:
        assert (new.k_scale is None) == (cache.k_scale is None)


def test_a_cache_checks_sizes_that_share_an_axis():
    cache = jaxkv.PagedKVCache.create(
        num_blocks=5, block_size=8, num_heads=2, head_size=16, head_size_v=24, layout="PACKED_NHD"
    )
    call = make(layout="PACKED_NHD", head_size=24, head_size_v=16)
    with pytest.raises(ValueError, match=r"^key must have shape \(num_tokens, 2, 16\), got \(3, 2, 24\)$"):
        cache.rope_and_cache(
            call.query, call.key, call.value, call.positions, call.cos_sin, call.slot_mapping, rope="neox"
        )
    assert not bits(np.asarray(cache.caches[0])).any()
