"""Caches that two processes share, joined over loopback: each has two CPU devices."""

import pytest

from tests.cases.processes import run_joined


@pytest.mark.parametrize("count", [2])
def test_processes_that_share_a_mesh(count):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=1"}
    for index, lines in enumerate(run_joined("tests.cases.jax_processes", count, **flags)):
        assert [line for line in lines if line.startswith("process")] == [
            f"process {index}: {name} on {2 * count} devices" for name in ("heads", "blocks", "context")
        ]
