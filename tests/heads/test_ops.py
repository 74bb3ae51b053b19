"""Every op with views of heads does, bit for bit, what it does with arrays of their own."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.cases.arrays import bits, make_case, random_bits, random_normal, run_oracle
from tests.cases.heads import KINDS, attend_view, columns_of, view_of, write_views
from tests.cases.reads import attend_jax, make_read

BACKENDS = pytest.mark.parametrize("backend", ["xla", "interpret"])


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(g), bits(np.asarray(w)))


# ---- writes

WRITES = {
    "copy": {},
    "cast": dict(cache_dtype="float16"),
    "fp8": dict(kv_cache_dtype="fp8", bits=False),
    "fp8 by head": dict(kv_cache_dtype="fp8", scales="head", bits=False),
    "int4": dict(kv_cache_dtype="int4", bits=False),
    "nvfp4": dict(kv_cache_dtype="nvfp4", bits=False),
    "token and head": dict(kv_cache_dtype="int8", per_token_head=True, bits=False),
    "diffkv": dict(layout="PACKED_NHD", head_size_v=16),
    "diffkv, token and head": dict(
        layout="PACKED_HND", head_size_v=16, kv_cache_dtype="fp8", per_token_head=True, bits=False
    ),
    "head-major": dict(layout="HEAD_MAJOR"),
    "layer": dict(layout="HND", num_layers=2, layer=1),
    "fp8 inputs": dict(dtype="float8_e4m3fn", cache_dtype="float8_e4m3fn"),
}


GRID = [*product(WRITES, ["two of a group"], ["interpret"]), *product(["copy", "token and head"], KINDS, ["interpret"])]
GRID += [*product(["copy"], KINDS, ["xla"]), *product(["fp8 by head", "diffkv"], ["flat"], ["xla", "interpret"])]


@pytest.mark.parametrize(("options", "kind", "backend"), sorted(set(GRID)))
def test_writes(options, kind, backend):
    more = dict(num_heads=4, head_size=32, slots=[3, -1, 39, 8, 40, 17]) | WRITES[options]
    case = make_case(np.random.default_rng(len(options)), **more)
    assert_same(write_views(case, kind, backend=backend), run_oracle(case))


@pytest.mark.parametrize("kinds", [("heads", "two of a group"), ("flat", "one of a group"), ("one group", "heads")])
@pytest.mark.parametrize("options", ["copy", "token and head"])
def test_writes_of_two_kinds(options, kinds):
    case = make_case(np.random.default_rng(1), num_heads=4, head_size=24, **WRITES[options])
    assert_same(write_views(case, *kinds, backend="interpret"), run_oracle(case))


@BACKENDS
def test_one_is_a_view_and_the_other_an_array(backend):
    case = make_case(np.random.default_rng(2))
    key_cache, value_cache = case.caches
    slots = case.slot_mapping.astype(np.int32)
    new = jaxkv.reshape_and_cache_flash(
        view_of(case.key, "heads"), case.value, key_cache, value_cache, slots, backend=backend
    )
    assert_same(new, run_oracle(case))


@BACKENDS
def test_views_of_one_projection(backend):
    case = make_case(np.random.default_rng(3), num_heads=4, head_size=16)
    projection = jnp.asarray(np.concatenate([case.key, case.value], axis=1))
    new = jaxkv.reshape_and_cache_flash(
        jaxkv.heads(projection, 0, 4), jaxkv.heads(projection, 4, 8), *case.caches,
        case.slot_mapping.astype(np.int32), backend=backend,
    )  # fmt: skip
    assert_same(new, run_oracle(case))


@BACKENDS
def test_fewer_slots_than_tokens(backend):
    case = make_case(np.random.default_rng(4), num_heads=4, slots=[5, 6, 7])
    assert case.key.shape[0] > 3
    assert_same(write_views(case, "two of a group", backend=backend), run_oracle(case))


@BACKENDS
@pytest.mark.parametrize(("kv_cache_dtype", "rank", "rope", "units"), [
    ("auto", 24, 8, 32), ("auto", 32, 0, 32), ("fp8", 24, 8, 32), ("int4", 48, 16, 32), ("nvfp4", 32, 32, 36),
    ("nvfp4", 64, 0, 36), ("fp8_ds_mla", 512, 64, 656), ("fp8_ds_mla", 512, 0, 656),
])  # fmt: skip
def test_rows_of_mla(kv_cache_dtype, rank, rope, units, backend):
    rng = np.random.default_rng(5)
    kv_c, k_pe = (random_normal(rng, (4, columns), "bfloat16") for columns in (rank, rope))
    cache = random_bits(rng, (3, 4, units), "bfloat16" if kv_cache_dtype == "auto" else "uint8")
    slots = np.array([9, -1, 3, 4], np.int32)

    def write(kv_c, k_pe):
        return jaxkv.concat_and_cache_mla(kv_c, k_pe, cache, slots, kv_cache_dtype, backend=backend)

    want = write(kv_c, k_pe)
    assert (bits(np.asarray(want)) != bits(cache)).any()
    assert_same([write(columns_of(kv_c), columns_of(k_pe, 1))], [want])
    both = jnp.asarray(np.concatenate([kv_c, k_pe], axis=1))
    assert_same([write(jaxkv.heads(both, 0, rank), jaxkv.heads(both, rank, rank + rope))], [want])


def test_static_scales():
    key, value = (random_normal(np.random.default_rng(n), (5, 4, 16), "float32") for n in (6, 7))
    for kind in KINDS:
        got = jaxkv.kv_scales(view_of(key, kind), view_of(value, kind), "int8", "head")
        assert_same(got, jaxkv.kv_scales(key, value, "int8", "head"))


# ---- attention

READS = {
    "decode": dict(seq_lens=(1, 5, 19)),
    "ragged": dict(seq_lens=(9, 1, 20), query_lens=(7, 0, 3), padding=2),
    "split": dict(seq_lens=(300, 1), block_size=16, num_heads=2),
    "fp8": dict(kv_cache_dtype="fp8"),
    "mla": dict(layout="MLA", group=4, head_size=48),
    "fp8_ds_mla": dict(layout="MLA", kv_cache_dtype="fp8_ds_mla", head_size=576, head_size_v=512, seq_lens=(6,)),
}


GRID = [*product(READS, ["heads", "two of a group"], ["interpret"]), *product(["decode"], KINDS, ["xla", "interpret"])]


@pytest.mark.parametrize(("options", "kind", "backend"), sorted(set(GRID)))
def test_attention(options, kind, backend):
    case = make_read(np.random.default_rng(8), **{"dtype": "bfloat16", **READS[options]})
    assert_same(attend_view(case, kind, backend=backend), attend_jax(case, backend))


# ---- PagedKVCache


@BACKENDS
@pytest.mark.parametrize(("layout", "sizes", "kind"), [
    ("NHD", {}, "one of a group"), ("PACKED_NHD", {"head_size_v": 16}, "flat"),
])  # fmt: skip
def test_a_cache(layout, sizes, kind, backend):
    rng = np.random.default_rng(9)
    cache = jaxkv.PagedKVCache.create(
        num_blocks=3, block_size=4, num_heads=2, head_size=32, dtype="float32", layout=layout, num_layers=2, **sizes
    )
    key, value = (random_normal(rng, (3, 2, n), "float32") for n in (32, cache.head_size_v))
    query, slots = random_normal(rng, (1, 4, 32), "float32"), np.array([0, 1, 2], np.int32)
    tables, lens = np.array([[0]], np.int32), np.array([3], np.int32)

    def step(query, key, value):
        new = cache.write(key, value, slots, layer=1, backend=backend)
        return *new.caches, new.attend(query, tables, lens, layer=1, backend=backend)

    assert_same(step(*(view_of(rows, kind) for rows in (query, key, value))), step(query, key, value))


@BACKENDS
def test_a_cache_of_mla(backend):
    rng = np.random.default_rng(10)
    cache = jaxkv.PagedKVCache.create(
        num_blocks=3, block_size=4, num_heads=1, head_size=48, head_size_v=32, dtype="float32", layout="MLA"
    )
    kv_c, k_pe = (random_normal(rng, (3, n), "float32") for n in (32, 16))
    slots = np.array([5, 11, -1], np.int32)
    want = cache.write(kv_c, k_pe, slots, backend=backend).caches
    assert (np.asarray(want) != 0).any()
    assert_same(cache.write(columns_of(kv_c), columns_of(k_pe), slots, backend=backend).caches, want)


def test_views_of_other_arrays():
    """Of NumPy's arrays, lists and Refs; and where no op reads views, they are arrays."""
    rows = random_normal(np.random.default_rng(11), (3, 2, 16), "float32")
    caches, slots = np.ones((2, 3, 4, 1, 16), np.float32), np.array([1, 2, 9], np.int32)
    want = jaxkv.reshape_and_cache_flash(rows[:, :1], rows[:, 1:], *caches, slots)
    for array in (rows, rows.tolist(), jax.new_ref(jnp.asarray(rows))):
        key, value = jaxkv.heads(array, 0, 1), jaxkv.heads(array, np.int64(1), 2)
        assert_same(jaxkv.reshape_and_cache_flash(key, value, *caches, slots), want)
    sinks = jaxkv.heads(jnp.asarray(rows[0]), 1, 3)  # no argument that may be a view: an array of two axes
    with pytest.raises(ValueError, match=r"^sinks must have shape \(2,\), got \(2, 2\)$"):
        jaxkv.paged_attention(rows, tuple(caches), np.zeros((3, 1), np.int32), slots, sinks=sinks)


def test_the_interpreter_reads_the_array_itself(monkeypatch):
    """The kernel gets the whole array, not a slice of it."""
    from jaxkv._triton import interpret

    given = []
    launch = interpret.launch

    def launching(kernel, grid, arguments, target, out_type=()):
        given.append([a.shape for a in arguments if isinstance(a, np.ndarray)])
        return launch(kernel, grid, arguments, target, out_type)

    monkeypatch.setattr(interpret, "launch", launching)
    case = make_case(np.random.default_rng(12), num_heads=4, head_size=16)
    for kind in ("heads", "flat", "two of a group"):
        write_views(case, kind, backend="interpret")
        assert given.pop()[:2] == [view_of(case.key, kind).array.shape] * 2
    case = make_read(np.random.default_rng(13))
    attend_view(case, "heads", backend="interpret")
    assert given.pop()[0] == view_of(case.query, "heads").array.shape


def test_a_gpu_is_given_the_array_itself(monkeypatch):
    """Lowered for CUDA, nothing is sliced, reshaped or copied before the kernels, and fp8 is seen as bytes."""
    from jaxkv._triton.launch import jt

    given = []

    def triton_call(*arguments, out_type, **_):
        given.append([(a.shape, a.dtype) for a in arguments if hasattr(a, "shape")])
        return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), out_type)

    monkeypatch.setattr(jt, "triton_call", triton_call)
    cache, slots = jnp.ones((4, 4, 2, 16), "bfloat16"), jnp.arange(3)

    def step(projection, kv_c):
        q, k, v = (jaxkv.heads(projection, *part) for part in ((0, 3), (3, 4), (4, 5)))
        caches = jaxkv.reshape_and_cache_flash(k, v, cache, cache, slots)
        latent = jaxkv.concat_and_cache_mla(
            jaxkv.heads(kv_c, 0, 24), jaxkv.heads(kv_c, 24, 32), cache.reshape(4, 4, 32), slots
        )
        return caches, latent, jaxkv.paged_attention(q, caches, jnp.zeros((3, 2), "int32"), slots)

    arrays = jnp.ones((3, 2, 5, 16), "bfloat16"), jnp.ones((3, 32), "bfloat16")
    text = jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    projection, kv_c = (((3, 2, 5, 16), "bfloat16"), ((3, 32), "bfloat16"))
    assert [arguments[0] for arguments in given] == [projection, kv_c, projection]
    assert [arguments[1] for arguments in given[:2]] == [projection, kv_c]
    assert "stablehlo.slice" not in text
    fp8 = jnp.ones((3, 4, 16), "float8_e4m3fn")
    write = jax.jit(lambda kv: jaxkv.reshape_and_cache_flash(
        jaxkv.heads(kv, 0, 2), jaxkv.heads(kv, 2, 4), *jnp.ones((2, 4, 4, 2, 16), "float8_e4m3fn"), slots
    ))  # fmt: skip
    write.trace(fp8).lower(lowering_platforms=("cuda",))
    assert given[-1][:2] == [((3, 4, 16), "uint8")] * 2
