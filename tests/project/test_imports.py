"""What importing each package brings along, each time in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvcore

ROOT = Path(kvcore.__file__).parents[1]

# Makes imports of some packages fail as if they were not installed.
HIDE = """
import sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: hidden by a test", name=name)

sys.meta_path.insert(0, Hidden)
"""

# One token into slot 5, that is place 1 of block 1.
JAX_WRITE = """
import jax.numpy as jnp
row = jnp.full((1, 2, 8), 3.0)
key_cache, value_cache = jaxkv.reshape_and_cache_flash(
    row, -row, jnp.zeros((3, 4, 2, 8)), jnp.zeros((3, 4, 2, 8)), jnp.array([5]))
assert (key_cache[1, 1] == 3).all() and (key_cache == 0).sum() == 11 * 16
assert (value_cache[1, 1] == -3).all() and (value_cache == 0).sum() == 11 * 16
kv_cache = jaxkv.reshape_and_cache_flash_diffkv(
    row, -row, jnp.zeros((3, 4, 2, 16), jnp.uint8), jnp.array([5]), "fp8", 1.5, layout="PACKED_NHD")
assert (kv_cache[1, 1, :, :8] == 0x40).all() and (kv_cache[1, 1, :, 8:] == 0xC4).all()
"""

TORCH_WRITE = """
import torch
row = torch.full((1, 2, 8), 3.0)
key_cache, value_cache = torch.zeros(2, 3, 4, 2, 8)
torchkv.reshape_and_cache_flash(row, -row, key_cache, value_cache, torch.tensor([5]))
assert (key_cache[1, 1] == 3).all() and (key_cache == 0).sum() == 11 * 16
assert (value_cache[1, 1] == -3).all() and (value_cache == 0).sum() == 11 * 16
kv_cache = torch.zeros(3, 4, 2, 16, dtype=torch.uint8)
torchkv.reshape_and_cache_flash_diffkv(row, -row, kv_cache, torch.tensor([5]), "fp8", 1.5, layout="PACKED_NHD")
assert (kv_cache[1, 1, :, :8] == 0x40).all() and (kv_cache[1, 1, :, 8:] == 0xC4).all()
"""


def run(code, hidden=(), *, text=False):
    """Runs code without the hidden packages; gives what it printed, or the names of all modules that it imported."""
    code = f"{HIDE.format(names=set(hidden))}\n{code}\nprint('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout if text else set(done.stdout.rpartition("modules:")[2].split())


def packages(modules):
    return {name.partition(".")[0] for name in modules}


def test_hidden_packages_cannot_be_imported():
    code = """
for name in ("wave", "wave.sub", "json.tool"):
    try:
        __import__(name)
    except ImportError as error:
        assert "hidden by a test" in str(error)
    else:
        raise AssertionError(name)
"""
    assert not packages(run(code, {"wave", "json"})) & {"wave", "json"}


def test_jaxkv_without_torch_and_triton():
    modules = run("import jaxkv" + JAX_WRITE, {"torch", "triton", "jax_triton", "torchkv"})
    assert "jaxkv.write" in modules


def test_jaxkv_imports_neither_torch_nor_triton():
    modules = run("import jaxkv" + JAX_WRITE)
    assert not packages(modules) & {"torch", "triton", "jax_triton", "torchkv"}
    assert not {name for name in modules if name.startswith("kvcore.kernels")}


def test_jaxkv_interprets_without_torch():
    code = JAX_WRITE.replace("]))", ']), backend="interpret")').replace(
        '"PACKED_NHD")', '"PACKED_NHD", backend="interpret")'
    )
    assert code.count("interpret") == 2
    modules = run("import jaxkv" + code, {"torch", "jax_triton", "torchkv"})
    assert "triton" in modules


def test_torchkv_imports_no_jax():
    modules = run("import torchkv" + TORCH_WRITE)
    assert not packages(modules) & {"jax", "jaxlib", "jax_triton", "jaxkv"}
    assert not {name for name in modules if name.startswith(("kvcore.kernels", "kvcore.run.interpreter"))}


def test_torchkv_without_jax_and_triton():
    run("import torchkv" + TORCH_WRITE, {"jax", "jaxlib", "jax_triton", "ml_dtypes", "jaxkv", "triton"})


def test_torchkv_interprets_without_jax():
    code = TORCH_WRITE.replace("[5]))", '[5]), backend="interpret")').replace('_NHD")', '_NHD", backend="interpret")')
    assert code.count("interpret") == 2
    modules = run("import torchkv" + code, {"jax", "jaxlib", "jax_triton", "ml_dtypes", "jaxkv"})
    assert "triton" in modules


FRAMEWORKS = {"jax", "jaxlib", "jax_triton", "torch", "jaxkv", "torchkv"}
WITH_TRITON = {"kvcore.run.compiler", "kvcore.run.interpreter"}
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "kvcore").rglob("*.py")
)
KERNELS = {name for name in MODULES if name.startswith("kvcore.kernels")}


def test_kvcore_without_frameworks_and_triton():
    plain = set(MODULES) - KERNELS - WITH_TRITON
    assert {"kvcore", "kvcore.contract.write", "kvcore.layout", "kvcore.plan.write", "kvcore.oracle.write"} <= plain
    modules = run(f"import {', '.join(sorted(plain))}", FRAMEWORKS | {"triton", "ml_dtypes"})
    assert {name for name in modules if name.startswith("kvcore")} == plain


def test_kvcore_imports_no_framework_on_its_own():
    plain = set(MODULES) - KERNELS - WITH_TRITON
    modules = run(f"import {', '.join(sorted(plain))}")
    assert not packages(modules) & (FRAMEWORKS | {"triton"})


@pytest.mark.parametrize("names", [KERNELS, WITH_TRITON], ids=["kernels", "compiler and interpreter"])
def test_kvcore_uses_triton_without_frameworks(names):
    modules = run(f"import {', '.join(sorted(names))}", FRAMEWORKS)
    assert "triton" in modules
    if names == KERNELS:  # nothing else of kvcore
        assert {name for name in modules if name.startswith("kvcore")} == KERNELS | {"kvcore", "kvcore.installed"}
