"""jaxkv.rope_and_cache, bit for bit as the oracle: without kernels, and in Triton's interpreter; and its errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.cases.arrays import bits
from tests.cases.bad_ropes import BAD, BEYOND, valid
from tests.cases.jax_ropes import assert_same, call_jax
from tests.cases.rope import CASES, MLA, NORMS, RopeCase, run_oracle

BACKENDS = pytest.mark.parametrize("backend", ["xla", "interpret"])


def without_tiny_numbers(got, want):
    """Puts zeros in the place of numbers that are tiny in both: XLA's CPU code reads subnormal numbers as zeros."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        tiny = (np.abs(np.float32(g)) < 2.0**-90) & (np.abs(np.float32(w)) < 2.0**-90)
        got[i], want[i] = np.where(tiny, 0, np.asarray(g)).astype(w.dtype), np.where(tiny, 0, w).astype(w.dtype)


@BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, backend):
    call = case.make()
    with jax.enable_x64(case.integers == "int64"):
        got, want = list(call_jax(call, backend=backend)), run_oracle(call)
    if backend == "xla" and case.inputs == "subnormal":
        without_tiny_numbers(got, want)
    assert_same(got, want)


@BACKENDS
@pytest.mark.parametrize("case", [
    RopeCase("bfloat16", num_q_heads=4, num_heads=4, num_tokens=5, head_size=64),
    RopeCase("MLA", **MLA),
], ids=str)  # fmt: skip
def test_random_bits(case, backend):
    """Numbers of every kind: NaN and infinities, and more subnormal ones than a model would ever have."""
    rng = np.random.default_rng(0)
    for dtype in ("bfloat16", "float32"):
        call = replace(case, dtype=dtype, **NORMS, integers="int32").make()
        for name in ("query", "key", "value"):
            array = getattr(call, name)
            setattr(call, name, np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape))
        got, want = list(call_jax(call, backend=backend)), run_oracle(call)
        if backend == "xla":
            without_tiny_numbers(got, want)
        assert_same(got, want)


@BACKENDS
def test_an_empty_table_makes_zeros(backend):
    call = replace(CASES[0], integers="int32").make()
    call.cos_sin = call.cos_sin[:0]
    query, key_cache, _ = want = run_oracle(call)
    assert not query.any()
    assert not key_cache.reshape(40, 2, 128)[call.slot_mapping].any()
    assert_same(call_jax(call, backend=backend), want)


def test_arguments_may_be_lists_and_one_array():
    call = replace(CASES[0], layout="PACKED_NHD", dtype="float32", integers="int32", head_size=8).make()
    want = run_oracle(call)
    arrays = [np.asarray(x).tolist() for x in (call.query, call.key, call.value)]
    rest = [np.asarray(x).tolist() for x in (call.positions, call.cos_sin, call.slot_mapping)]
    for caches in (call.caches[0], call.caches):
        assert_same(jaxkv.rope_and_cache(*arrays, caches, *rest, rope="neox", layout="PACKED_NHD"), want)
    options = {"rotary_dim": np.int64(8), "eps": np.float32(1e-6), "rope": "neox", "layout": "PACKED_NHD"}
    assert_same(jaxkv.rope_and_cache(*arrays, call.caches, *rest, **options), want)
    options |= {"rotary_dim": jnp.int32(8)}
    assert_same(jaxkv.rope_and_cache(*arrays, call.caches, *rest, **options), want)


def test_a_traced_rotary_dim_is_an_error():
    call = CASES[0].make()
    with pytest.raises(TypeError, match=r"^rotary_dim must be a static int, got a traced value"):
        jax.jit(lambda n: call_jax(call, rotary_dim=n))(8)


# ---- Refs


REFS = ("NHD of all layers", "PACKED_NHD", "MLA, fp8_e4m3", "int4 by token and head, PACKED_NHD")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in REFS], ids=str)
def test_refs(case):
    call = replace(case, slots=None, positions=None, integers="int32").make()
    refs = [jax.new_ref(jnp.asarray(cache)) for cache in call.caches]
    before = [ref.unsafe_buffer_pointer() for ref in refs]
    result = call(jaxkv.rope_and_cache, jnp.asarray, refs)
    assert isinstance(result, tuple)
    assert len(result) == 1
    assert [ref.unsafe_buffer_pointer() for ref in refs] == before
    assert_same([*result, *(ref[...] for ref in refs)], run_oracle(call))


def test_refs_within_jit():
    call = replace(CASES[0], integers="int32").make()

    def step(caches):
        refs = [jax.new_ref(cache) for cache in caches]
        (query,) = call(jaxkv.rope_and_cache, jnp.asarray, refs)
        return [query, *(ref[...] for ref in refs)]

    assert_same(jax.jit(step)(list(map(jnp.asarray, call.caches))), run_oracle(call))


@pytest.mark.parametrize(("count", "error", "text"), [
    (1, TypeError, "key_cache and value_cache must be two jax.Refs or two arrays, got one of each"),
    (2, ValueError, "key_cache and value_cache must not overlap in memory"),
])  # fmt: skip
def test_bad_refs(count, error, text):
    call = CASES[0].make()
    ref = jax.new_ref(jnp.asarray(call.caches[0]))
    caches = [ref, ref if count == 2 else jnp.asarray(call.caches[1])]
    with pytest.raises(error) as caught:
        call(jaxkv.rope_and_cache, jnp.asarray, caches)
    assert str(caught.value) == text
    np.testing.assert_array_equal(bits(np.asarray(ref[...])), bits(call.caches[0]))


# ---- bad calls


def in_arrays(arguments):
    return jaxkv.rope_and_cache(**jax.tree.map(as_jax, arguments))


def in_tracing(arguments):
    arrays = {name: x for name, x in arguments.items() if isinstance(x, (np.ndarray, list)) and name != "mrope_section"}
    rest = {name: x for name, x in arguments.items() if name not in arrays}
    return jax.jit(lambda arrays: jaxkv.rope_and_cache(**arrays, **rest)).trace(arrays)


def in_numpy(arguments):
    return jaxkv.rope_and_cache(**arguments)


def as_jax(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("way", [in_arrays, in_tracing, in_numpy])
@pytest.mark.parametrize(("kind", "changes", "error", "text"), BAD.values(), ids=BAD)
def test_bad_calls(kind, changes, error, text, way):
    arguments = valid(kind) | changes
    with jax.enable_x64(True), pytest.raises(error) as caught:
        way(arguments)
    assert str(caught.value) == (text or "backend must be None, 'triton', 'xla' or 'interpret', got 'cuda'")


@pytest.mark.parametrize("way", [in_arrays, in_tracing, in_numpy])
@pytest.mark.parametrize("kind", ["two arrays", "one array", "scales", "latent"])
def test_what_they_differ_from_is_right(kind, way):
    way(valid(kind))


@pytest.mark.parametrize("convert", [np.asarray, lambda x: x.tolist()], ids=["NumPy", "list"])
@pytest.mark.parametrize(("changes", "text"), BEYOND.values(), ids=BEYOND)
def test_known_positions_beyond_the_table(changes, text, convert):
    arguments = valid() | changes
    arguments["positions"] = convert(arguments["positions"])
    with pytest.raises(ValueError, match=f"^{text}$"):
        in_numpy(arguments)
    in_arrays(valid() | {name: x for name, x in changes.items() if name != "positions"} | {
        "positions": jnp.asarray(np.clip(changes["positions"], -1, 99), jnp.int32)
    })  # fmt: skip


def test_triton_on_a_cpu_is_an_error():
    with pytest.raises(ValueError, match=r"^backend 'triton' needs a CUDA or ROCm device, got cpu$"):
        call_jax(CASES[0].make(), backend="triton")
