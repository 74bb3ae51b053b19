"""H100 programs of `copy_blocks` and `zero_blocks`, compiled on a host without a GPU: in place, without a collective.

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
LAYOUTS = ("NHD", "HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD", "INTERLEAVED")


class Program:
    """The op in a layout, and the shapes that it takes, on a number of H100s."""

    def __init__(self, layout, n=64, devices=1, dtype="bfloat16", layers=LAYERS, split="head", name="pairs"):
        self.layout = CacheLayout.of(layout).with_layer() if layers else CacheLayout.of(layout)
        self.op = jaxkv.copy_blocks if name == "pairs" else jaxkv.zero_blocks
        mesh = h100s(devices)
        shapes = self.layout.shapes(
            num_blocks=4096, block_size=16, num_heads=8, head_size=128, num_layers=layers,
            x=8 if "dim/x" in self.layout.pattern else None,
        )  # fmt: skip

        def array(shape, dtype, *spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        caches = [
            array(shape, dtype, *("tp" if split in axis else None for axis in axes))
            for shape, axes in zip(shapes, self.layout.arrays, strict=True)
        ]
        self.arguments = caches, array((n, 2) if name == "pairs" else (n,), "int32")
        self.cache_bytes = sum(math.prod(s) for s in shapes) * jnp.dtype(dtype).itemsize // devices

    def step(self, caches, indices):
        return list(self.op(caches, indices, layout=self.layout))

    def compile(self, function=None):
        return jax.jit(function or self.step, donate_argnums=0).lower(*self.arguments).compile()

    def assert_in_place(self, compiled, launches=1):
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) == launches
        assert memory.alias_size_in_bytes >= self.cache_bytes
        assert memory.temp_size_in_bytes < self.cache_bytes // 100
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
        assert not re.findall(r"= \S+\[\d\S* (?:copy|dynamic-slice)\(", text)  # of arrays


@pytest.mark.parametrize("name", ["pairs", "blocks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_donated(layout, name):
    program = Program(layout, name=name)
    program.assert_in_place(program.compile())


@pytest.mark.parametrize("dtype", ["uint8", "float8_e4m3fn"])
def test_bytes(dtype):
    program = Program("NHD", dtype=dtype)
    program.assert_in_place(program.compile())


def test_many_pairs_are_two_launches():
    program = Program("NHD", n=2000)
    program.assert_in_place(program.compile(), launches=2)


@pytest.mark.parametrize(("layout", "split", "layers"), [
    ("NHD", "head", LAYERS), ("HND", "head", None), ("NHD", "layer", 8), ("INTERLEAVED", "head", LAYERS),
    ("HEAD_MAJOR", "head", LAYERS), ("NHD", "slot", None),
])  # fmt: skip
def test_eight_devices(layout, split, layers):
    program = Program(layout, devices=8, split=split, layers=layers)
    program.assert_in_place(program.compile())


def test_refs():
    program = Program("NHD")

    def step(caches, indices):
        refs = [jax.new_ref(cache) for cache in caches]
        program.op(refs, indices, layout=program.layout)
        return [jax.freeze(ref) for ref in refs]

    program.assert_in_place(program.compile(step))


def test_a_loop():
    program = Program("NHD")
    compiled = program.compile(
        lambda caches, indices: lax.fori_loop(0, 3, lambda _, c: program.step(c, indices), caches)
    )
    program.assert_in_place(compiled)


def test_vmap_is_one_launch():
    program = Program("NHD", layers=None)
    mesh = h100s(1)
    batched = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype, sharding=NamedSharding(mesh, P())), program.arguments
    )
    compiled = jax.jit(jax.vmap(program.step), donate_argnums=0).lower(*batched).compile()
    program.cache_bytes *= 2
    program.assert_in_place(compiled)


def test_export_for_a_cpu_and_cuda():
    cache = jax.ShapeDtypeStruct((8, 16, 2, 64), "float8_e4m3fn")
    exported = jax.export.export(
        jax.jit(lambda k, v, pairs: jaxkv.copy_blocks((k, v), pairs), donate_argnums=(0, 1)),
        platforms=["cpu", "cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")],
    )(cache, cache, jax.ShapeDtypeStruct((4, 2), jnp.int32))
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda")
    assert "triton_kernel_call_ffi" in again.mlir_module()
