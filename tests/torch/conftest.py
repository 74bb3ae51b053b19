"""What tests of torchkv share."""

import numpy as np
import pytest
import torch

from tests.cases.torch_compile import compiler  # noqa: F401


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def seen(monkeypatch):
    """Launches on the host, and what torch's dispatcher called for them."""
    from tests.cases.torch_known import Seen

    library = torch.library.Library("torchkv", "IMPL")
    yield Seen(monkeypatch, library)
    library._destroy()
