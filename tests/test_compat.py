"""The shim for jax-triton, in a fresh process: applied where it is needed, on whatever versions are installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

# Not importorskip: on Triton 3.6, importing jax_triton before the shim is there breaks it for good.
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("jax_triton"), reason="jax_triton is not installed")

CHECK = """
import inspect, os
import jax
import jaxkv._triton
from jax._src.interpreters import partial_eval
from jax_triton import triton_lib
from triton.backends.nvidia import driver

rule = partial_eval.dce_rules[triton_lib.triton_kernel_call_p]
native = partial_eval.dce_rules[jax._src.pjit.jit_p]
assert len(inspect.signature(rule).parameters) == len(inspect.signature(native).parameters)
assert (rule is triton_lib._triton_kernel_call_dce_rule) == (jax.__version_info__ < (0, 12))
assert hasattr(driver, "TMA_TF32")
assert os.environ["TRITON_CACHE_DIR"] == "kept"
print("ok")
"""


def test_shim():
    environment = {**os.environ, "TRITON_CACHE_DIR": "kept", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
