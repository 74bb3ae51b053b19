"""GPU tests on a host without one: they build their cases and the oracle's answers all the same.

Helpers that compare hold vectorised torch to the oracle there, in the kernels' place, and lower JAX's half for an H100,
but for the kernels. Tests of one framework run on the CPU. A test that gets to its end is reported as skipped (see
`conftest.py`); a broken case, a wrong argument or a wrong answer fails.
"""

import os
from unittest import mock

import numpy as np
import pytest
import torch

from tests.cases.arrays import run_torch, write_jax
from tests.cases.gathers import gather, gather_torch
from tests.cases.reads import attend_torch
from tests.cases.slots import map_torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def needs_gpu() -> None:
    """Ends a test here without a GPU: what follows has no meaning on a CPU."""
    if not HAS_GPU:
        pytest.skip("needs a GPU: all but the kernels ran")


def params(cases, smoke=()):
    """Parameters of a test, each a tuple; those in `smoke` belong to the smoke set."""
    return [pytest.param(*case, marks=pytest.mark.gpu_smoke if case in smoke else ()) for case in cases]


def shorter(lengths, most=33):
    """Lengths of sequences, or of their queries: without a GPU, where the oracle's loops take the time, at most 33."""
    return lengths if HAS_GPU or lengths is None else tuple(min(n, most) for n in lengths)


def captured(step):
    """A step captured in a CUDA graph: its result, and what replays it into that. A CPU takes the step again."""
    out = step()  # compiles
    if not HAS_GPU:
        return out, lambda: out.copy_(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return out, graph.replay


# ---- what stands in for the kernels


def write(case):
    return lowered(lambda: write_jax(case), run_torch(case, "torch"))


def attend(case):
    import jax.numpy as jnp

    import jaxkv

    return lowered(lambda: case.call(jaxkv, jnp.asarray, return_lse=True), attend_torch(case, "torch"))


def gather_kv(case, max_len, dtype):
    import jax.numpy as jnp

    import jaxkv

    def call():
        return gather(case, jaxkv, jnp.asarray, lambda x: x, max_len, dtype, None)

    return lowered(call, gather_torch(case, max_len, dtype, "torch"))


def slot_mapping(case):
    import jaxkv

    (want,) = lowered(lambda: [case.call(jaxkv.slot_mapping, np.copy)], [map_torch(case, "torch")])
    return want


def lowered(call, want):
    """Lowers a call of jaxkv for an H100, but for the kernels, whose answers torch gave."""
    import jax
    import jax.numpy as jnp

    from jaxkv._triton.launch import jt

    options = {"num_warps", "compute_capability", "backend_options", "name"}

    def triton_call(*arguments, kernel, out_type, grid, **named):
        passed = len(arguments) + len(jax.tree.leaves(out_type)) + len(named.keys() - options)
        assert passed == len(kernel.arg_names), kernel
        assert min(grid) > 0
        return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), out_type)

    with (
        mock.patch.object(jt, "triton_call", triton_call),
        mock.patch.dict(os.environ, JAXKV_COMPUTE_CAPABILITY="90"),
    ):
        traced = jax.jit(call).trace()
        traced.lower(lowering_platforms=("cuda",))
    assert [(x.shape, x.dtype) for x in traced.out_info] == [(x.shape, np.dtype(x.dtype)) for x in want]
    return want
