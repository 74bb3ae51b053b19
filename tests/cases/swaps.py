"""Swaps of blocks between two caches for tests: cases, and one way to call each implementation."""

from dataclasses import dataclass, replace

import numpy as np

from kvcore.oracle import blocks as reference
from tests.cases.arrays import from_torch, to_torch
from tests.cases.blocks import Case, assert_same, make_blocks

PAIRS = {
    "apart": [[0, 1], [2, 10], [6, 4]],
    "one source": [[3, 0], [3, 5], [3, 10]],
    "same numbers": [[0, 0], [5, 5]],
    "in a row": [[2, 7], [3, 8], [4, 9]],
    "no blocks": [[-1, 1], [1, -1], [7, 2], [2, 11], [-(2**31), 2**31 - 1], [1, 2]],
    "past one cache only": [[10, 0], [0, 10], [7, 1]],
    "padding": [[-1, -1], [2, 0], [-1, -1]],
    "none": [],
}
"""A block among 7, and one among 11; each of these once."""


@dataclass
class Swap:
    """Two caches, as NumPy arrays: what is read, and what is written, with other numbers of blocks."""

    source: Case
    destination: Case

    @property
    def pairs(self):
        return self.source.indices

    def call(self, module, source, destination, pairs, **more):
        options = {"layout": self.source.layout, "scale_layout": self.source.scale_layout}
        return module.swap_blocks(source, destination, pairs, **options, **more)

    def back(self, pairs):
        """The swap the other way round."""
        pairs = np.asarray(pairs, np.int32).reshape(-1, 2)
        return Swap(replace(self.destination, indices=pairs), replace(self.source, indices=pairs))


def make_swap(rng, pairs, num_blocks=(7, 11), **options):
    """A case with poisoned caches. Further options are those of a write's."""
    pairs = np.asarray(pairs, np.int32).reshape(-1, 2)
    return Swap(*(make_blocks(rng, pairs, num_blocks=n, **options) for n in num_blocks))


def run_oracle(case):
    memory = [array.copy() for array in case.destination.memory]
    reference.swap_blocks(case.source.memory, memory, case.pairs, case.source.axes)
    return memory


def in_host(array):
    """An array of JAX in pinned memory."""
    import jax

    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def run_jax(case, backend=None, host="destination"):
    """With source or destination in the host's memory, or neither."""
    import jax.numpy as jnp

    import jaxkv

    source, destination = ([jnp.asarray(a) for a in side.memory] for side in (case.source, case.destination))
    source = list(map(in_host, source)) if host == "source" else source
    destination = list(map(in_host, destination)) if host == "destination" else destination
    new = case.call(jaxkv, source, destination, case.pairs, backend=backend)
    assert [a.sharding.memory_kind for a in new] == [a.sharding.memory_kind for a in destination]
    assert_same(list(map(np.asarray, source)), case.source.memory, "source")
    return list(map(np.asarray, new))


def run_torch(case, backend=None, device="cpu", host=None):
    """With source or destination in pinned memory, or neither."""
    import torch

    import torchkv

    memory = []
    for name, side in (("source", case.source), ("destination", case.destination)):
        pins = name == host and torch.cuda.is_available()
        tensors = [to_torch(a.copy(), "cpu" if name == host else device) for a in side.memory]
        memory.append([t.pin_memory() if pins else t for t in tensors])
    assert case.call(torchkv, *memory, to_torch(case.pairs.copy(), device), backend=backend) is None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert_same(list(map(from_torch, memory[0])), case.source.memory, "source")
    return list(map(from_torch, memory[1]))


CPU_IMPLEMENTATIONS = {
    "jax xla": lambda case: run_jax(case, "xla"),
    "jax xla, from the host": lambda case: run_jax(case, "xla", "source"),
    "jax interpret": lambda case: run_jax(case, "interpret"),
    "jax interpret, from the host": lambda case: run_jax(case, "interpret", "source"),
    "torch": lambda case: run_torch(case, "torch"),
    "torch interpret": lambda case: run_torch(case, "interpret"),
}


def assert_equals_oracle(case, implementations=CPU_IMPLEMENTATIONS):
    """Every implementation leaves the oracle's bits in every byte of the destination, and source as it was."""
    want = run_oracle(case)
    for name, run in implementations.items():
        assert_same(run(case), want, name)
