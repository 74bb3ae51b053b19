"""H100 programs of `swap_blocks`, compiled on a host without a GPU: one launch, in place in either memory.

As `test_blocks.py`. H100s that are not here know no memory kinds, so that `put` tells XLA what JAX would.
"""

import math
import re

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.layout import CacheLayout
from tests.cases.h100s import h100s, put

BLOCKS, HOST_BLOCKS = 1024, 4096
SIDES = pytest.mark.parametrize("host", ["source", "destination"])
COPIES = r"all-gather|all-reduce|all-to-all|collective-permute|copy-start|host_compute|annotate_device_placement"


class Program:
    """A swap in a layout, and the shapes that it takes, on a number of H100s."""

    def __init__(self, layout, host, devices=1, dtype="bfloat16", split="head"):
        self.layout, mesh = CacheLayout.of(layout).with_layer(), h100s(devices)
        x = 8 if "dim/x" in self.layout.pattern else None
        sides, self.nbytes = [], []
        for blocks in (HOST_BLOCKS, BLOCKS) if host == "source" else (BLOCKS, HOST_BLOCKS):
            given = dict(num_blocks=blocks, block_size=16, num_heads=8, head_size=128, num_layers=8, x=x)
            shapes = self.layout.shapes(**given)
            sides.append([
                jax.ShapeDtypeStruct(
                    shape, dtype, sharding=NamedSharding(mesh, P(*("tp" if split in axis else None for axis in axes)))
                )
                for shape, axes in zip(shapes, self.layout.arrays, strict=True)
            ])  # fmt: skip
            self.nbytes.append(sum(map(math.prod, shapes)) * jax.numpy.dtype(dtype).itemsize // devices)
        self.arguments = *sides, jax.ShapeDtypeStruct((64, 2), "int32", sharding=NamedSharding(mesh, P()))
        count, kinds = len(sides[0]), ("pinned_host", "device") if host == "source" else ("device", "pinned_host")
        self.kinds = [[kinds[0]] * count + [kinds[1]] * count + ["device"], [kinds[1]] * count]
        self.host = host

    def step(self, source, destination, pairs, **more):
        return list(jaxkv.swap_blocks(source, destination, pairs, layout=self.layout, **more))

    def compile(self, function=None):
        lowered = jax.jit(function or self.step, donate_argnums=1, keep_unused=True).lower(*self.arguments)
        return put(lowered, *self.kinds).compile()

    def assert_in_place(self, compiled, launches=1):
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) == launches
        source, destination = self.nbytes
        if self.host == "destination":
            assert memory.host_alias_size_in_bytes == destination
            assert memory.host_argument_size_in_bytes == destination
        else:
            assert memory.alias_size_in_bytes == destination
            assert memory.host_argument_size_in_bytes == source
        assert memory.temp_size_in_bytes < min(self.nbytes) // 100
        assert memory.host_temp_size_in_bytes < min(self.nbytes) // 100
        assert not re.findall(COPIES, text)
        assert not re.findall(r"= \S+\[\d\S* (?:copy|dynamic-slice)\(", text)  # of arrays


@SIDES
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD"])
def test_donated(layout, host):
    program = Program(layout, host)
    program.assert_in_place(program.compile())


@SIDES
@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn"])
def test_bytes(dtype, host):
    """Which the kernel is given as bytes: XLA sees another type of the same memory."""
    program = Program("NHD", host, dtype=dtype)
    program.assert_in_place(program.compile())


@SIDES
@pytest.mark.parametrize("split", ["head", "layer"])
def test_eight_devices(split, host):
    program = Program("NHD", host, devices=8, split=split)
    program.assert_in_place(program.compile())


@SIDES
def test_a_loop(host):
    program = Program("NHD", host)

    def steps(source, destination, pairs):
        return lax.fori_loop(0, 3, lambda _, memory: program.step(source, memory, pairs), destination)

    program.assert_in_place(program.compile(steps))


@SIDES
def test_without_the_kernel_blocks_are_sliced_where_they_are(host):
    """The way for other platforms: no array is moved as a whole."""
    program = Program("NHD", host)

    def step(source, destination, pairs):
        sides = [source, destination]
        here = ["source", "destination"].index(host)  # JAX knows of memory kinds, but not of those here
        sides[here] = [jax.device_put(array, jax.memory.Space.Host) for array in sides[here]]
        return program.step(*sides, pairs, backend="xla")

    memory = program.compile(step).memory_analysis()
    assert memory.temp_size_in_bytes < min(program.nbytes) // 100
    assert memory.host_temp_size_in_bytes < min(program.nbytes) // 100
    assert max(memory.host_alias_size_in_bytes, memory.alias_size_in_bytes) >= program.nbytes[1]


@SIDES
def test_what_jax_lowers_of_arrays_in_pinned_memory(host, monkeypatch):
    """What `put` says is what JAX says of arrays that are in the host's memory, here a CPU's; nothing is in between."""
    monkeypatch.setenv("JAXKV_COMPUTE_CAPABILITY", "90")
    caches = [[jax.numpy.ones((blocks, 4, 2, 64), "bfloat16") for _ in range(2)] for blocks in (7, 9)]
    here = ["source", "destination"].index(host)
    caches[here] = [jax.device_put(a, a.sharding.with_memory_kind("pinned_host")) for a in caches[here]]
    step = jax.jit(lambda *sides: jaxkv.swap_blocks(*sides, jax.numpy.zeros((5, 2), "int32")), donate_argnums=1)
    text = step.trace(*caches).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == text.count("@triton_kernel_call_ffi") == 1
    (main,) = (line for line in text.splitlines() if "@main" in line)
    taken, given = main.split(" -> ")
    assert taken.count('"pinned_host"') == 2
    assert given.count('"pinned_host"') == (2 if host == "destination" else 0)
    assert taken.count("tf.aliasing_output") == 2
