"""What type checkers say of typical use, of README's code, and of wrong uses; and the types beside what decides."""

import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args, get_overloads

import numpy as np
import pytest

import jaxkv
import jaxkv._arguments
import torchkv
import torchkv._arguments
from kvcore import choices
from kvcore.arrays import ArraySpec
from kvcore.contract.checks import either
from kvcore.contract.scales import check_kv_scales
from kvcore.formats import FLOATS, KV_CACHE_DTYPES, NVFP4, PER_TOKEN_HEAD
from kvcore.layout import CacheLayout
from kvcore.pattern import CONSTANTS
from tests.cases.pages import README, python_blocks

ROOT = Path(__file__).parents[2]
RIGHT, WRONG = ROOT / "tests" / "project" / "typing" / "right.py", ROOT / "tests" / "project" / "typing" / "wrong.py"

# Parts of frameworks that no signature of ours needs: most of mypy's time.
MYPY = """
[mypy]
[mypy-torch._inductor.*,torch._dynamo.*,torch._export.*,torch.ao.*,torch.onnx.*,torch.testing.*,sympy.*,triton.*]
follow_imports = skip
"""


def pyright(files, folder):
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [
        (Path(found["file"]), found["range"]["start"]["line"] + 1, found["message"])
        for found in json.loads(done.stdout)["generalDiagnostics"]
        if found["severity"] == "error"
    ]


def mypy(files, folder):
    config = folder / "mypy.ini"
    config.write_text(MYPY)
    options = ["--output=json", f"--config-file={config}", f"--cache-dir={folder / 'mypy'}"]
    command = [sys.executable, "-m", "mypy", *options, *map(str, files)]
    # As installed packages: mypy reports what their users do, not what it thinks of their insides.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert not done.stderr
    found = map(json.loads, done.stdout.splitlines())
    return [(ROOT / f["file"], f["line"], f["message"]) for f in found if f["severity"] == "error"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each type checker says of all files: one run of each, both at once."""
    folder = tmp_path_factory.mktemp("types")
    files = [RIGHT, WRONG]
    for number, block in enumerate(python_blocks(README.read_text())):
        files.append(folder / f"readme_{number}.py")
        files[-1].write_text(block)
    with ThreadPoolExecutor() as pool:
        runs = {checker.__name__: pool.submit(checker, files, folder) for checker in (pyright, mypy)}
        return {name: run.result() for name, run in runs.items()}


pytestmark = pytest.mark.xdist_group("typing")


@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_typical_use_and_readme_pass(reports, checker):
    assert [found for found in reports[checker] if found[0] != WRONG] == []


@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_every_wrong_use_is_reported(reports, checker):
    lines = enumerate(WRONG.read_text().splitlines(), 1)
    wrong = {number for number, line in lines if line.endswith("# wrong")}
    assert len(wrong) > 30
    assert {line for file, line, _ in reports[checker] if file == WRONG} == wrong


def test_choices_are_those_that_decide_at_run_time():
    assert get_args(choices.KVCacheDtype) == tuple(KV_CACHE_DTYPES)
    assert get_args(choices.PerTokenHeadDtype) == PER_TOKEN_HEAD
    assert get_args(choices.ScaledDtype) == (*PER_TOKEN_HEAD, NVFP4.name)
    assert set(get_args(choices.FloatDtype)) == set(FLOATS)
    assert get_args(choices.JaxBackend) == jaxkv._arguments.BACKENDS
    assert get_args(choices.TorchBackend) == torchkv._arguments.BACKENDS
    assert get_args(choices.LayoutName) == tuple(CONSTANTS)


def test_choices_of_scales_are_those_that_the_contract_names():
    rows = ArraySpec((2, 3, 4), "float32")
    with pytest.raises(ValueError, match=f"must be {either(map(repr, get_args(choices.ScaledDtype)))}, got"):
        check_kv_scales(rows, rows, "none", "tensor")
    with pytest.raises(ValueError, match=f"must be {either(map(repr, get_args(choices.Granularity)))}, got"):
        check_kv_scales(rows, rows, "int8", "none")


def keywords(function):
    """Names and types of the arguments after the `*`."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in found if p.kind == p.KEYWORD_ONLY}


OVERLOADED = [
    *(function for name, function in inspect.getmembers(jaxkv, inspect.isfunction) if "_and_cache_" in name),
    *(f for module in (jaxkv, torchkv) for f in (module.paged_attention, module.PagedKVCache.attend)),
]


@pytest.mark.parametrize("function", OVERLOADED, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_overloads_take_what_the_function_takes(function):
    overloads = get_overloads(function)
    assert len(overloads) in (2, 3)
    for overload in overloads:
        signature = inspect.signature(overload)
        (options,) = get_args(signature.parameters["options"].annotation)
        taken = keywords(function)
        if function.__name__ in ("paged_attention", "attend"):
            taken.pop("return_lse")
        assert options.__annotations__ == taken
        positional = [p.name for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        own = inspect.signature(function).parameters.values()
        assert positional == [p.name for p in own if p.kind == p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("module", [jaxkv, torchkv], ids=["jax", "torch"])
def test_a_typo_is_a_type_error_that_names_the_method(module):
    extents = dict(num_blocks=2, block_size=4, num_heads=1, head_size=8)
    cache = module.PagedKVCache.create(**extents)
    array = np.ones((1, 1, 8), np.float32)
    with pytest.raises(TypeError, match=r"write\(\) got an unexpected keyword argument 'layr'"):
        cache.write(array, array, array, layr=1)
    with pytest.raises(TypeError, match=r"attend\(\) got an unexpected keyword argument 'slding_window'"):
        cache.attend(array, array, array, slding_window=3)
    with pytest.raises(TypeError, match=r"attend\(\) got an unexpected keyword argument 'kv_cache_dtype'"):
        cache.attend(array, array, array, kv_cache_dtype="fp8")
    with pytest.raises(TypeError, match=r"gather\(\) got an unexpected keyword argument 'head_size'"):
        cache.gather(array, array, 3, head_size=8)
    with pytest.raises(TypeError, match=r"describe\(\) got an unexpected keyword argument 'head_sise'"):
        CacheLayout.NHD.describe(**extents, head_sise=8)
