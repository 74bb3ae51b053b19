"""What tests of bad calls share."""

import pytest

import torchkv
from jaxkv._primitive.write import write_p
from kvcore.run import interpreter


@pytest.fixture
def launches(monkeypatch):
    """What began to write."""
    seen = []

    def record(owner, name):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(write_p, "bind")
    record(torchkv._torch.write, "_encode")
    record(interpreter, "run")
    return seen
