"""Caches that two processes share, joined over loopback: each has two CPU devices."""

import os
import socket
import subprocess
import sys

import pytest

from tests.cases.processes import ROOT


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize("count", [2])
def test_processes_that_share_a_mesh(count):
    port, env = free_port(), os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cases.jax_processes", str(index), str(count), str(port)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, (out, err)) in enumerate(zip(processes, results, strict=True)):
        assert process.returncode == 0, err
        assert [line for line in out.splitlines() if line.startswith("process")] == [
            f"process {index}: {name} on {2 * count} devices" for name in ("heads", "blocks", "context")
        ]
