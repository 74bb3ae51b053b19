"""The shim for jax-triton: applied where it is needed, on whatever versions are installed; it keeps compile results."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Not importorskip: on Triton 3.6, importing jax_triton before the shim is there breaks it for good.
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("jax_triton"), reason="jax_triton is not installed")

CHECK = """
import inspect, os
import jax
import jaxkv._triton.launch
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


# ---- compile results on disk

LOWER = """
import hashlib, json, sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock
import jax, jax.numpy as jnp
import jaxkv, jaxkv._triton.launch
from jax_triton import triton_lib
from triton.backends.nvidia.compiler import CUDABackend

compiled, kernels = [], []
make_ptx = CUDABackend.make_ptx

def counted(self, src, metadata, *rest):
    compiled.append(None)
    return make_ptx(self, src, metadata, *rest)

def kernel(*arguments):
    kernels.append(hashlib.sha256(repr(arguments).encode()).hexdigest())

CUDABackend.make_ptx = counted
triton_lib.triton_kernel_call_lib = MagicMock(TritonKernel=kernel)  # jaxlib has it with its CUDA plugin only
triton_lib.triton_kernel_call_lib.TritonKernelCall.return_value.to_proto.return_value = b"call"

def lower(n):
    rows, cache = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((7, 2, 16 * n), (5, 8, 2, 16 * n)))
    slots = jax.ShapeDtypeStruct((7,), "int32")
    jax.jit(jaxkv.reshape_and_cache_flash).trace(rows, rows, cache, cache, slots).lower(lowering_platforms=("cuda",))

with ThreadPoolExecutor(int(sys.argv[1])) as threads:
    list(threads.map(lower, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]))
print(json.dumps([len(compiled), sorted(set(kernels))]))
"""


def lower(folder, threads):
    """Lowers five writes, twice each, in a process of its own: how often it compiled, and digests of the kernels."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAXKV_CACHE_DIR": str(folder), "JAXKV_COMPUTE_CAPABILITY": "90",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LOWER, str(threads)], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_a_second_process_compiles_nothing_and_launches_the_same_kernels(tmp_path):
    compiled, kernels = lower(tmp_path, threads=1)
    assert compiled == len(kernels) == 5
    assert lower(tmp_path, threads=10) == [0, kernels]
    compiled, at_once = lower(tmp_path / "new", threads=10)
    assert compiled == 5  # of threads that want the same, one compiles
    assert at_once == kernels
    assert len(list(tmp_path.glob("new/*"))) == 5  # nothing half-written is left


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that counts, kept in `tmp_path / "kept"`: called with what is compiled and options."""
    from jaxkv._triton import compat as _compat
    from jaxkv._triton import launch as _triton

    triton_lib = _triton.jt.triton_lib
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    meta = dict(block_size=[1, 8], elem_size=2, elem_type=6, fp4_padded=False, is_im2col=False, swizzle=3)

    def compile_ttir(ttir, backend, options, capability):
        compiler.calls += 1
        return triton_lib.CompilationResult(
            binary=f"{ttir}: ≤ {options.num_warps} warps\n", name="kernel", shared_mem_bytes=48, ttgir="", llir="",
            global_scratch_size=None, global_scratch_align=16,
            tensordesc_meta=[meta],
        )  # fmt: skip

    def compiler(ttir="module", capability=90, **options):
        backend = make_backend(GPUTarget("cuda", capability, 32))
        given = {"num_warps": 4, "ptx_version": 80, "enable_fp_fusion": True, **options}
        options = backend.parse_options(given)
        result = kept(ttir, backend, options, capability)
        assert result == compile_ttir(ttir, backend, options, capability)
        compiler.calls -= 1
        return result

    kept = _compat.kept_on_disk(compile_ttir)
    monkeypatch.setenv("JAXKV_CACHE_DIR", str(tmp_path / "kept"))
    compiler.calls, compiler.folder = 0, tmp_path / "kept"
    return compiler


def test_the_same_is_compiled_once_and_anything_else_anew(compiler, monkeypatch):
    import jax_triton
    import triton
    from triton.backends.nvidia import compiler as nvidia

    def call(**options):
        before = compiler.calls
        for _ in range(2):
            compiler(**options)
        return compiler.calls - before

    assert call() == 1
    assert call() == 0
    for options in ({"ttir": "another"}, {"capability": 100}, {"num_warps": 8}, {"ptx_version": 81}, {"num_stages": 5},
                    {"enable_fp_fusion": False}, {"maxnreg": 128}):  # fmt: skip
        assert call(**options) == 1, options
    for module in (triton, jax_triton):
        monkeypatch.setattr(module, "__version__", "0")
        assert call() == 1
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    assert call() == 1
    for version in (86, 87):  # of the ptxas that is found, where no version is asked for
        monkeypatch.setattr(nvidia, "get_ptx_version_from_options", lambda options, arch, version=version: version)
        assert call(ptx_version=None) == 1


def test_who_wants_to_see_the_steps_gets_them(compiler, monkeypatch):
    compiler()
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    compiler()
    assert compiler.calls == 2
    monkeypatch.delenv("TRITON_ALWAYS_COMPILE")
    for _ in range(2):
        compiler(debug=True)
    assert compiler.calls == 4
    monkeypatch.setattr("jax_triton.triton_lib._JAX_TRITON_DUMP_DIR", "somewhere")
    compiler()
    assert compiler.calls == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:100],
        lambda whole: whole[:-1],
        lambda whole: whole.replace(b"warps", b"wraps"),
        lambda whole: b"\xff" + whole[1:],
        lambda whole: b"{}",
    ],
)
def test_a_damaged_entry_is_compiled_again_and_replaced(compiler, damage):
    compiler()
    (entry,) = compiler.folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert entry.read_bytes() != whole
    compiler()
    assert compiler.calls == 2
    assert entry.read_bytes() == whole
    compiler()
    assert compiler.calls == 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("method", ["mkdir", "write_bytes", "replace"])
def test_a_folder_that_is_full_or_read_only_is_no_error(compiler, monkeypatch, method, error):
    def fail(self, *rest, **options):
        if method == "write_bytes":
            self.write_text("half of it")
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, method, fail)
    for _ in range(2):
        compiler()
    assert compiler.calls == 2
    assert not list(compiler.folder.glob("**/*"))
    monkeypatch.undo()
    monkeypatch.setenv("JAXKV_CACHE_DIR", str(compiler.folder))
    for _ in range(2):
        compiler()
    assert compiler.calls == 3


def test_a_file_in_the_folders_place_is_no_error(compiler):
    compiler.folder.write_text("mine")
    compiler()
    assert compiler.calls == 1
    assert compiler.folder.read_text() == "mine"


def test_where_results_are_kept(monkeypatch, tmp_path):
    from jaxkv._triton.compat import cache_dir

    for name in ("JAXKV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/jaxkv"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir() == Path("/elsewhere/jaxkv")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_dir() is None
    monkeypatch.setenv("JAXKV_CACHE_DIR", "/mine")
    assert cache_dir() == Path("/mine")
    monkeypatch.setenv("JAXKV_CACHE_DIR", "")
    assert cache_dir() is None
