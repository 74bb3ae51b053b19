"""precompile for H100s, on a host without a GPU: Triton's kernels are compiled once, whoever needs them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from benchmarks import hlo
from jaxkv._triton.launch import jt
from tests.cases.h100s import h100s

Q_HEADS, HEADS, HEAD_SIZE = 16, 4, 64


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that Triton compiles, in order; before the test it has compiled none."""
    names, function = [], jt.triton_lib.TritonFunction
    compile_kernel = function._compile_kernel

    def counted(self, *args):
        names.append(self.name)
        return compile_kernel(self, *args)

    monkeypatch.setattr(function, "_compile_kernel", counted)
    monkeypatch.setattr(function, "_kernel_cache", {})
    monkeypatch.setenv("JAXKV_CACHE_DIR", "")
    return names


def described(tokens):
    """A cache and a step's inputs, on one H100."""
    sharding = NamedSharding(h100s(1), P())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = jax.eval_shape(
        lambda: jaxkv.PagedKVCache.create(num_blocks=64, block_size=16, num_heads=HEADS, head_size=HEAD_SIZE)
    )
    return jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), cache), {
        "rows": [array(tokens, heads, HEAD_SIZE) for heads in (Q_HEADS, HEADS, HEADS)],
        "positions": array(tokens, dtype=jnp.int32),
        "cos_sin": array(128, HEAD_SIZE, dtype=jnp.float32),
        "slots": array(tokens, dtype=jnp.int32),
        "tables": array(tokens, 16, dtype=jnp.int32),
        "lens": array(tokens, dtype=jnp.int32),
    }


def step(cache, inputs):
    query, cache = cache.rope_and_cache(*inputs["rows"], inputs["positions"], inputs["cos_sin"], inputs["slots"])
    return cache.attend(query, inputs["tables"], inputs["lens"]), cache


STEP = ["rope_and_cache_kernel", "paged_attention_kernel", "merge_attention_kernel"]


def test_kernels_are_compiled_once(compiled):
    decode = jax.jit(lambda *x: step(*x), donate_argnums=0)
    program = jaxkv.precompile(decode, *described(1))
    assert compiled == STEP
    assert [name for name in hlo.kernels(program.as_text()) if name in STEP] == STEP
    cache, inputs = described(1)
    jaxkv.precompile(cache.attend, inputs["rows"][0], inputs["tables"], inputs["lens"])  # another program
    assert decode.lower(*described(1)).compile() is not None
    assert compiled == STEP

    jaxkv.precompile(decode, *described(8))
    of_both = list(compiled)
    assert len(of_both) > len(STEP)
    jaxkv.precompile(step, *described(8))
    assert compiled == of_both


def test_threads_compile_a_kernel_once(compiled):
    def one(_):
        return jaxkv.precompile(jax.jit(lambda *x: step(*x)), *described(1))

    with ThreadPoolExecutor(4) as pool:
        programs = list(pool.map(one, range(4)))
    assert sorted(compiled) == sorted(STEP)
    assert all(program.as_text().count("triton_kernel_call") >= 3 for program in programs)
