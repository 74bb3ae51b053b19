import os

# Eight CPU devices for the sharding tests; read when jax is first used.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# The suite's processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """At most four processes, unless `-n` names a number, which the option --maxprocesses would limit, too."""
    return min((yield), 4)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Without a GPU, a test of kernels that got to its end has run all but them: it counts as skipped."""
    result = yield
    if pyfuncitem.get_closest_marker("gpu"):
        from tests.gpu import needs_gpu

        needs_gpu()
    return result
