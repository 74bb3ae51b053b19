"""Copies and zeros of blocks for tests: cases, and one way to call each implementation."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcore.layout import CacheLayout
from kvcore.oracle import blocks as reference
from tests.cases.arrays import bits, from_torch, make_case, to_torch

PAIRS = {
    "nothing in common": [[0, 1], [2, 3], [0, 4]],
    "chain": [[1, 2], [2, 3], [3, 4]],
    "chain, last first": [[3, 4], [2, 3], [1, 2]],
    "swap": [[5, 2], [2, 5]],
    "circle": [[4, 0], [0, 3], [3, 6], [6, 4]],
    "tree": [[0, 1], [1, 2], [1, 3], [3, 4], [3, 5], [0, 6]],
    "circle with branches": [[1, 3], [0, 1], [1, 0], [3, 4], [0, 5], [3, 2]],
    "two circles": [[0, 1], [2, 3], [1, 0], [3, 4], [4, 2], [4, 6]],
    "all move on": [[i, (i + 1) % 7] for i in range(7)],
    "to itself": [[2, 2], [3, 3], [3, 4]],
    "no blocks": [[-1, 1], [1, -1], [7, 2], [2, 7], [-(2**31), 2**31 - 1], [1, 2]],
    "padding": [[-1, -1], [2, 0], [-1, -1]],
    "none": [],
}
"""Sources and destinations among 7 blocks, each destination once."""


@dataclass
class Case:
    """Arguments of a call, as NumPy arrays."""

    caches: list[np.ndarray]
    scale_caches: list[np.ndarray]
    indices: np.ndarray
    layout: CacheLayout
    scale_layout: str | None = None

    @property
    def name(self):
        return "copy_blocks" if self.indices.ndim == 2 else "zero_blocks"

    @property
    def memory(self):
        return [*self.caches, *self.scale_caches]

    @property
    def axes(self):
        """The axis of blocks of each array."""
        scale_axes = [pattern.split() for pattern in (self.scale_layout or "").split(",")]
        if self.scale_layout is None:
            scale_axes = [["layer"] * self.layout.has_layer + ["block"]]
        of_scales = [scale_axes[0].index("block"), scale_axes[-1].index("block")][: len(self.scale_caches)]
        return [*(axes.index(("block",)) for axes in self.layout.arrays), *of_scales]

    def call(self, module, memory, indices, **more):
        op = getattr(module, self.name)
        return op(memory, indices, layout=self.layout, scale_layout=self.scale_layout, **more)


def make_blocks(rng, indices, num_blocks=7, block_size=4, num_heads=2, head_size=16, scale_layout=None, **options):
    """A case with poisoned caches. Further options are those of a write's."""
    case = make_case(
        rng, num_blocks=num_blocks, block_size=block_size, num_heads=num_heads, head_size=head_size,
        layer=0 if options.get("num_layers") else None, scale_layout=scale_layout, **options,
    )  # fmt: skip
    indices = np.asarray(indices, np.int32)
    indices = indices.reshape(-1, 2) if indices.ndim == 2 or not indices.size else indices
    return Case(case.caches, case.scale_caches, indices, case.layout, scale_layout)


def run_oracle(case):
    memory = [cache.copy() for cache in case.memory]
    getattr(reference, case.name)(memory, case.indices, case.axes)
    return memory


def run_jax(case, backend=None):
    import jax.numpy as jnp

    import jaxkv

    return list(map(np.asarray, case.call(jaxkv, list(map(jnp.asarray, case.memory)), case.indices, backend=backend)))


def run_torch(case, backend=None, device="cpu"):
    import torchkv

    memory = [to_torch(cache.copy(), device) for cache in case.memory]
    assert case.call(torchkv, memory, to_torch(case.indices.copy(), device), backend=backend) is None
    return list(map(from_torch, memory))


CPU_IMPLEMENTATIONS = {
    "jax xla": lambda case: run_jax(case, "xla"),
    "jax interpret": lambda case: run_jax(case, "interpret"),
    "torch": lambda case: run_torch(case, "torch"),
    "torch interpret": lambda case: run_torch(case, "interpret"),
}


def assert_equals_oracle(case: Case, implementations: Any = CPU_IMPLEMENTATIONS) -> None:
    """Every implementation leaves the oracle's bits in every byte of all arrays."""
    want = run_oracle(case)
    for name, run in implementations.items():
        assert_same(run(case), want, name)


def assert_same(got, want, name=""):
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(w), err_msg=f"{name}, array {i}")


def moves(rng, num_blocks, n):
    """Pairs of any sources and of destinations that are there once."""
    return np.stack([rng.integers(0, num_blocks, n), rng.permutation(num_blocks)[:n]], axis=1)
