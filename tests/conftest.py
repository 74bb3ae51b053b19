import os

# Eight CPU devices for the sharding tests; read when jax is first used.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Users may forbid implicit promotion in their processes, so no test may need it; read when jax is imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

# Where processes share cores, torch's threads wait for each other longer than they work; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The suite's processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest


def pytest_generate_tests(metafunc):
    """Tests with the mark `x64` run twice, with JAX's 64-bit types off and on."""
    if metafunc.definition.get_closest_marker("x64"):
        metafunc.fixturenames.append("x64")
        metafunc.parametrize("x64", [False, True], ids=["x32", "x64"], indirect=True)


@pytest.fixture
def x64(request):
    import jax

    with jax.enable_x64(request.param):
        yield request.param


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
