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

import jaxkv
from tests.cases.h100s import h100s

LAYERS = 4


class Program:
    """A cache that moves into another one, on a number of H100s, and the shapes of both."""

    def __init__(self, destination, source=None, devices=1, layers=LAYERS, heads=None, **options):
        self.mesh = h100s(devices)
        sizes = dict(num_heads=8, head_size=128, num_layers=layers)
        self.caches = tuple(
            jax.eval_shape(lambda of=of: jaxkv.PagedKVCache.create(**(sizes | options | of)))
            for of in (dict(num_blocks=512, block_size=32) | destination, dict(num_blocks=1024, block_size=16) | (source or {}))
        )  # fmt: skip
        self.new, self.old = (self.placed(cache, heads) for cache in self.caches)
        self.pairs = self.array(jax.ShapeDtypeStruct((4096, 2), jnp.int32))
        self.nbytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self.new)) // devices

    def array(self, like, spec=jax.P()):
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(self.mesh, spec))

    def placed(self, cache, heads):
        leaves, tree = jax.tree.flatten(cache)
        axes = [*cache.spec.layout.arrays, *(cache.spec.scale_layout.arrays if cache.spec.scale_layout else ())]
        specs = [jax.P(*(heads if "head" in axis else None for axis in names[: leaf.ndim])) for names, leaf in zip(axes, leaves)]
        return tree.unflatten([self.array(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)])

    def compile(self, step=lambda new, old, pairs: old.relayout(new, pairs), pairs=True):
        return jax.jit(step, donate_argnums=0).lower(self.new, self.old, self.pairs if pairs else None).compile()

    def assert_in_place(self, compiled, launches=1, temp=0.01):
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) == launches
        assert memory.alias_size_in_bytes >= self.nbytes
        assert memory.temp_size_in_bytes < self.nbytes * temp
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
        assert not re.findall(r"= \S+\[\d\S* (?:copy|dynamic-slice)\(", text)  # of arrays


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("layout", ["NHD", "HND", "HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD", "INTERLEAVED"])
def test_donated(layout, pairs):
    program = Program(dict(layout=layout))
    program.assert_in_place(program.compile(pairs=pairs))
