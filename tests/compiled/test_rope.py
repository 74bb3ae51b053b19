"""H100 programs of `rope_and_cache`, compiled on a host without a GPU: one kernel, in place, and no collective.

Needs jax's CUDA plugin of jaxlib's version, and ptxas on the PATH: .ci/compiled makes such an environment.
"""

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
from kvcore.layout import CacheLayout
from tests.cases.h100s import h100s

LAYERS, TOKENS = 4, 64


class Program:
    """The op in a layout, and the shapes that it takes, on a number of H100s."""

    def __init__(self, layout, devices=1, kv_cache_dtype="auto", layers=None):
        self.layout = CacheLayout.of(layout)
        if layers:
            self.layout = self.layout.with_layer()
        dtype = "bfloat16" if kv_cache_dtype == "auto" else "float8_e4m3fn"
        self.options = {"layout": self.layout, "kv_cache_dtype": kv_cache_dtype, "rope": "neox"}
        mesh, latent = h100s(devices), self.layout.latent
        shapes = self.layout.shapes(
            num_blocks=4096, block_size=16, num_heads=1 if latent else 8, head_size=576 if latent else 128,
            num_layers=layers,
        )  # fmt: skip

        def array(shape, dtype, *spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        caches = [
            array(shape, dtype, *("tp" if "head" in axis else None for axis in axes))
            for shape, axes in zip(shapes, self.layout.arrays, strict=True)
        ]
        rows = [array((TOKENS, 8, 128), "bfloat16", None, "tp")] * 2
        if latent:
            rows = [array((TOKENS, size), "bfloat16") for size in (512, 64)]
        size = 64 if latent else 128
        self.arguments = (
            caches, array((TOKENS, 32, size), "bfloat16", None, "tp"), *rows, array((TOKENS,), "int32"),
            array((4096, size), "float32"), array((TOKENS,), "int32"), array((512 if latent else size,), "bfloat16"),
        )  # fmt: skip
        parts = 1 if latent else devices
        self.cache_bytes = sum(math.prod(s) for s in shapes) * jnp.dtype(dtype).itemsize // parts

    def step(self, caches, query, key, value, positions, cos_sin, slots, k_norm, **more):
        return jaxkv.rope_and_cache(
            query, key, value, caches, positions, cos_sin, slots, k_norm=k_norm, **self.options, **more
        )

    def compile(self, function):
        return jax.jit(function, donate_argnums=0).lower(*self.arguments).compile()

    def assert_in_place(self, compiled):
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert "triton_kernel_call_ffi" in text
        assert memory.alias_size_in_bytes >= self.cache_bytes
        assert memory.temp_size_in_bytes < self.cache_bytes // 100
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def kernels(compiled):
    return len(re.findall(r"= .* (?:fusion|copy|custom-call|dynamic-slice)\(", compiled.as_text()))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "KV_NHD", "PACKED_NHD", "MLA"])
def test_one_kernel_in_place(layout, kv_cache_dtype):
    program = Program(layout, kv_cache_dtype=kv_cache_dtype)
    compiled = program.compile(program.step)
    program.assert_in_place(compiled)
    assert kernels(compiled) == 1


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("layout", ["NHD", "MLA"])
def test_scan_over_layers(layout, devices):
    program = Program(layout, devices, layers=LAYERS)

    def decode(caches, *arrays):
        def one_layer(caches, layer):
            query, *new = program.step(caches, *arrays, layer=layer)
            return new, query

        return lax.scan(one_layer, caches, jnp.arange(LAYERS))

    program.assert_in_place(program.compile(decode))


@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED", "MLA"])
def test_eight_devices_with_heads_of_their_own(layout):
    program = Program(layout, devices=8)
    program.assert_in_place(program.compile(program.step))


def test_refs():
    program = Program("NHD")

    def step(caches, *arrays):
        refs = [jax.new_ref(c) for c in caches]
        (query,) = program.step(refs, *arrays)
        return query, [jax.freeze(r) for r in refs]

    program.assert_in_place(program.compile(step))


def test_vmap_folds_into_one_launch():
    program = Program("NHD")
    mesh, shared = h100s(1), (5, 7)  # the table and the norm's weights
    batch, sizes = NamedSharding(mesh, P()), [() if i in shared else (2,) for i in range(8)]
    program.arguments = tuple(
        jax.tree.map(lambda a, i=i: jax.ShapeDtypeStruct((*sizes[i], *a.shape), a.dtype, sharding=batch), argument)
        for i, argument in enumerate(program.arguments)
    )
    axes = tuple(None if i in shared else 0 for i in range(8))
    compiled = program.compile(jax.vmap(program.step, in_axes=axes))
    program.cache_bytes *= 2
    program.assert_in_place(compiled)
    assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", compiled.as_text())) == 1
