"""Every op without and with JAX's 64-bit types, in every form of its indices. conftest.py forbids promotion, too."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.oracle import read as reference_attention
from kvcore.oracle import write as reference
from tests.cases.arrays import DTYPES, bits, make_case, run_jax, run_oracle
from tests.cases.reads import BOUNDS, make_read, oracle

pytestmark = pytest.mark.x64


def assert_same(got, want):
    for g, w in zip(got if isinstance(got, (tuple, list)) else (got,), want, strict=True):
        assert np.asarray(g).dtype == w.dtype
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(w))


def assert_near(got, lse, case):
    want, want_lse = oracle(case)
    assert got.dtype == case.query.dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=4 * BOUNDS[case.query.dtype.name])
    np.testing.assert_allclose(np.asarray(lse), want_lse, rtol=1e-3)


def narrow(x):
    return jnp.asarray(x, jnp.int32)


def wide(x):
    """Indices in the widest dtype that JAX has now."""
    return jnp.asarray(x, jnp.int64 if jax.config.jax_enable_x64 else jnp.int32)


@pytest.mark.parametrize(("kv_cache_dtype", "scales"), [
    ("auto", (None, None)), ("fp8", (0.5, 0.25)), ("fp8", "head"), ("int8", (None, None)), ("int4", "head"),
    ("nvfp4", (None, None)), ("nvfp4", "head"),
])  # fmt: skip
def test_writes(kv_cache_dtype, scales):
    case = make_case(
        np.random.default_rng(0), kv_cache_dtype=kv_cache_dtype, head_size=48, scales=scales, dtype="float16",
        num_layers=2, layer=1, slots=[2, -1, 5, 39, 40, 2**31 - 1, -(2**31)],
    )  # fmt: skip
    memory = list(map(jnp.asarray, case.memory))
    scales = [s if s is None or isinstance(s, float) else jnp.asarray(s) for s in (case.k_scale, case.v_scale)]
    args = (jnp.asarray(case.key), jnp.asarray(case.value), *memory)

    def write(layer, *x):
        return jaxkv.reshape_and_cache_flash(*x, kv_cache_dtype, *scales, layout=case.layout, layer=layer)

    want = run_oracle(case)
    assert_same(write(1, *args, wide(case.slot_mapping)), want)
    assert_same(jax.jit(write)(wide(1), *args, narrow(case.slot_mapping)), want)


@pytest.mark.parametrize(("kv_cache_dtype", "layout"), [("fp8", "NHD"), ("int4", "PACKED_NHD")])
def test_writes_with_a_scale_for_each_token_and_head(kv_cache_dtype, layout):
    case = make_case(np.random.default_rng(1), kv_cache_dtype=kv_cache_dtype, layout=layout, per_token_head=True)
    assert_same(run_jax(case), run_oracle(case))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "nvfp4", "fp8_ds_mla"])
def test_writes_of_latent_rows(kv_cache_dtype):
    rng = np.random.default_rng(2)
    kv_c, k_pe = (rng.standard_normal((3, n)).astype(np.float32) for n in (512, 64))
    row = {"auto": 576, "fp8": 576, "nvfp4": 324, "fp8_ds_mla": 656}[kv_cache_dtype]
    cache = rng.integers(0, 255, (2, 4, row)).astype(np.float32 if kv_cache_dtype == "auto" else np.uint8)
    slots = np.array([7, -1, 2])
    want = cache.copy()
    reference.concat_and_cache_mla(kv_c, k_pe, want, slots, kv_cache_dtype)
    got = jaxkv.concat_and_cache_mla(
        jnp.asarray(kv_c), jnp.asarray(k_pe), jnp.asarray(cache), wide(slots), kv_cache_dtype
    )
    assert_same(got, [want])


@pytest.mark.parametrize(("tables", "lengths"), [(narrow, wide), (wide, narrow), (wide, wide)])
@pytest.mark.parametrize("options", [
    {"dtype": "bfloat16"}, {"query_lens": (1, 0, 3, 2), "sliding_window": 4, "soft_cap": 2.0, "padding": 1},
])  # fmt: skip
def test_attention_with_tables_and_lengths_of_either_dtype(options, tables, lengths):
    rng = np.random.default_rng(3)
    case = make_read(rng, **options)
    case.options["sinks"] = rng.standard_normal(4).astype(np.float32)
    starts = None if case.query_start_loc is None else tables(case.query_start_loc)
    rest = {n: v for n, v in case.options.items() if n != "sinks"}

    def attend(query, caches, block_tables, seq_lens, starts, sinks):
        return jaxkv.paged_attention(
            query, caches, block_tables, seq_lens, query_start_loc=starts, sinks=sinks, return_lse=True, **rest
        )

    args = (
        jnp.asarray(case.query), tuple(map(jnp.asarray, case.caches)), tables(case.block_tables),
        lengths(case.seq_lens), starts, jnp.asarray(case.options["sinks"]),
    )  # fmt: skip
    assert_near(*attend(*args), case)
    assert_near(*jax.jit(attend)(*args), case)


@pytest.mark.parametrize(("kv_cache_dtype", "granularity"), [
    ("fp8", "tensor"), ("int8", "token_head"), ("int4", "head"), ("nvfp4", "head"),
])  # fmt: skip
def test_attention_and_gather_over_quantised_caches(kv_cache_dtype, granularity):
    case = make_read(
        np.random.default_rng(4), dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, granularity=granularity,
        num_layers=2, layer=1,
    )  # fmt: skip
    more = {n: jnp.asarray(v) for n, v in case.options.items() if isinstance(v, np.ndarray)} | {"layer": wide(1)}
    args = (jnp.asarray(case.query), tuple(map(jnp.asarray, case.caches)), case.block_tables, case.seq_lens)
    assert_near(*jaxkv.paged_attention(*args, return_lse=True, **(case.options | more)), case)
    names = ("kv_cache_dtype", "k_scale", "v_scale", "layout", "scale_layout", "layer")
    options = {n: v for n, v in case.options.items() if n in names}
    want = gathered(case, 23, "bfloat16")
    assert_same(jaxkv.gather_kv(*args[1:], 23, **(options | {n: v for n, v in more.items() if n in names})), want)


def gathered(case, max_len, dtype="float32"):
    names = ("kv_cache_dtype", "k_scale", "v_scale", "layout", "scale_layout", "layer")
    options = {n: v for n, v in case.options.items() if n in names}
    return reference_attention.gather_kv(
        case.caches, case.block_tables, case.seq_lens, max_len, dtype=DTYPES[dtype], head_size=case.query.shape[2],
        **options,
    )  # fmt: skip


def test_tables_and_lengths_that_int32_cannot_hold_stay_outside(x64):
    case = make_read(np.random.default_rng(5), seq_lens=(3, 9))
    tables, lens = case.block_tables.astype(np.int64), case.seq_lens.astype(np.int64)
    tables[0, 0] += 2**32
    case.block_tables[0, 0] = -1
    convert = jnp.asarray if x64 else np.asarray  # which JAX would wrap
    args = (jnp.asarray(case.query), tuple(map(jnp.asarray, case.caches)), convert(tables), convert(lens))
    assert_near(*jaxkv.paged_attention(*args, return_lse=True), case)
    want = gathered(case, 9)
    assert_same(jaxkv.gather_kv(*args[1:], 9), want)


@pytest.mark.parametrize(("slots", "layer"), [(narrow, wide), (wide, narrow)])
@pytest.mark.parametrize(("layout", "num_layers"), [
    ("NHD", None), ("KV_NHD", None), ("NHD", 2), ("block layer slot head dim", 2),
])  # fmt: skip
def test_vmap_of_writes(layout, num_layers, slots, layer):
    cases = [
        make_case(
            np.random.default_rng(i), layout=layout, num_layers=num_layers, layer=num_layers and i % 2,
            kv_cache_dtype="fp8", head_size=32, scales=(0.5, 0.5), num_heads=1,
        )
        for i in range(3)
    ]  # fmt: skip
    memory = tuple(jnp.stack([jnp.asarray(x) for x in xs]) for xs in zip(*(c.memory for c in cases), strict=True))
    key, value, slot_mapping = (
        np.stack([getattr(c, name) for c in cases]) for name in ("key", "value", "slot_mapping")
    )
    layers = None if num_layers is None else layer([c.layer for c in cases])

    def write(key, value, memory, slots, layer):
        return cases[0].op(jaxkv)(key, value, *memory, slots, "fp8", 0.5, 0.5, layout=cases[0].layout, layer=layer)

    got = jax.vmap(write)(jnp.asarray(key), jnp.asarray(value), memory, slots(slot_mapping), layers)
    assert_same(got, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


def test_vmap_of_reads():
    reads = [make_read(np.random.default_rng(i)) for i in range(2)]
    query, tables, lens = (np.stack([getattr(r, n) for r in reads]) for n in ("query", "block_tables", "seq_lens"))
    tables, lens = wide(tables), narrow(lens)
    caches = tuple(jnp.stack([jnp.asarray(r.caches[i]) for r in reads]) for i in range(2))
    out, lse = jax.vmap(lambda q, c, t, n: jaxkv.paged_attention(q, c, t, n, return_lse=True))(
        jnp.asarray(query), caches, tables, lens
    )
    for i, read in enumerate(reads):
        assert_near(out[i], lse[i], read)
    key, value = jax.vmap(lambda c, t, n: jaxkv.gather_kv(c, t, n, 20))(caches, tables, lens)
    for i, read in enumerate(reads):
        assert_same((key[i], value[i]), gathered(read, 20))


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "nvfp4"])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_static_scales(kv_cache_dtype, granularity):
    key = np.random.default_rng(6).standard_normal((5, 2, 32)).astype(np.float32)
    want = reference.kv_scales(key, key, kv_cache_dtype, granularity)
    assert_same(jaxkv.kv_scales(jnp.asarray(key), key, kv_cache_dtype, granularity), want)


def test_merged_parts():
    case = make_read(np.random.default_rng(7), seq_lens=(0, 1, 16, 19))
    args = (jnp.asarray(case.query), tuple(map(jnp.asarray, case.caches)))
    parts = []
    for first, last in ((0, 2), (2, 9)):
        lens = np.clip(case.seq_lens - first * 4, 0, (last - first) * 4)
        tables = case.block_tables[:, first:last]
        parts.append(jaxkv.paged_attention(*args, tables, lens, causal=False, return_lse=True))
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    assert_near(*jaxkv.merge_attention(outs, lses), replace(case, options=case.options | {"causal": False}))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_heads_over_devices(kind):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(kind,))
    heads, rows = NamedSharding(mesh, P(None, None, "tp", None)), NamedSharding(mesh, P(None, "tp", None))
    case = make_case(np.random.default_rng(9), num_heads=2, head_size=16, dtype="float32")
    read = make_read(np.random.default_rng(9))
    with jax.set_mesh(mesh):
        put = lambda x, where: jax.device_put(jnp.asarray(x), where)  # noqa: E731
        caches = [put(c, heads) for c in case.caches]
        new = jaxkv.reshape_and_cache_flash(
            put(case.key, rows), put(case.value, rows), *caches, wide(case.slot_mapping)
        )
        assert_same(new, run_oracle(case))
        out, lse = jaxkv.paged_attention(
            put(read.query, rows), tuple(put(c, heads) for c in read.caches), wide(read.block_tables),
            narrow(read.seq_lens), return_lse=True,
        )  # fmt: skip
    assert_near(out, lse, read)


def test_kernels_in_the_interpreter():
    case = make_case(np.random.default_rng(10), kv_cache_dtype="nvfp4", scales=(None, None), head_size=16)
    assert_same(run_jax(case, "interpret"), run_oracle(case))
    read = make_read(np.random.default_rng(10), num_layers=2, layer=1, query_lens=(0, 1, 2, 3))
    args = (jnp.asarray(read.query), tuple(map(jnp.asarray, read.caches)), wide(read.block_tables))
    options = read.options | {"layer": wide(1), "backend": "interpret"}
    out, lse = jaxkv.paged_attention(
        *args, narrow(read.seq_lens), query_start_loc=wide(read.query_start_loc), return_lse=True, **options
    )
    assert_near(out, lse, read)
    assert_same(jaxkv.gather_kv(*args[1:], narrow(read.seq_lens), 5, **options), gathered(read, 5))


@pytest.mark.parametrize("options", [
    dict(kv_cache_dtype="nvfp4"), dict(kv_cache_dtype="int8", per_token_head=True), dict(k_scale=0.5, v_scale=2),
    dict(layout="PACKED_NHD", head_size_v=16), dict(layout="MLA", num_heads=1, head_size_v=16),
])  # fmt: skip
def test_a_cache_written_attended_and_gathered(options):
    sizes = dict(num_blocks=6, block_size=4, num_heads=2, head_size=32, num_layers=2, dtype=jnp.float32)
    cache = jaxkv.PagedKVCache.create(**(sizes | options))
    rng = np.random.default_rng(8)
    heads, size_v = cache.spec.num_heads, cache.spec.head_size_v
    key, value = (rng.standard_normal((5, heads, n)).astype(np.float32) for n in (32, size_v))
    rows = (key[:, 0, :size_v], key[:, 0, size_v:]) if cache.spec.layout.latent else (key, value)
    tables, lens, slots = jnp.array([[3, 1]]), jnp.array([5]), jnp.array([12, 13, 14, 15, 4])
    cache = cache.write(*map(jnp.asarray, rows), slots, layer=1)
    k, v = cache.gather(tables, lens, 5, layer=jnp.array(1), dtype="float32")
    bound = {"auto": 1e-6, "int8": 0.05, "nvfp4": 0.7}[cache.spec.kv_cache_dtype]
    np.testing.assert_allclose(k[0], key, rtol=0, atol=bound)
    np.testing.assert_allclose(v[0], key[..., :size_v] if cache.spec.layout.latent else value, rtol=0, atol=bound)
    query = jnp.asarray(rng.standard_normal((1, 2 * heads, 32)), jnp.float32)
    out = cache.attend(query, tables, lens, layer=1)
    keys, values = (np.repeat(np.asarray(x[0], np.float64), 2, axis=1) for x in (k, v))
    logits = np.einsum("hd,nhd->hn", np.asarray(query[0], np.float64), keys) / 32**0.5
    weights = np.exp(logits - logits.max(1, keepdims=True))
    want = np.einsum("hn,nhd->hd", weights / weights.sum(1, keepdims=True), values)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[0], want, rtol=0, atol=1e-4)
