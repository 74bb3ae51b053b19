"""The shim for jax-triton, of kernels in Gluon: their own passes, and as many warps as were compiled."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

# Not importorskip: on Triton 3.6, importing jax_triton before the shim is there breaks it for good.
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("jax_triton"), reason="jax_triton is not installed")

PTX = """
.version 8.6
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
.reqntid 384
{
\t// .reqntid 32
}
"""


def test_as_many_warps_as_were_compiled():
    from jaxkv._triton.compat import WithCompiledWarps

    library = SimpleNamespace(TritonKernel=lambda *arguments: arguments, other="other")
    mended = WithCompiledWarps(library)
    assert mended.other == "other"
    for binary, warps in ((PTX, 12), (PTX.replace("384", "128"), 4), (PTX.replace(".reqntid 384", ""), 4), ("/a", 4)):
        assert mended.TritonKernel("kernel", 4, 1, 48, binary, "ttir", 90) == (
            "kernel", warps, 1, 48, binary, "ttir", 90,
        )  # fmt: skip


@pytest.mark.parametrize("gluon", [True, False])
def test_modules_of_gluon_take_its_passes(gluon):
    from jaxkv._triton.compat import with_passes_of_gluon

    class Backend:
        target = "sm_90"

        def make_ttir(self, module, *rest):
            return (*module, "ttir", *rest)

        make_ttgir = gluon_to_ttgir = None

    Backend.make_ttgir = lambda self, module, *rest: (*module, "ttgir", *rest)
    Backend.gluon_to_ttgir = lambda self, module, *rest: (*module, "gluon", *rest)

    def compile_ttir(module, backend, options, capability):
        assert backend.target == "sm_90"
        return backend.make_ttgir(backend.make_ttir(module, {}, options, capability), {}, options, capability)

    class Module(tuple):
        def get_int_attr(self, name):
            return 4 if gluon and name == "ttg.num-warps" else None

    steps = with_passes_of_gluon(compile_ttir)(Module(), Backend(), "options", 90)
    rest = ({}, "options", 90)
    assert steps == (("gluon", *rest) if gluon else ("ttir", *rest, "ttgir", *rest))


LOWER = """
import json
from unittest.mock import MagicMock
import jax
import jaxkv
from jaxkv._triton import compat, launch
from triton.backends.nvidia.compiler import CUDABackend

compiled, made = [], []
make_ptx = CUDABackend.make_ptx

def counted(self, *arguments):
    compiled.append(None)
    return make_ptx(self, *arguments)

CUDABackend.make_ptx = counted
library = MagicMock(TritonKernel=lambda name, num_warps, *rest: made.append((name, num_warps)))
library.TritonKernelCall.return_value.to_proto.return_value = b"call"
launch.jt.triton_lib.triton_kernel_call_lib = compat.WithCompiledWarps(library)

def spec(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, dtype)

def attend(query, cache, tables, lens, starts):
    return jaxkv.paged_attention(query, (cache, cache), tables, lens, query_start_loc=starts, causal=False)

query, cache = spec(512, 2, 64, dtype="bfloat16"), spec(64, 16, 2, 64, dtype="bfloat16")
jax.jit(attend).trace(query, cache, spec(2, 128), spec(2), spec(3)).lower(lowering_platforms=("cuda",))
print(json.dumps([len(compiled), made]))
"""


def test_the_number_comes_with_what_was_kept_on_disk(tmp_path):
    pytest.importorskip("triton", minversion="3.8")
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAXKV_CACHE_DIR": str(tmp_path), "JAXKV_COMPUTE_CAPABILITY": "90",
    }  # fmt: skip
    results = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LOWER], env=environment, capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        results.append(json.loads(done.stdout.splitlines()[0]))
    made = [["hopper_attention_kernel", 12], ["merge_attention_kernel", 4]]
    assert results == [[2, made], [0, made]]
