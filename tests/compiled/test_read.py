"""H100 programs that write and read a cache, compiled without a GPU: in place, no copy of the cache, no collective."""

import math
import re

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.cache_spec import CacheSpec
from kvcore.layout import CacheLayout
from tests.cases.h100s import h100s

LAYERS, TOKENS, Q_HEADS, HEADS, HEAD_SIZE = 4, 64, 32, 8, 128


def abstract_cache(mesh, layout="NHD", kv_cache_dtype="auto", num_blocks=4096):
    spec = CacheSpec.create(LAYERS, num_blocks, 16, HEADS, HEAD_SIZE, None, "bfloat16", layout, kv_cache_dtype)
    caches = []
    for shape, axes in zip(spec.shapes, spec.layout.arrays, strict=True):
        sharding = NamedSharding(mesh, P(*("tp" if "head" in axis else None for axis in axes)))
        caches.append(jax.ShapeDtypeStruct(shape, spec.dtype, sharding=sharding))
    return jaxkv.PagedKVCache(tuple(caches), spec)


def array(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def decode(cache, query, key, value, slots, tables, lens):
    """Three steps over all layers: each writes and attends."""

    def one_layer(carry, layer):
        cache, query = carry
        cache = cache.write(key, value, slots, layer=layer)
        return (cache, cache.attend(query, tables, lens, layer=layer)), None

    def step(_, carry):
        return lax.scan(one_layer, carry, jnp.arange(LAYERS))[0]

    return lax.fori_loop(0, 3, step, (cache, query))


def arguments(mesh, **options):
    return (
        abstract_cache(mesh, **options),
        array(mesh, (TOKENS, Q_HEADS, HEAD_SIZE), "bfloat16", None, "tp"),
        array(mesh, (TOKENS, HEADS, HEAD_SIZE), "bfloat16", None, "tp"),
        array(mesh, (TOKENS, HEADS, HEAD_SIZE), "bfloat16", None, "tp"),
        array(mesh, (TOKENS,), "int32"),
        array(mesh, (TOKENS, 512), "int32"),
        array(mesh, (TOKENS,), "int32"),
    )


def assert_in_place(compiled, cache, devices):
    cache_bytes = sum(math.prod(c.shape) * jnp.dtype(c.dtype).itemsize for c in cache.caches) // devices
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) >= 2
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes // 50
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("layout", "kv_cache_dtype"), [("NHD", "auto"), ("HND", "auto"), ("INTERLEAVED", "auto"), ("NHD", "fp8")]
)
def test_decode_loop(layout, kv_cache_dtype, devices):
    mesh = h100s(devices)
    args = arguments(mesh, layout=layout, kv_cache_dtype=kv_cache_dtype)
    compiled = jax.jit(decode, donate_argnums=0).lower(*args).compile()
    assert_in_place(compiled, args[0], devices)


@pytest.mark.parametrize("layout", ["HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD", "BLOCK_KV_HND"])
def test_every_layout(layout):
    layout = CacheLayout.of(layout)
    mesh = h100s(1)
    args = arguments(mesh, layout=layout)
    assert_in_place(jax.jit(decode, donate_argnums=0).lower(*args).compile(), args[0], 1)


def test_gather_reads_without_a_copy():
    mesh = h100s(8)
    cache, *_, tables, lens = arguments(mesh)
    compiled = jax.jit(lambda c, t, n: c.gather(t, n, 64, layer=1)).lower(cache, tables, lens).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**20
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())


def test_one_kv_head_for_query_heads_on_many_devices():
    """Multi-query and MLA: the cache is on every device, query heads are split."""
    mesh = h100s(8)
    query = array(mesh, (TOKENS, 128, 576), "bfloat16", None, "tp")
    cache = array(mesh, (4096, 16, 576), "bfloat16")
    tables, lens = array(mesh, (TOKENS, 512), "int32"), array(mesh, (TOKENS,), "int32")

    def attend(query, cache, tables, lens):
        return jaxkv.paged_attention(query, cache, tables, lens, head_size_v=512)

    compiled = jax.jit(attend).lower(query, cache, tables, lens).compile()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    assert compiled.output_shardings.spec == P(None, "tp")


@pytest.mark.parametrize("devices", [1, 8])
def test_slots_of_new_tokens(devices):
    """One kernel, on every device, from what all devices have; and a write that takes what it gives."""
    mesh = h100s(devices)
    cache, _, key, value, _, tables, lens = arguments(mesh)
    starts = array(mesh, (TOKENS + 1,), "int32")

    def step(cache, key, value, tables, starts, lens):
        slots = jaxkv.slot_mapping(tables, starts, lens, 16, TOKENS)
        return cache.write(key, value, slots, layer=1), slots

    compiled = jax.jit(step, donate_argnums=0).lower(cache, key, value, tables, starts, lens).compile()
    assert_in_place(compiled, cache, devices)
    assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", compiled.as_text())) == 2
