"""PagedKVCache: written, read back, carried through JAX's transformations, changed in place in torch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
import torchkv
from kvcore.layout import CONSTANTS
from kvcore.layout import CacheLayout as Layout
from tests.cases.arrays import from_torch, random_normal, to_torch
from tests.cases.torch_ops import attention_arguments, gather_arguments

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, GROUP, HEAD_SIZE = 3, 12, 4, 2, 3, 16
WRITABLE = [name for name in CONSTANTS if not Layout.of(name).latent]


def create(module, **options):
    defaults = dict(
        num_layers=LAYERS, num_blocks=BLOCKS, block_size=BLOCK_SIZE, num_heads=HEADS, head_size=HEAD_SIZE,
        dtype="float32",
    )  # fmt: skip
    return module.PagedKVCache.create(**(defaults | options))


def draws(*shape):
    return random_normal(np.random.default_rng(sum(shape)), shape, "float32")


KEY, VALUE = draws(9, HEADS, HEAD_SIZE), draws(9, HEADS, HEAD_SIZE) + 1
QUERY = draws(2, HEADS * GROUP, HEAD_SIZE)
TABLES = np.array([[7, 2, 9], [4, 11, -1]], np.int32)
LENS = np.array([6, 3], np.int32)
SLOTS = np.array([28, 29, 30, 31, 8, 9, 16, 17, 18])  # 6 tokens of the first sequence, 3 of the second


def expected(layer_seen):
    """What the queries see in the layer that was written, or in another."""
    if not layer_seen:
        return np.zeros_like(QUERY)
    out = np.empty_like(QUERY)
    for seq, (first, stop) in enumerate(((0, 6), (6, 9))):
        for head in range(HEADS * GROUP):
            k, v = KEY[first:stop, head // GROUP], VALUE[first:stop, head // GROUP]
            logits = k @ QUERY[seq, head] * HEAD_SIZE**-0.5
            weights = np.exp(logits - logits.max())
            out[seq, head] = weights / weights.sum() @ v
    return out


@pytest.mark.parametrize("layout", WRITABLE)
def test_written_and_attended(layout):
    ours, theirs = create(jaxkv, layout=layout), create(torchkv, layout=layout)
    ours = ours.write(jnp.asarray(KEY), jnp.asarray(VALUE), jnp.asarray(SLOTS), layer=1)
    assert theirs.write(to_torch(KEY), to_torch(VALUE), to_torch(SLOTS), layer=1) is None
    for layer in (0, 1):
        got = ours.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=layer)
        np.testing.assert_allclose(got, expected(layer == 1), atol=1e-5)
        got = theirs.attend(to_torch(QUERY), to_torch(TABLES), to_torch(LENS), layer=layer)
        np.testing.assert_allclose(got, expected(layer == 1), atol=1e-5)
    for cache, as_array, back in ((ours, jnp.asarray, np.asarray), (theirs, to_torch, from_torch)):
        key, value = cache.gather(as_array(TABLES), as_array(LENS), 7, layer=1)
        np.testing.assert_array_equal(back(key)[0, :6], KEY[:6])
        np.testing.assert_array_equal(back(value)[1, :3], VALUE[6:])
        assert not back(key)[0, 6:].any()
        assert not back(value)[1, 3:].any()


def test_quantised():
    options = dict(kv_cache_dtype="fp8", k_scale=0.05, v_scale=0.1)
    ours, theirs = create(jaxkv, **options), create(torchkv, **options)
    ours = ours.write(jnp.asarray(KEY), jnp.asarray(VALUE), jnp.asarray(SLOTS), layer=2)
    theirs.write(to_torch(KEY), to_torch(VALUE), to_torch(SLOTS), layer=2)
    for a, b in zip(ours.caches, theirs.caches, strict=True):
        assert a.dtype == jnp.uint8
        np.testing.assert_array_equal(a, b)
    got = ours.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=2)
    np.testing.assert_allclose(got, expected(True), atol=0.15)
    same = theirs.attend(to_torch(QUERY), to_torch(TABLES), to_torch(LENS), layer=2)
    np.testing.assert_allclose(got, same, atol=1e-5)


def test_one_layer():
    ours, theirs = create(jaxkv, num_layers=None), create(torchkv, num_layers=None)
    assert ours.caches[0].shape == theirs.caches[0].shape == (BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE)
    ours = ours.write(jnp.asarray(KEY), jnp.asarray(VALUE), jnp.asarray(SLOTS))
    got = ours.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS))
    np.testing.assert_allclose(got, expected(True), atol=1e-5)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
@pytest.mark.parametrize(("key", "value", "error"), [
    ((3, 16), (3, 32), "key must have shape (num_tokens, 32), got (3, 16)"),
    ((3, 32), (3, 32), "value must have shape (num_tokens, 16), got (3, 32)"),
    ((3, 48), (3, 0), "key must have shape (num_tokens, 32), got (3, 48)"),
    ((3, 1, 32), (3, 1, 16), "key must have shape (num_tokens, 32), got (3, 1, 32)"),
])  # fmt: skip
def test_latent_rows_split_in_another_place_are_refused(key, value, error, kv_cache_dtype):
    options = dict(layout="MLA", num_heads=1, head_size=48, head_size_v=32, kv_cache_dtype=kv_cache_dtype)
    for module, convert in ((jaxkv, jnp.asarray), (torchkv, to_torch)):
        with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
            create(module, **options).write(convert(draws(*key)), convert(draws(*value)), convert(SLOTS[:3]), layer=0)


@pytest.mark.parametrize("layout", ["PACKED_NHD", "PACKED_HND"])
def test_packed_rows_split_in_another_place_are_refused(layout):
    for module, convert in ((jaxkv, jnp.asarray), (torchkv, to_torch)):
        cache = create(module, layout=layout, head_size=32, head_size_v=16)
        wide, narrow, slots = convert(draws(3, HEADS, 32)), convert(draws(3, HEADS, 16)), convert(SLOTS[:3])
        for key, value, error in (
            (narrow, wide, r"^key must have shape \(num_tokens, 2, 32\), got \(3, 2, 16\)$"),
            (wide, wide, r"^value must have shape \(num_tokens, 2, 16\), got \(3, 2, 32\)$"),
        ):
            with pytest.raises(ValueError, match=error):
                cache.write(key, value, slots, layer=0)
        error = r"^query must have shape \(num_tokens, num_q_heads, 32\), got \(2, 6, 16\)$"
        with pytest.raises(ValueError, match=error):
            cache.attend(convert(QUERY), convert(TABLES), convert(LENS), layer=0)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_that_fits_no_layer_or_head_is_refused_before_its_first_use(name, shape):
    for module, convert in ((jaxkv, jnp.asarray), (torchkv, to_torch)):
        with pytest.raises(ValueError, match=rf"^{name} must have shape .* got {re.escape(str(shape))}$"):
            create(module, kv_cache_dtype="fp8", **{name: convert(np.ones(shape, np.float32))})
        with pytest.raises(TypeError, match=rf"^{name} must be a number or an array of float32, got 'one'$"):
            create(module, kv_cache_dtype="fp8", **{name: "one"})


@pytest.mark.parametrize("layout", ["MLA", "PACKED_NHD", "HEAD_MAJOR", "NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_description(layout, kv_cache_dtype):
    heads = 1 if layout == "MLA" else 2
    head_size_v = {"MLA": 12, "PACKED_NHD": 8}.get(layout)
    options = dict(layout=layout, kv_cache_dtype=kv_cache_dtype, num_heads=heads, head_size_v=head_size_v)
    ours, theirs = create(jaxkv, **options), create(torchkv, **options)
    assert ours.spec == theirs.spec
    assert [c.shape for c in ours.caches] == [tuple(c.shape) for c in theirs.caches]
    assert ours.nbytes == sum(c.nbytes for c in ours.caches) == theirs.nbytes == sum(c.nbytes for c in theirs.caches)


def test_repr():
    options = dict(num_blocks=1024, block_size=16, num_heads=8, head_size=128, dtype="bfloat16")
    assert repr(create(jaxkv, **options)) == (
        "PagedKVCache(3 layers × 1024 blocks × 16 slots, 8 heads × 128, bfloat16, 'layer block slot head dim', "
        "192.0 MiB)"
    )
    packed = dict(layout="PACKED_NHD", head_size_v=8, kv_cache_dtype="fp8_e5m2", num_layers=None)
    assert repr(create(torchkv, **packed)) == (
        "PagedKVCache(12 blocks × 4 slots, 2 heads × 16/8, fp8_e5m2 in uint8, 'block slot head k+v', 2.2 KiB, cpu)"
    )


# ---- JAX


def step(cache, query):
    """Two layers, each written and attended, in a scan over the layer's index."""

    def one_layer(cache, layer):
        cache = cache.write(jnp.asarray(KEY), jnp.asarray(VALUE), jnp.asarray(SLOTS), layer=layer)
        return cache, cache.attend(query, jnp.asarray(TABLES), jnp.asarray(LENS), layer=layer)

    return lax.scan(one_layer, cache, jnp.arange(2))


def test_donated_scanned_and_returned():
    cache = create(jaxkv, num_blocks=512)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, jnp.asarray(QUERY)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes // 2
    new, out = compiled(cache, jnp.asarray(QUERY))
    assert cache.caches[0].is_deleted()
    assert isinstance(new, jaxkv.PagedKVCache)
    assert new.spec == cache.spec
    np.testing.assert_allclose(out, np.stack([expected(True)] * 2), atol=1e-5)
    assert new.caches[0][:2].any()
    assert not new.caches[0][2].any()


def test_a_pytree():
    cache = create(jaxkv, kv_cache_dtype="fp8", k_scale=0.5)
    leaves, tree = jax.tree.flatten(cache)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, leaves)
    assert again.spec == cache.spec
    assert again.caches == cache.caches
    assert jax.eval_shape(lambda c: c, cache).spec == cache.spec


def test_vmap():
    caches = jax.tree.map(lambda a: jnp.stack([a, a]), create(jaxkv))
    keys = jnp.stack([KEY, KEY * 2])

    def one(cache, key):
        cache = cache.write(key, jnp.asarray(VALUE), jnp.asarray(SLOTS), layer=0)
        return cache.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=0)

    out = jax.vmap(one)(caches, keys)
    np.testing.assert_allclose(out[0], expected(True), atol=1e-5)
    cache = create(jaxkv).write(keys[1], jnp.asarray(VALUE), jnp.asarray(SLOTS), layer=0)
    want = cache.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=0)
    np.testing.assert_allclose(out[1], want, atol=1e-6)
    queries = jnp.stack([QUERY, QUERY * 3])  # one cache for all
    out = jax.vmap(lambda q: cache.attend(q, jnp.asarray(TABLES), jnp.asarray(LENS), layer=0))(queries)
    np.testing.assert_allclose(out[0], want, atol=1e-6)


@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED", "PACKED_NHD"])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_heads_over_devices(layout, kind):
    axis_type = jax.sharding.AxisType.Auto if kind == "auto" else jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(axis_type,))
    spec = Layout.of(layout).with_layer().arrays[0]
    sharding = NamedSharding(mesh, P(*("tp" if "head" in axis else None for axis in spec)))
    with jax.set_mesh(mesh):
        cache = create(jaxkv, layout=layout, sharding=sharding)
        rows = NamedSharding(mesh, P(None, "tp", None))
        key, value, query = (jax.device_put(x, rows) for x in (KEY, VALUE, QUERY))
        tables, lens, slots = (jax.device_put(x, NamedSharding(mesh, P())) for x in (TABLES, LENS, SLOTS))

        def run(cache, key, value, query, tables, lens, slots):
            cache = cache.write(key, value, slots, layer=1)
            out = cache.attend(query, tables, lens, layer=1, sinks=None)
            return cache, out, cache.gather(tables, lens, 7, layer=1)[0]

        compiled = jax.jit(run, donate_argnums=0).lower(cache, key, value, query, tables, lens, slots).compile()
        text = compiled.as_text()
        assert "all-gather" not in text
        assert "all-reduce" not in text
        cache, out, keys = compiled(cache, key, value, query, tables, lens, slots)
    np.testing.assert_allclose(out, expected(True), atol=1e-5)
    np.testing.assert_array_equal(keys[0, :6], KEY[:6])
    assert out.sharding.spec[1] == "tp"
    assert keys.sharding.spec[2] == "tp"


def test_query_heads_over_devices_that_share_one_kv_head():
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    cache = create(jaxkv, num_heads=1, sharding=NamedSharding(mesh, P()))
    query = jax.device_put(QUERY, NamedSharding(mesh, P(None, "tp")))
    tables, lens, slots = (jax.device_put(x, NamedSharding(mesh, P())) for x in (TABLES, LENS, SLOTS))
    key, value = (jax.device_put(x[:, :1], NamedSharding(mesh, P())) for x in (KEY, VALUE))
    cache = cache.write(key, value, slots, layer=0)
    compiled = jax.jit(lambda c, q, t, n: c.attend(q, t, n, layer=0)).lower(cache, query, tables, lens).compile()
    assert "all-gather" not in compiled.as_text()
    out = compiled(cache, query, tables, lens)
    alone = create(jaxkv, num_heads=1).write(
        jnp.asarray(KEY[:, :1]), jnp.asarray(VALUE[:, :1]), jnp.asarray(SLOTS), layer=0
    )
    want = alone.attend(jnp.asarray(QUERY), jnp.asarray(TABLES), jnp.asarray(LENS), layer=0)
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_refs():
    shape = (BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE)
    refs = jax.new_ref(jnp.zeros(shape)), jax.new_ref(jnp.zeros(shape))
    jaxkv.reshape_and_cache_flash(jnp.asarray(KEY), jnp.asarray(VALUE), *refs, jnp.asarray(SLOTS))
    out = jaxkv.paged_attention(jnp.asarray(QUERY), refs, jnp.asarray(TABLES), jnp.asarray(LENS))
    np.testing.assert_allclose(out, expected(True), atol=1e-5)


# ---- torch


def test_changed_in_place():
    cache = create(torchkv)
    before = [c.data_ptr() for c in cache.caches]
    cache.write(to_torch(KEY), to_torch(VALUE), to_torch(SLOTS), layer=0)
    assert [c.data_ptr() for c in cache.caches] == before
    assert cache.caches[0][0].count_nonzero() == KEY.size


def test_strided_query():
    """A slice of a fused projection is read as it lies."""
    cache = create(torchkv)
    cache.write(to_torch(KEY), to_torch(VALUE), to_torch(SLOTS), layer=0)
    fused = torch.full((2, HEADS * GROUP + 5, HEAD_SIZE), torch.nan)
    query = fused[:, 2 : 2 + HEADS * GROUP]
    query.copy_(to_torch(QUERY))
    for backend in ("torch", "interpret"):
        out = cache.attend(query, to_torch(TABLES), to_torch(LENS), layer=0, backend=backend)
        np.testing.assert_allclose(out, expected(True), atol=1e-5)


def test_compiled():
    cache = create(torchkv)
    value, slots, layer, tables, lens = map(to_torch, (VALUE, SLOTS, np.array(0), TABLES, LENS))

    def run(query, key):
        cache.write(key, value, slots, layer=layer)
        return cache.attend(query * 1, tables, lens, layer=0)

    run = torch.compile(run, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(run(to_torch(QUERY), to_torch(KEY)), expected(True), atol=1e-5)


def test_opcheck():
    caches = [torch.randn(6, 4, 2, 16) for _ in range(2)]
    query, tables = torch.randn(2, 4, 16), torch.tensor([[0, 1], [2, 3]])
    lens = torch.tensor([5, 8])
    torch.library.opcheck(torch.ops.torchkv.paged_attention, attention_arguments(query, caches, tables, lens))
    torch.library.opcheck(torch.ops.torchkv.gather_kv, gather_arguments(caches, tables, lens, 7))


def test_torch_vmap():
    cache = create(torchkv)
    cache.write(to_torch(KEY), to_torch(VALUE), to_torch(SLOTS), layer=0)
    queries = torch.stack([to_torch(QUERY), to_torch(QUERY) * 2])
    out = torch.vmap(lambda q: cache.attend(q, to_torch(TABLES), to_torch(LENS), layer=0))(queries)
    np.testing.assert_allclose(out[0], expected(True), atol=1e-5)
