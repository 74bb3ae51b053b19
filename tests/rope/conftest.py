"""What tests of rotated writes share."""

import numpy as np
import pytest

from tests.cases.torch_compile import compiler  # noqa: F401


@pytest.fixture
def rng():
    return np.random.default_rng(0)
