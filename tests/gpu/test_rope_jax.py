"""On a GPU, JAX's half of rope_and_cache: donation, scan, Refs, vmap, export, sharding."""

import numpy as np
import pytest

from tests.cases.arrays import bits
from tests.cases.gpu import HAS_GPU, lowered, needs_gpu
from tests.cases.jax_ropes import assert_same, call_jax
from tests.cases.rope import CASES, MLA, NORMS, RopeCase, run_oracle

pytestmark = pytest.mark.gpu

NAMES = ("query", "key", "value", "positions", "cos_sin", "slot_mapping")
KINDS = pytest.mark.parametrize(
    "options",
    [
        pytest.param(NORMS, marks=pytest.mark.gpu_smoke),
        MLA | {"k_weights": "float32"},
        {"kv_cache_dtype": "fp8_e4m3", "cache_dtype": "float8_e4m3fn"},
        {"kv_cache_dtype": "int8", "per_token_head": True},
    ],
    ids=["norms", "MLA", "fp8", "int8 by token and head"],
)


def make(**options):
    """A call, its caches, and its other arrays."""
    import jax.numpy as jnp

    call = RopeCase("a call", **{"integers": "int32"} | options).make()
    return call, [jnp.asarray(c) for c in call.caches], [jnp.asarray(getattr(call, name)) for name in NAMES]


def function(call, **more):
    """The op as a function of caches and other arrays; norms are constants of the program."""
    import jaxkv

    def step(caches, query, key, value, *rest):
        return jaxkv.rope_and_cache(query, key, value, caches, *rest, **call.options | more)

    return step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_for_an_h100(case):
    """Without a GPU, all but the kernels; with one, `test_rope.py` has them."""
    import jax

    call = case.make()
    with jax.enable_x64(case.integers == "int64"):
        lowered(lambda: call_jax(call), run_oracle(call))


@KINDS
def test_jit_with_donation_updates_the_same_buffers(options):
    import jax

    call, caches, arrays = make(**options)
    before = [c.unsafe_buffer_pointer() for c in caches]
    query, *new = jax.jit(function(call), donate_argnums=0)(caches, *arrays)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    assert_same([query, *new], run_oracle(call))


@pytest.mark.parametrize("layout", ["NHD", "KV_NHD", "PACKED_NHD"])
def test_scan_over_layers_in_a_loop_over_steps(layout):
    import jax
    import jax.numpy as jnp
    from jax import lax

    call, caches, arrays = make(layout=layout, num_layers=4, layer=0)

    def decode(caches, *arrays):
        def one_layer(caches, layer):
            query, *new = function(call, layer=layer)(caches, *arrays)
            return new, query

        def step(_, state):
            return lax.scan(one_layer, state[0], jnp.arange(4))

        queries = jnp.zeros((4, *call.query.shape), call.query.dtype)
        return lax.fori_loop(0, 3, step, (caches, queries))

    before = [c.unsafe_buffer_pointer() for c in caches]
    new, queries = jax.jit(decode, donate_argnums=0)(caches, *arrays)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    for layer in range(4):
        call.options["layer"] = layer
        query, *call.caches = run_oracle(call)
    assert_same(new, call.caches)
    assert_same(queries, [query] * 4)


@KINDS
def test_refs_are_updated_in_place(options):
    import jax

    call, caches, arrays = make(**options)
    refs = [jax.new_ref(c) for c in caches]
    before = [r.unsafe_buffer_pointer() for r in refs]
    (query,) = function(call)(refs, *arrays)
    assert [r.unsafe_buffer_pointer() for r in refs] == before
    assert_same([query, *(r[...] for r in refs)], run_oracle(call))


@pytest.mark.parametrize("options", [{}, {"layout": "PALLAS"}, {"layout": "HND"}, {"sections": (2, 3, 3)}], ids=str)
def test_vmap(options):
    import jax
    import jax.numpy as jnp

    calls = [RopeCase("a batch", integers="int32", **options).make(seed) for seed in range(3)]
    caches, *arrays = (
        jax.tree.map(lambda *x: jnp.stack([jnp.asarray(a) for a in x]), *(getattr(c, name) for c in calls))
        for name in ("caches", *NAMES)
    )
    new = jax.vmap(function(calls[0]))(caches, *arrays)
    assert_same(new, [np.stack(x) for x in zip(*map(run_oracle, calls), strict=True)])


def test_export_and_call():
    import jax

    call, caches, arrays = make(**NORMS)
    exported = jax.export.export(
        jax.jit(function(call)),
        platforms=["cuda" if HAS_GPU else "cpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")],
    )(caches, *arrays)
    assert_same(exported.call(caches, *arrays), run_oracle(call))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_over_all_gpus(kind):
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    gpus = jax.device_count()
    mesh = jax.make_mesh((gpus,), ("tp",), axis_types=(getattr(AxisType, kind),))
    call, caches, arrays = make(num_heads=2 * gpus, num_q_heads=6 * gpus, **NORMS)
    with jax.set_mesh(mesh):
        rows, cache, whole = (NamedSharding(mesh, P(*spec)) for spec in ((None, "tp"), (None, None, "tp"), ()))
        caches = [jax.device_put(c, cache) for c in caches]
        arrays = [jax.device_put(a, rows if i < 3 else whole) for i, a in enumerate(arrays)]
        call.options |= {name: jax.device_put(call.options[name], whole) for name in ("q_norm", "k_norm")}
        new = jax.jit(function(call), donate_argnums=0)(caches, *arrays)
    call.options |= {name: np.asarray(call.options[name]) for name in ("q_norm", "k_norm")}
    assert_same(new, run_oracle(call))


def test_without_kernels():
    """backend="xla" on a GPU: where products are contracted with sums, and divisions are not exact, it is near."""
    import jax

    call, caches, arrays = make(dtype="float32", **NORMS)
    got = jax.jit(function(call, backend="xla"))(caches, *arrays)
    want = run_oracle(call)
    needs_gpu()  # on a CPU, tests/rope has the bits
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)
    assert_same(got[2:], want[2:])
    untouched = np.setdiff1d(np.arange(40), call.slot_mapping)
    key_cache, key_want = (np.asarray(cache).reshape(40, -1) for cache in (got[1], want[1]))
    np.testing.assert_array_equal(bits(key_cache[untouched]), bits(key_want[untouched]))
    np.testing.assert_allclose(key_cache[call.slot_mapping], key_want[call.slot_mapping], rtol=0, atol=1e-5)
