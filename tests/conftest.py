import gc
import os
from pathlib import Path

# Read when jax is first used. Eight CPU devices for the sharding tests.
flags = ["--xla_force_host_platform_device_count=8"]
HAS_GPU = any(Path("/dev").glob("nvidia*")) or Path("/dev/kfd").exists()
# A test runs its program once. At level 1, XLA takes half the time to compile it, and gives the same bits; not at level
# 0, at which no multiply and add are fused. With a GPU, programs are compiled as users have them.
if not HAS_GPU:
    flags.append("--xla_backend_optimization_level=1")
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
# Users may forbid implicit promotion in their processes, so no test may need it; read when jax is imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

# Where processes share cores, torch's threads wait for each other longer than they work; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The suite's processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--cases", choices=["values", "pairs", "all"], default="pairs", help="cases of a test with several parameters"
    )
    parser.addoption("--record", metavar="FILE", help="where to write what the tests that passed have met, as JSON")


def pytest_configure(config):
    if config.getoption("record"):
        from tests.record import Recorder

        in_worker = hasattr(config, "workerinput")
        config.pluginmanager.register(Recorder(config.getoption("record"), not in_worker, HAS_GPU), "record")


def pytest_generate_tests(metafunc):
    """Tests with the mark `x64` run twice, with JAX's 64-bit types off and on."""
    if metafunc.definition.get_closest_marker("x64"):
        metafunc.fixturenames.append("x64")
        metafunc.parametrize("x64", [False, True], ids=["x32", "x64"], indirect=True)


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Garbage collections need not go through what earlier modules left: torch, JAX and its programs stay anyhow.

    transformers collects ten times a text. In a process of the whole suite, that took half a second each.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """What is frozen at the end counts as leaked, of which extensions warn."""
    gc.unfreeze()


@pytest.fixture
def x64(request):
    import jax

    with jax.enable_x64(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Has tests with the mark `xdist_group` run in one process, which pytest-xdist tells by their names.

    From pytest 9.2 on, pytest-xdist 3.8 does not manage to name them (pytest-xdist#1386). Can go with a later one.

    What options like `-k` leave of a test's cases is covered by fewer of them: see tests/cases/covering.py.
    """
    result = yield
    cases = config.getoption("cases")
    if cases != "all":
        from tests.cases.covering import leave_out

        out = leave_out(items, HAS_GPU, most=1 if cases == "values" else 2)
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=list(out))
    if config.getoption("loadgroup", False):
        for item in items:
            for mark in item.iter_markers("xdist_group"):
                if not item.nodeid.endswith(f"@{mark.args[0]}"):
                    item._id = type(item._id).parse(f"{item.nodeid}@{mark.args[0]}")
    return result


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """At most four processes, unless `-n` names a number, which the option --maxprocesses would limit, too."""
    return min((yield), 4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """torch keeps the memory that large tests took, and the suite's other processes have none of it."""
    result = yield
    if item.get_closest_marker("xdist_group"):
        import torch

        torch.cuda.empty_cache()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Without a GPU, a test of kernels that got to its end has run all but them: it counts as skipped."""
    result = yield
    if pyfuncitem.get_closest_marker("gpu"):
        from tests.cases.gpu import needs_gpu

        needs_gpu()
    return result
