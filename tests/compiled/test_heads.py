"""H100 programs with views of heads, compiled without a GPU: the kernels are all that there is, and slices are not."""

import math
import re

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from benchmarks import hlo
from tests.cases.h100s import h100s

TOKENS, HEADS, GROUP, SIZE, WIDTH = 64, 8, 4, 128, 4096
CACHE = (4096, 16, HEADS, SIZE)
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute"
OURS = re.compile(r"reshape_and_cache|quantize_and_cache|paged_attention|merge_attention")
PARTS = {  # of an array: its shape, and start, stop and head_size of queries, keys and values
    "groups": ((TOKENS, HEADS, GROUP + 2, SIZE), (0, 4), (4, 5), (5, 6)),
    "heads": ((TOKENS, 48, SIZE), (0, 32), (32, 40), (40, 48)),
    "flat": ((TOKENS, 48 * SIZE), (0, 32), (32, 40), (40, 48)),
}


def view(array, start, stop):
    return jaxkv.heads(array, start, stop, head_size=SIZE if array.ndim == 2 else None)


def sliced(array, start, stop):
    return jnp.asarray(view(array, start, stop))


def array(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def write_and_attend(part, parts, projection, caches, slots, tables, lens, kv_cache_dtype="auto"):
    query, key, value = (part(projection, *at) for at in parts)
    caches = jaxkv.reshape_and_cache_flash(key, value, *caches, slots, kv_cache_dtype)
    return caches, jaxkv.paged_attention(query, caches, tables, lens, kv_cache_dtype=kv_cache_dtype)


def compile_step(part, parts, projection, mesh, kv_cache_dtype="auto"):
    """The program of a write and attention, of a projection of this type."""
    cache = array(mesh, CACHE, "bfloat16" if kv_cache_dtype == "auto" else "uint8", None, None, "tp")
    rest = array(mesh, (TOKENS,), "int32"), array(mesh, (TOKENS, 512), "int32"), array(mesh, (TOKENS,), "int32")

    def step(projection, caches, slots, tables, lens):
        return write_and_attend(part, parts, projection, caches, slots, tables, lens, kv_cache_dtype)

    compiled = jax.jit(step, donate_argnums=1).lower(projection, (cache, cache), *rest).compile()
    memory = compiled.memory_analysis()
    cache_bytes = 2 * math.prod(cache.shape) * jnp.dtype(cache.dtype).itemsize // mesh.size
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes // 50
    return compiled.as_text()


def others(text):
    """Names of the kernels that are none of ours."""
    names = hlo.kernels(text)
    assert sum(bool(OURS.search(name)) for name in names) >= 2
    return [name for name in names if not OURS.search(name)]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("order", PARTS)
def test_a_layer_is_its_kernels(order, kv_cache_dtype):
    mesh, (shape, *parts) = h100s(1), PARTS[order]
    projection = array(mesh, shape, "bfloat16")
    assert others(compile_step(view, parts, projection, mesh, kv_cache_dtype)) == []
    assert others(compile_step(sliced, parts, projection, mesh, kv_cache_dtype)) != []


def test_eight_devices_have_groups_of_their_own():
    mesh, (shape, *parts) = h100s(8), PARTS["groups"]
    text = compile_step(view, parts, array(mesh, shape, "bfloat16", None, "tp"), mesh)
    assert others(text) == []
    assert not re.findall(COLLECTIVES, text)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_product_is_read_where_it_is(devices):
    """Beside our kernels there is what computes the projection, and nothing else."""
    mesh, (shape, *parts) = h100s(devices), PARTS["groups"]
    weights = array(mesh, (WIDTH, *shape[1:]), "bfloat16", None, "tp")
    hidden, cache = array(mesh, (TOKENS, WIDTH), "bfloat16"), array(mesh, CACHE, "bfloat16", None, None, "tp")
    rest = array(mesh, (TOKENS,), "int32"), array(mesh, (TOKENS, 512), "int32"), array(mesh, (TOKENS,), "int32")

    def project(hidden, weights):
        return jnp.einsum("th,hgnd->tgnd", hidden, weights)

    def step(hidden, weights, caches, slots, tables, lens):
        return write_and_attend(view, parts, project(hidden, weights), caches, slots, tables, lens)

    text = jax.jit(step, donate_argnums=2).lower(hidden, weights, (cache, cache), *rest).compile().as_text()
    assert not re.findall(COLLECTIVES, text)
    assert others(text) == hlo.kernels(jax.jit(project).lower(hidden, weights).compile().as_text())


def test_rows_of_mla():
    mesh = h100s(1)
    rows, slots = array(mesh, (TOKENS, 576 + 64), "bfloat16"), array(mesh, (TOKENS,), "int32")
    cache = array(mesh, (4096, 16, 576), "bfloat16")

    def kernels(part):
        def write(rows, cache, slots):
            return jaxkv.concat_and_cache_mla(part(rows, 0, 512), part(rows, 512, 576), cache, slots)

        return hlo.kernels(jax.jit(write, donate_argnums=1).lower(rows, cache, slots).compile().as_text())

    assert len(kernels(jaxkv.heads)) == 1
    assert len(kernels(lambda rows, start, stop: rows[:, start:stop])) > 1


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_export_for_a_cpu_and_cuda(monkeypatch, capability):
    monkeypatch.setenv("JAXKV_COMPUTE_CAPABILITY", capability)
    shape, *parts = PARTS["groups"]
    exported = jax.export.export(
        jax.jit(lambda *x: write_and_attend(view, parts, *x), donate_argnums=1),
        platforms=["cpu", "cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")],
    )(
        jax.ShapeDtypeStruct(shape, "bfloat16"), (jax.ShapeDtypeStruct((8, 16, HEADS, SIZE), "bfloat16"),) * 2,
        *(jax.ShapeDtypeStruct(s, "int32") for s in ((TOKENS,), (TOKENS, 4), (TOKENS,))),
    )  # fmt: skip
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda")
    assert "triton_kernel_call_ffi" in again.mlir_module()
