"""GPU tests on a host without one: they build their cases and the oracle's answers all the same.

Helpers that compare hold vectorised torch to the oracle there, in the kernels' place, and tests of one framework run on
the CPU. A test that gets to its end is reported as skipped (see `conftest.py`); a broken case, a wrong argument or a
wrong answer fails.
"""

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
REASON = "needs a GPU: all but the kernels ran"


def needs_gpu() -> None:
    """Ends a test here without a GPU: what follows has no meaning on a CPU."""
    if not HAS_GPU:
        pytest.skip(REASON)


def kernels(on_gpu, on_cpu):
    """Implementations to compare, by name: those with kernels, or what stands in for them."""
    return on_gpu if HAS_GPU else on_cpu


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
