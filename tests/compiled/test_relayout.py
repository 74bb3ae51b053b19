"""H100 programs of `relayout`, compiled on a host without a GPU: in place, without a copy and without a collective.

Needs jax's CUDA plugin of jaxlib's version, and ptxas on the PATH: .ci/compiled makes such an environment.
"""

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
from tests.cases.h100s import h100s


def move(new, old, pairs):
    return old.relayout(new, pairs)


class Program:
    """A cache that moves into another one, on a number of H100s, and the shapes of both."""

    def __init__(self, source, destination, devices=1, layers=4, batch=(), **options):
        mesh = h100s(devices)
        sizes = dict(num_heads=8, head_size=128, num_layers=layers, dtype="bfloat16") | options

        def array(like, *spec):
            shape = (*batch, *like.shape)
            return jax.ShapeDtypeStruct(
                shape, like.dtype, sharding=NamedSharding(mesh, P(*(None,) * len(batch), *spec))
            )

        def cache(**extents):
            made = jax.eval_shape(lambda: jaxkv.PagedKVCache.create(**sizes | extents))
            axes = [*made.spec.layout.arrays, *(made.spec.scale_layout.arrays if made.spec.scale_layout else ())]
            leaves, tree = jax.tree.flatten(made)
            split = [["tp" if "head" in axis else None for axis in names] for names in axes]
            return tree.unflatten(
                [array(leaf, *spec[: leaf.ndim]) for leaf, spec in zip(leaves, split, strict=True)]
            )  # fmt: skip

        self.old = cache(num_blocks=1024, block_size=16, **source)
        self.new = cache(num_blocks=512, block_size=32, **destination)
        self.pairs = array(jax.ShapeDtypeStruct((4096, 2), jnp.int32))
        self.nbytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self.new)) // devices

    def compile(self, step=move, pairs=True):
        return jax.jit(step, donate_argnums=0).lower(self.new, self.old, self.pairs if pairs else None).compile()

    def assert_in_place(self, compiled, launches=1, most=0.01):
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) == launches
        assert memory.alias_size_in_bytes >= self.nbytes
        assert memory.temp_size_in_bytes < self.nbytes * most
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
        assert not re.findall(r"= \S+\[\d+,\S* (?:copy|dynamic-slice)\(", text)  # of arrays, not of an index


LAYOUTS = ("NHD", "HND", "HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD", "INTERLEAVED")


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_donated(layout, pairs):
    for source, destination in (("NHD", layout), (layout, "HND")):
        program = Program(dict(layout=source), dict(layout=destination))
        program.assert_in_place(program.compile(pairs=pairs))


FORMATS = {
    "fp8": dict(kv_cache_dtype="fp8"),
    "nvfp4": dict(kv_cache_dtype="nvfp4"),
    "int8 of tokens": dict(kv_cache_dtype="int8", per_token_head=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    program = Program({}, dict(layout="HND"), **FORMATS[name])
    program.assert_in_place(program.compile())


@pytest.mark.parametrize(("source", "destination"), [
    ("NHD", "HND"), ("HEAD_MAJOR", "NHD"), ("NHD", "INTERLEAVED"), ("PACKED_NHD", "PALLAS"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, dict(kv_cache_dtype="int8", per_token_head=True)], ids=["bfloat16", "int8"])
def test_eight_devices(source, destination, options):
    program = Program(dict(layout=source), dict(layout=destination), devices=8, **options)
    program.assert_in_place(program.compile())


def test_a_loop():
    program = Program({}, dict(layout="HND"))

    def step(new, old, pairs):
        return lax.fori_loop(0, 3, lambda i, new: old.relayout(new, pairs + i), new)

    program.assert_in_place(program.compile(step))


@pytest.mark.parametrize("pairs", [True, False])
def test_vmap_is_one_launch_where_blocks_are_in_front(pairs):
    program = Program({}, dict(layout="HND"), layers=None, batch=(2,))
    program.assert_in_place(program.compile(jax.vmap(move), pairs))


REQUANTISED = {
    "bfloat16 to fp8": ({}, dict(kv_cache_dtype="fp8", layout="HND")),
    "fp8 to bfloat16": (dict(kv_cache_dtype="fp8"), dict(layout="HND")),
    "in one array": (dict(layout="KV_NHD"), dict(kv_cache_dtype="int8", layout="INTERLEAVED")),
    "to scales of tokens": (dict(kv_cache_dtype="fp8"), dict(kv_cache_dtype="int8", per_token_head=True)),
    "of scales of tokens": (dict(kv_cache_dtype="int4", per_token_head=True), dict(kv_cache_dtype="nvfp4")),
}
SCALES = dict(k_scale=jax.ShapeDtypeStruct((4, 8), jnp.float32), v_scale=jax.ShapeDtypeStruct((1,), jnp.float32))


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("case", REQUANTISED)
def test_other_formats(case, pairs):
    """Read and written by one launch, in place."""
    program = Program(*REQUANTISED[case])
    program.assert_in_place(program.compile(pairs=pairs))


def test_static_scales_of_layers_and_heads():
    program = Program(dict(kv_cache_dtype="fp8"), dict(kv_cache_dtype="int8"))
    scales = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=program.pairs.sharding) for s in SCALES.values()]
    program.old, program.new = (
        jaxkv.PagedKVCache(cache.caches, cache.spec, *scales) for cache in (program.old, program.new)
    )
    program.nbytes = sum(a.size * a.dtype.itemsize for a in program.new.caches)
    program.assert_in_place(program.compile())


@pytest.mark.parametrize("case", ["bfloat16 to fp8", "to scales of tokens"])
def test_other_formats_on_eight_devices(case):
    program = Program(*REQUANTISED[case], devices=8)
    program.assert_in_place(program.compile())


def test_vmap_of_other_formats_is_one_launch_where_blocks_are_in_front():
    program = Program(*REQUANTISED["bfloat16 to fp8"], layers=None, batch=(2,))
    program.assert_in_place(program.compile(jax.vmap(move)))


def test_latent_rows_are_read_and_written_in_place():
    """A chunk of slots is all that is kept beside the caches."""
    sizes = dict(num_heads=1, head_size=576, head_size_v=512, layout="block slot latent")
    program = Program(sizes, sizes | dict(kv_cache_dtype="fp8"), layers=32)
    program.assert_in_place(program.compile(), launches=2, most=0.2)
