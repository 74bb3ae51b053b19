import os

# Eight CPU devices for the sharding tests; read when jax is first used.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Users may forbid implicit promotion in their processes, so no test may need it; read when jax is imported.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

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


def pytest_collection_modifyitems(config, items):
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
