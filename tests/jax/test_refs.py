"""Caches in Refs that are read outside jit: where they are, since to read a Ref there is to copy it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import jaxkv

KEY = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 16), np.float32))
SLOTS, TABLES, LENS = jnp.array([4, 5, 6, 9]), jnp.array([[1, 2], [2, -1]]), jnp.array([6, 2])
FORMATS = {
    "float": {},
    "static scales": {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": [0.5, 2.0]},
    "scale caches": {"kv_cache_dtype": "int8", "per_token_head": True},
    "layers": {"num_layers": 2},
}
READS = {
    "attention": lambda caches, **options: jaxkv.paged_attention(KEY[:2], caches, TABLES, LENS, **options),
    "gather": lambda caches, **options: jaxkv.gather_kv(caches, TABLES, LENS, 5, **options),
    "slots": lambda caches, **options: jaxkv.gather_slots(caches, SLOTS, **options),
}


@pytest.fixture
def copies(monkeypatch):
    """Shapes of the Refs that were read outside jit."""
    found, read = [], jax.Ref.__getitem__

    def getitem(self, index):
        if not isinstance(self, Tracer):
            found.append(self.shape)
        return read(self, index)

    monkeypatch.setattr(jax.Ref, "__getitem__", getitem)
    return found


def make(**options):
    sizes = dict(num_blocks=3, block_size=4, num_heads=2, head_size=16, dtype="float32")
    cache = jaxkv.PagedKVCache.create(**sizes, **options)
    return cache.write(KEY, KEY + 1, SLOTS, layer=None if cache.num_layers is None else 1)


def options_of(cache, convert):
    spec = cache.spec
    scales = {name: None if x is None else convert(x) for name, x in (("k", cache.k_scale), ("v", cache.v_scale))}
    return {
        "kv_cache_dtype": spec.kv_cache_dtype, "layout": spec.layout, "k_scale": scales["k"], "v_scale": scales["v"],
        "scale_layout": spec.scale_layout, "layer": None if cache.num_layers is None else jnp.array(1),
    }  # fmt: skip


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("op", READS)
def test_reads_of_refs_copy_nothing(op, kind, jit, copies):
    cache = make(**FORMATS[kind])
    want = READS[op](cache.caches, **options_of(cache, jnp.asarray))
    call = functools.partial(READS[op], **options_of(cache, jax.new_ref))
    assert_same((jax.jit(call) if jit else call)(tuple(map(jax.new_ref, cache.caches))), want)
    assert not copies


def test_a_ref_that_is_given_twice(copies):
    cache = make()
    ref = jax.new_ref(cache.caches[0])
    assert_same(READS["gather"]((ref, ref)), READS["gather"](cache.caches[:1] * 2))
    assert copies == [ref.shape] * 2  # jit takes no Ref twice


def test_what_is_read_is_what_was_written_last():
    refs = tuple(map(jax.new_ref, make().caches))
    jaxkv.reshape_and_cache_flash(KEY * 3, KEY * 5, *refs, SLOTS)
    assert_same(READS["slots"](refs), (KEY * 3, KEY * 5))


def test_a_call_with_refs_that_does_not_fit_is_refused_by_name():
    refs = tuple(map(jax.new_ref, make(kv_cache_dtype="fp8").caches))
    with pytest.raises(ValueError, match=r"^k_scale must have shape \(\), \(1,\) or \(2,\), got \(3,\)$"):
        READS["gather"](refs, kv_cache_dtype="fp8", k_scale=jax.new_ref(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"^layout"):
        READS["gather"](refs, kv_cache_dtype="fp8", layout="block slot")
