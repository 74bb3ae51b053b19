"""Reading with the kernels on a GPU; without one, all but the kernels."""

from tests.cases import gpu
from tests.cases.gathers import gather_jax, gather_torch
from tests.cases.gpu import HAS_GPU
from tests.cases.reads import assert_near_oracle, attend_jax, attend_torch

KERNELS = {"jax triton": attend_jax, "torch triton": lambda case: attend_torch(case, device="cuda")}


PORTABLE = {"jax xla": lambda case: attend_jax(case, "xla"), "torch": lambda case: attend_torch(case, "torch", "cuda")}


GATHERS = {"jax triton": gather_jax, "torch triton": lambda *x: gather_torch(*x, device="cuda")}


if not HAS_GPU:
    KERNELS, PORTABLE, GATHERS = {"all but the kernels": gpu.attend}, {}, {"all but the kernels": gpu.gather_kv}


def assert_kernels(case, implementations=KERNELS):
    """Near the oracle, and the same bits from both frameworks."""
    results = {}

    def remember(name, run):
        return lambda case: results.setdefault(name, run(case))

    assert_near_oracle(case, {name: remember(name, run) for name, run in implementations.items()})
    if HAS_GPU:
        for a, b in zip(results["jax triton"], results["torch triton"], strict=True):
            assert a.tobytes() == b.tobytes()
