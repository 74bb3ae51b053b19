"""What importing each package brings along, each time in a fresh process."""

import pytest

from tests.cases.processes import JAX_WRITE, ROOT, TORCH_WRITE, packages, run


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
