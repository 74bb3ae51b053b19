"""H100 programs with the attention kernels for Hopper in them, or what older versions of Triton have instead."""

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
from jaxkv._triton import launch as _launch
from kvcore.cache_spec import CacheSpec
from kvcore.run.compiler import has_gluon
from tests.cases.h100s import h100s

DEVICES = (1, 8)
PREFILL, LATENT = ("hopper_attention_kernel", 12), ("hopper_mla_kernel", 12)
"""Kernels, and the warps that are launched: of all that a kernel specialises, not of the first part."""
OLDER, MERGE = ("paged_attention_kernel", 8), ("merge_attention_kernel", 4)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that jax_triton makes, each with its warps: once in a process where constants and dtypes are the same."""
    made = set()
    library = _launch.jt.triton_lib.triton_kernel_call_lib._library
    make = library.TritonKernel

    def kernel(name, num_warps, *rest):
        made.add((name, num_warps))
        return make(name, num_warps, *rest)

    monkeypatch.setattr(library, "TritonKernel", kernel)
    return made


def on(devices):
    """What describes arrays on a mesh of H100s: shape, dtype, axes of the mesh."""
    mesh = h100s(devices)

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    return array


def assert_only_kernels(compiled, number, temporary):
    """XLA adds nothing to so many kernels, no copy and no collective, and no memory beside what they need."""
    text = compiled.as_text()
    assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) == number
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    assert not re.findall(r"= .* (?:fusion|copy|dynamic-slice)\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < temporary


def test_prefill_on_every_number_of_devices(launched):
    """XLA compiles the kernel's PTX, copies no cache, and needs no collective; all warps are launched."""

    def prefill(query, caches, tables, lens, starts):
        return jaxkv.paged_attention(query, caches, tables, lens, query_start_loc=starts)

    for devices in DEVICES:
        array = on(devices)
        cache = array((1024, 16, 8, 128), "bfloat16", None, None, "tp")
        lowered = jax.jit(prefill).lower(
            array((16384, 32, 128), "bfloat16", None, "tp"), (cache, cache), array((2, 512), "int32"),
            array((2,), "int32"), array((3,), "int32"),
        )  # fmt: skip
        assert_only_kernels(lowered.compile(), 1, 2**22)
    assert launched == {PREFILL if has_gluon() else OLDER}


MLA = {  # query heads of a device, sequences, positions, tokens with query_start_loc, splits
    "one split": (128, 64, 8192, None, 1),
    "splits": (16, 1, 131072, None, 128),
    "splits, ragged": (8, 2, 65536, 5, 64),
}


@pytest.mark.parametrize("name", MLA)
def test_mla_on_every_number_of_devices(launched, name):
    """Each device has the whole cache and some of the query heads. Kernels differ between the cases."""
    heads, sequences, context, tokens, splits = MLA[name]

    def attend(query, cache, tables, lens, starts):
        return jaxkv.paged_attention(query, cache, tables, lens, query_start_loc=starts, layout="MLA", head_size_v=512)

    for devices in DEVICES:
        array = on(devices)
        lowered = jax.jit(attend).lower(
            array((tokens or sequences, heads * devices, 576), "bfloat16", None, "tp"),
            array((sequences * context // 64, 64, 576), "bfloat16"), array((sequences, context // 64), "int32"),
            array((sequences,), "int32"), tokens and array((sequences + 1,), "int32"),
        )  # fmt: skip
        compiled = lowered.compile()
        assert compiled.output_shardings.spec == P(None, "tp")
        if has_gluon() and splits > 1:
            assert f"f32[{tokens or sequences},{heads},{splits},512]" in compiled.as_text()
        few = has_gluon() and splits == 1  # no partial results
        assert_only_kernels(compiled, len(launched), 2**17 if few else sequences * context * 576 * 2 // 4)
    assert launched - {MERGE} == {LATENT if has_gluon() else OLDER}
    if has_gluon():
        assert (MERGE in launched) == (splits > 1)


def test_a_decode_loop_of_mla_is_in_place(launched):
    """Layers write their tokens and attend: the cache's memory is the result's, and the kernel gets all of it."""
    layers, tokens, heads = 4, 64, 40
    spec = CacheSpec.create(layers, 4096, 16, 1, 576, 512, "bfloat16", "MLA", "auto")
    (shape,) = spec.shapes

    def decode(cache, query, kv_c, k_pe, slots, tables, lens):
        def one_layer(cache, layer):
            cache = cache.write(kv_c, k_pe, slots, layer=layer)
            return cache, cache.attend(query, tables, lens, layer=layer)

        return lax.scan(one_layer, cache, jnp.arange(layers))

    for devices in DEVICES:
        array = on(devices)
        cache = jaxkv.PagedKVCache((array(shape, "bfloat16"),), spec)
        lowered = jax.jit(decode, donate_argnums=0).lower(
            cache, array((tokens, heads * devices, 576), "bfloat16", None, "tp"), array((tokens, 512), "bfloat16"),
            array((tokens, 64), "bfloat16"), array((tokens,), "int32"), array((tokens, 512), "int32"),
            array((tokens,), "int32"),
        )  # fmt: skip
        compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory.alias_size_in_bytes >= math.prod(shape) * 2
        assert memory.temp_size_in_bytes < math.prod(shape) // layers  # half a layer of the cache
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    assert (LATENT if has_gluon() else OLDER) in launched
