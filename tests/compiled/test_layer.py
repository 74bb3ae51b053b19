"""What a decode layer launches on an H100, compiled without one: kernels read the projection where XLA puts it.

XLA copies an operand of a custom call that is a slice of something; a view of heads is none. The lists are XLA's, after
all its optimisations: a kernel more in one of them is time in every layer.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jaxkv
from benchmarks import hlo, loop_forms, loop_layer
from kvcore.cache_spec import CacheSpec
from tests.cases.h100s import h100s

LAYERS, Q_HEADS, HEADS, HEAD_SIZE, HIDDEN = 4, 32, 8, 128, 4096
COLUMNS = (Q_HEADS + 2 * HEADS) * HEAD_SIZE

PROJECTION = ["gemm_fusion_dot", "loop_reduce_fusion"]
"""XLA divides the sums of a product among programs where tokens are few; a kernel more adds up what they found."""
MANY = ["gemm_fusion_dot_general"]
"""Where tokens are many, one kernel does it."""


def on_h100(arrays):
    sharding = NamedSharding(h100s(1), P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def abstract_layer(tokens, kv_cache_dtype):
    """Hidden states and a cache, which are donated, and all that a layer reads."""
    spec = CacheSpec.create(LAYERS, 4096, 16, HEADS, HEAD_SIZE, None, "bfloat16", "NHD", kv_cache_dtype)
    caches = tuple(jax.ShapeDtypeStruct(shape, spec.dtype) for shape in spec.shapes)
    scale = None if kv_cache_dtype == "auto" else jax.ShapeDtypeStruct((1,), jnp.float32)
    state = jax.ShapeDtypeStruct((tokens, HIDDEN), jnp.bfloat16), jaxkv.PagedKVCache(caches, spec, scale, scale)

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    inputs = {
        "qkv": jax.ShapeDtypeStruct((HIDDEN, COLUMNS), jnp.bfloat16),
        "out": jax.ShapeDtypeStruct((Q_HEADS * HEAD_SIZE, HIDDEN), jnp.bfloat16),
        "norm": jax.ShapeDtypeStruct((HEAD_SIZE,), jnp.bfloat16),
        "cos_sin": jax.ShapeDtypeStruct((4096, HEAD_SIZE), jnp.float32),
        "positions": integers(tokens),
        "slots": integers(tokens),
        "tables": integers(tokens, 256),
        "lengths": integers(tokens),
    }
    return state, inputs


def layer(state, inputs, index):
    x, cache = state
    qkv = x @ inputs["qkv"]
    ends = (0, Q_HEADS, Q_HEADS + HEADS, Q_HEADS + 2 * HEADS)
    rows = [jaxkv.heads(qkv, *each, head_size=HEAD_SIZE) for each in pairwise(ends)]
    query, cache = cache.rope_and_cache(
        *rows, inputs["positions"], inputs["cos_sin"], inputs["slots"], rope="neox",
        q_norm=inputs["norm"], k_norm=inputs["norm"], layer=index,
    )  # fmt: skip
    mixed = cache.attend(query, inputs["tables"], inputs["lengths"], layer=index)
    return mixed.reshape(x.shape) @ inputs["out"], cache


def compiled_kernels(function, arguments, loops=0):
    text = jax.jit(function, donate_argnums=0).lower(*on_h100(arguments)).compile().as_text()
    return hlo.kernels(text, loops)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "attention"),
    [(1, ["paged_attention_kernel", "merge_attention_kernel"]), (64, ["paged_attention_kernel"])],
)
def test_a_decode_layer(tokens, attention, kv_cache_dtype):
    found = compiled_kernels(lambda *x: layer(*x, 1), abstract_layer(tokens, kv_cache_dtype))
    assert found == [*PROJECTION, "rope_and_cache_kernel", *attention, *PROJECTION]


def test_a_decode_layer_of_a_loop():
    """XLA's own kernel in it counts layers; the other kernels load the count."""

    def step(state, inputs):
        return lax.fori_loop(0, LAYERS, lambda index, state: layer(state, inputs, index), state)

    found = compiled_kernels(step, abstract_layer(64, "auto"), loops=1)
    found.remove("loop_add_fusion")
    assert found == [*PROJECTION, "rope_and_cache_kernel", "paged_attention_kernel", *PROJECTION]


def test_slices_are_copied(monkeypatch):
    """What views are for: without them, a kernel copies each slice that does not start where its array does."""

    def heads(array, start, stop, head_size):
        return array.reshape(len(array), -1, head_size)[:, start:stop]

    monkeypatch.setattr(jaxkv, "heads", heads)
    found = compiled_kernels(lambda *x: layer(*x, 1), abstract_layer(64, "auto"))
    assert sum("slice" in name for name in found) >= 2


def benchmarked(name, shape):
    """The loop that `benchmarks loop` times with a form of jaxkv."""
    forms = loop_forms.FRONTS if shape.q_heads else loop_forms.WRITES
    (form,) = (form for form in forms if form.name == name)

    def run(state, inputs):
        return loop_layer.loop(form, shape, 8, False, *state, inputs)

    state = jax.eval_shape(lambda: (loop_layer.make_hidden(shape), loop_layer.make_caches(form, shape)))
    return compiled_kernels(run, (state, jax.eval_shape(lambda: loop_layer.make_inputs(shape))), loops=2)


@pytest.mark.parametrize(
    ("tokens", "projection"),
    [(1, ["loop_multiply_fusion", "input_reduce_fusion"]), (64, PROJECTION), (256, PROJECTION), (2048, MANY)],
)
def test_the_benchmarks_write(tokens, projection):
    found = benchmarked("jaxkv_heads", loop_forms.Shape(tokens, q_heads=0))
    assert found == [*projection, "reshape_and_cache_kernel", "input_concatenate_fusion", "loop_add_fusion"]


@pytest.mark.parametrize(
    ("tokens", "kv_cache_dtype", "projection"),
    [(1, "auto", PROJECTION), (64, "fp8", PROJECTION), (256, "auto", PROJECTION), (2048, "fp8", MANY)],
)
def test_the_benchmarks_front(tokens, kv_cache_dtype, projection):
    found = benchmarked("jaxkv_fused", loop_forms.Shape(tokens, kv_cache_dtype=kv_cache_dtype))
    assert found == [*projection, "rope_and_cache_kernel", "loop_convert_fusion", "loop_add_fusion"]
