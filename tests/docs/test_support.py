"""Records of tests, and the page that is made of them."""

import json
import subprocess
import sys

import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.write import check_write
from kvcore.layout import CacheLayout
from tests import record, support
from tests.cases.pages import ROOT


def test_the_page_is_of_these_records():
    assert support.PAGE.read_text() == support.page_of_project(), "run: python -m tests.support"


# ---- recording


@pytest.mark.parametrize("name", [*record.OPS, *record.PLANS, record.COMPILER])
def test_what_is_watched_is_there(name):
    code = record.code_of(name)
    arguments = code.co_varnames[: code.co_argcount]
    if name in record.OPS:
        assert {"call", "described"} & {*arguments}
        assert ("target" in arguments) == ("._triton." in name)
    elif name != record.COMPILER:
        assert arguments[0] in ("call", "write")
    else:
        assert arguments[:2] == ("kernel", "target")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("block head slot dim", "HND"),
        ("layer block head slot dim", "HND"),
        ("layer block head dim/x slot x, layer block head dim slot", "HEAD_MAJOR"),
        ("block layer head slot k+v", "BLHNC"),
        ("slot block head dim", "slot block head dim"),
    ],
)
def test_names_of_layouts(pattern, name):
    assert record.layout_name(CacheLayout.of(pattern)) == name


def test_what_a_call_is_about():
    rows, cache = ArraySpec((3, 2, 32), "bfloat16"), ArraySpec((4, 16, 2, 32), "uint8")
    scales = ArraySpec((4, 16, 2), "float32")
    for own, ending in (((), ""), ((scales, scales), " token_head")):
        arguments = CacheArguments([cache, cache], "fp8", scale_caches=own)
        call = check_write(rows, rows, ArraySpec((3,), "int32"), arguments)
        assert [*record.about(call)] == [("write", "NHD", f"fp8_e4m3{ending}")]


TESTS = """
import jax.numpy as jnp
import pytest
import torch

import jaxkv
import torchkv


@pytest.mark.parametrize("layout", ["HND", "KV_NHD"])
def test_passes(layout):
    cache = jaxkv.PagedKVCache.create(num_blocks=2, block_size=4, num_heads=1, head_size=8, layout=layout)
    cache.zero_blocks(jnp.array([1]))


def test_fails():
    cache = torchkv.PagedKVCache.create(num_blocks=2, block_size=4, num_heads=1, head_size=8)
    cache.zero_blocks(torch.tensor([1]))
    assert False


def test_compiles():
    from tests.compiled.test_ptx_write import TARGETS, compile_for

    compile_for(TARGETS["gfx942"], "PALLAS", dtype="float16")


def test_plans_only():
    from kvcore.plan.write import plan_write
    from tests.cases.writes import describe
    from tests.compiled.test_ptx_write import TARGETS

    plan_write(describe("INTERLEAVED"), TARGETS["sm_90"])


def test_skips():
    pytest.skip("for no reason")
"""


def test_a_run_is_recorded(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "tests.conftest", f"--rootdir={tmp_path}"]
    command += [f"--record={path}", str(tmp_path / "test_some.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    head, met = record.loads(path.read_text())
    assert {name: head[name] for name in ("passed", "skipped", "failed")} == {"passed": 4, "skipped": 1, "failed": 1}
    assert met == {
        ("portable", "jax", "blocks", "HND", "any"),
        ("portable", "jax", "blocks", "KV_NHD", "any"),
        ("gfx942", "kernel", "write", "PALLAS", "float16"),
    }
    assert {"date", "device", "versions", "commit", "command"} <= head.keys()
    assert str(tmp_path) not in head["command"]
    assert record.dumps(head, met) == path.read_text()
    json.loads(path.read_text())


# ---- the page

HEAD = {
    "device": "NVIDIA H100", "versions": {"jax": "1.2", "torch": "3.4", "numpy": "5.6"}, "date": "2026-01-02",
    "commit": "abc", "passed": 1234, "skipped": 1, "failed": 0,
}  # fmt: skip


def test_a_page():
    on_gpu = {
        ("sm_90", "jax", "write", "NHD", "int8 token_head"),
        ("sm_90", "torch", "write", "NHD", "int8 token_head"),
        ("sm_90", "torch", "gather", "NHD", "int8 token_head"),
        ("sm_90", "jax", "blocks", "slot block head dim", "any"),
        ("portable", "jax", "attention", "HND", "bfloat16"),
        ("sm_90", "kernel", "attention", "HND", "bfloat16"),
        ("sm_80", "jax", "attention", "HND", "bfloat16"),
    }
    compiled = {
        ("sm_100", "kernel", "attention", "MLA", "fp8_ds_mla"),
        ("sm_80", "kernel", "write", "NHD", "int4"),
        ("gfx942", "kernel", "write", "HND", "int4"),
    }
    on_cpu = {("interpret", "torch", "swap", "NHD", "any"), ("portable", "jax", "write", "HND", "float32")}
    met = {"cpu": on_cpu, "gpu": on_gpu, "compiled": compiled}
    lines = support.page({name: record.dumps(HEAD, found) for name, found in met.items()}).splitlines()
    versions = "jax 1.2, torch 3.4 | 2026-01-02, `abc` | 1,234 | 1 | 0 |"
    assert [line for line in lines if "abc" in line] == [
        f"| [{name}](../benchmarks/results/{name}-tests.json) | NVIDIA H100 | {versions}"
        for name in ("gpu", "compiled", "cpu")
    ]
    tables = "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ").partition("## On an NVIDIA H100")[2]
    assert [line for line in tables.splitlines() if line.startswith("|") and "---" not in line] == [
        "| | `int8 token_head` | `any` |",
        "| `NHD` | W G(torch) |  |",
        "| `slot block head dim` |  | B(jax) |",
        "| | sm_80 | sm_100 | gfx942 |",
        "| `int4` | W |  | W |",
        "| `fp8_ds_mla` |  | A |  |",
        "| | sm_80 | sm_100 | gfx942 |",
        "| `NHD` | W |  |  |",
        "| `HND` |  |  | W |",
        "| `MLA` |  | A |  |",
        "| | JAX | torch, kernels |",
        "| `float32` | W |  |",
        "| `any` |  | S |",
        "| | JAX | torch, kernels |",
        "| `NHD` |  | S |",
        "| `HND` | W |  |",
    ]
