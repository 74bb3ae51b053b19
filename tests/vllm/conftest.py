"""A stand-in for vLLM, and both ways to run without a GPU."""

import sys
import types

import pytest

import torchkv
from tests.cases.vllm import SIGNATURES
from torchkv import mla, quantize, read, write


@pytest.fixture(params=("torch", "interpret"))
def backend(request, monkeypatch):
    """Runs what the functions call with this backend, though vLLM's parameters have no place for it."""
    for module in (write, quantize, mla, read):
        for name in vars(module).keys() & {*torchkv.__all__} - {"CacheLayout"}:
            whole = getattr(module, name)

            def with_backend(*args, _whole=whole, **options):
                return _whole(*args, **options, backend=request.param)

            monkeypatch.setattr(module, name, with_backend)
    return request.param


@pytest.fixture
def stand_in(monkeypatch):
    """A vLLM of nothing but functions that note their calls, and a backend that has imported them."""
    calls = []

    def function(name, parameters):
        scope = {"calls": calls, "name": name}
        names = [p.strip().partition("=")[0] for p in parameters.split(",")]
        body = f"calls.append((name, dict({', '.join(f'{n}={n}' for n in names)})))"
        exec(f"def {name}({parameters}):\n    {body}\n    return 'from vLLM'", scope)
        return scope[name]

    modules = {"vllm": types.ModuleType("vllm"), "vllm.v1.attention.backends.triton_attn": types.ModuleType("backend")}
    for where, parameters in SIGNATURES.items():
        home, _, name = where.rpartition(".")
        module = modules.setdefault(f"vllm.{home}", types.ModuleType(f"vllm.{home}"))
        setattr(module, name, function(name, parameters))
    backend = modules["vllm.v1.attention.backends.triton_attn"]
    for where in SIGNATURES:
        home, _, name = where.rpartition(".")
        setattr(backend, name, getattr(modules[f"vllm.{home}"], name))
    backend.renamed = backend.unified_attention  # from … import unified_attention as renamed
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(modules=modules, backend=backend, calls=calls)
