"""H100 programs, compiled on a host without a GPU: the cache is updated in place, and no device talks to another.

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

LAYERS = 4
LAYOUTS = ("NHD", "HND", "HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD", "INTERLEAVED")


class Program:
    """A layout's op, and the shapes that it takes, on a number of H100s."""

    def __init__(self, layout, devices=1, kv_cache_dtype="auto", cache_dtype="bfloat16", layers=None, tokens=64):
        self.layout = CacheLayout.of(layout)
        if layers:
            self.layout = self.layout.with_layer()
        self.options = {"layout": self.layout, "kv_cache_dtype": kv_cache_dtype}
        mesh = h100s(devices)
        shapes = self.layout.shapes(
            num_blocks=4096, block_size=16, num_heads=8, head_size=128, num_layers=layers,
            x=8 if "dim/x" in self.layout.pattern else None,
        )  # fmt: skip

        def array(shape, dtype, *spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        rows = array((tokens, 8, 128), "bfloat16", None, "tp")
        caches = [
            array(shape, cache_dtype, *("tp" if "head" in axis else None for axis in axes))
            for shape, axes in zip(shapes, self.layout.arrays, strict=True)
        ]
        self.arguments = (rows, rows, caches, array((tokens,), "int32"))
        self.cache_bytes = sum(math.prod(s) for s in shapes) * jnp.dtype(cache_dtype).itemsize // devices

    def write(self, key, value, caches, slots, **options):
        single = self.layout.single_array
        op = jaxkv.reshape_and_cache_flash_diffkv if single else jaxkv.reshape_and_cache_flash
        new = op(key, value, *caches, slots, **self.options, **options)
        return [new] if single else list(new)

    def compile(self, function):
        return jax.jit(function, donate_argnums=2).lower(*self.arguments).compile()

    def assert_in_place(self, compiled):
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert "triton_kernel_call_ffi" in text
        assert memory.alias_size_in_bytes >= self.cache_bytes
        assert memory.temp_size_in_bytes < self.cache_bytes // 100
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_donated_write(layout):
    program = Program(layout)
    program.assert_in_place(program.compile(program.write))


@pytest.mark.parametrize("cache_dtype", ["uint8", "float8_e4m3fn"])
def test_donated_fp8_write(cache_dtype):
    program = Program("NHD", kv_cache_dtype="fp8", cache_dtype=cache_dtype)

    def scaled(key, value, caches, slots):
        return program.write(key, value, caches, slots, k_scale=0.5, v_scale=jnp.abs(value[0, 0, 0]).astype("float32"))

    program.assert_in_place(program.compile(scaled))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("layout", "kv_cache_dtype", "cache_dtype"),
    [
        ("NHD", "auto", "bfloat16"),
        ("HND", "auto", "bfloat16"),
        ("INTERLEAVED", "auto", "bfloat16"),
        ("NHD", "fp8", "float8_e4m3fn"),
        ("HND", "fp8_e5m2", "float8_e5m2"),
    ],
)
def test_scan_over_layers_in_a_loop_over_steps(layout, kv_cache_dtype, cache_dtype, devices):
    program = Program(layout, devices, kv_cache_dtype, cache_dtype, layers=LAYERS)

    def decode(key, value, caches, slots):
        def one_layer(caches, layer):
            return program.write(key, value, caches, slots, layer=layer), None

        return lax.fori_loop(0, 3, lambda _, c: lax.scan(one_layer, c, jnp.arange(LAYERS))[0], caches)

    program.assert_in_place(program.compile(decode))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_with_heads_of_their_own(layout):
    program = Program(layout, devices=8)
    program.assert_in_place(program.compile(program.write))


def test_refs():
    program = Program("NHD")

    def write(key, value, caches, slots):
        refs = [jax.new_ref(c) for c in caches]
        program.write_to = jaxkv.reshape_and_cache_flash(key, value, *refs, slots)
        return [jax.freeze(r) for r in refs]

    program.assert_in_place(program.compile(write))


def test_vmap_folds_into_one_launch():
    program = Program("NHD")
    batched = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), program.arguments)
    mesh = h100s(1)
    batched = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())), batched)
    compiled = jax.jit(jax.vmap(program.write), donate_argnums=2).lower(*batched).compile()
    program.cache_bytes *= 2
    program.assert_in_place(compiled)
    assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", compiled.as_text())) == 1


def test_a_layer_costs_no_kernel():
    def kernels(program, **options):
        compiled = program.compile(lambda *x: program.write(*x, **options))
        return len(re.findall(r"= .* (?:fusion|copy|custom-call|dynamic-slice)\(", compiled.as_text()))

    assert kernels(Program("NHD", layers=LAYERS), layer=1) == kernels(Program("NHD")) == 1


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("capability", [None, "80", "90", "100"])
def test_export_for_a_cpu_and_cuda(monkeypatch, capability, cache_dtype):
    """fp8 arrays too, for GPUs that have no such type."""
    if capability:
        monkeypatch.setenv("JAXKV_COMPUTE_CAPABILITY", capability)
    kv_cache_dtype = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8_e5m2"}.get(cache_dtype, "auto")
    key = jax.ShapeDtypeStruct((4, 2, 64), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8, 16, 2, 64), cache_dtype)
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    exported = jax.export.export(
        jax.jit(lambda *x: jaxkv.reshape_and_cache_flash(*x, kv_cache_dtype), donate_argnums=(2, 3)),
        platforms=["cpu", "cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")],
    )(key, key, cache, cache, slots)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda")
    assert "triton_kernel_call_ffi" in again.mlir_module()
