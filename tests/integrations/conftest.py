"""Both ways to run without a GPU."""

import pytest


@pytest.fixture(params=("torch", "interpret"))
def torch_backend(request, monkeypatch):
    """Runs what torchkv's integrations call with this backend, though others' parameters have no place for it."""
    from torchkv import read, write

    for module, name in ((read, "paged_attention"), (write, "reshape_and_cache_flash")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=whole, **o: _f(*a, **o, backend=request.param))
    return request.param
