"""First launches where things go wrong: ten threads at once, fork, no folder, no compiler, an old driver."""

import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import kvcore
from kvcore.run.compiler import compile_kernel
from tests.cases.launches import H100, in_threads, use_driver, write_kernel
from torchkv._triton import launch as _launch

ROOT = Path(kvcore.__file__).parents[1]


def run(code, **environment):
    """Runs code in a process of its own, which must not hang."""
    code = f"import signal\nsignal.alarm(300)\n{code}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A fake driver, no kernels that were loaded, and an empty cache folder."""
    return use_driver(monkeypatch, tmp_path / "cache")


# ---- threads


def test_ten_threads_compile_each_kernel_once(driver, monkeypatch):
    compiled, compiler = [], triton.compile

    def counting(source, **options):
        compiled.append(source)
        return compiler(source, **options)

    monkeypatch.setattr(triton, "compile", counting)
    kernels = in_threads(10, lambda i: _launch.load(*write_kernel(16 << i % 2)))
    assert all(isinstance(k, _launch.Kernel) for k in kernels), kernels
    assert all(k is kernels[i % 2] for i, k in enumerate(kernels))
    assert kernels[0] is not kernels[1]
    assert len(compiled) == len(driver.loaded) == len(set(driver.loaded)) == 2


def test_kernels_are_compiled_while_others_are_interpreted():
    """To interpret, Triton patches the language that compiling reads."""
    run("""
import torch, torchkv
from kvcore.run.compiler import compile_kernel
from tests.cases.launches import H100, in_threads, write_kernel

def call(i):
    if i % 2:
        for n in range(2):
            kernel, *pointers = write_kernel(16 * (i + n))
            assert "st.global" in compile_kernel(kernel, H100, *pointers).asm["ptx"]
    else:
        for _ in range(4):
            key, caches = torch.randn(3, 2, 16), torch.zeros(2, 6, 4, 2, 16)
            torchkv.reshape_and_cache_flash(key, key, *caches, torch.tensor([1, 7, 9]), backend="interpret")
            assert (caches[:, [0, 1, 2], [1, 3, 1]] == key).all()

assert in_threads(6, call) == [None] * 6, in_threads(6, call)
""")


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_first_calls_of_torch_from_ten_threads(backend):
    run(f"""
import torch, torchkv
from tests.cases.launches import in_threads

def call(i):
    n = 1 + i // 2  # threads in pairs ask for the same
    key, caches = torch.randn(n, 2, 16), torch.zeros(2, 6, 4, 2, 16)
    torchkv.reshape_and_cache_flash(key, -key, *caches, torch.arange(n), backend={backend!r})
    got = torchkv.gather_kv(tuple(caches), torch.tensor([[0, 1]]), torch.tensor([n]), n, backend={backend!r})
    query = torch.zeros(1, 4, 16)
    out = torchkv.paged_attention(query, tuple(caches), torch.tensor([[0, 1]]), torch.tensor([n]), backend={backend!r})
    torch.testing.assert_close(out, -key.mean(0).repeat_interleave(2, 0)[None])
    return torch.equal(got[0][0], key)

results = in_threads(10, call)
assert results == [True] * 10, results
""")


@pytest.mark.parametrize("backend", [None, "interpret"])
def test_first_calls_of_jax_from_ten_threads(backend):
    run(f"""
import jax, jax.numpy as jnp, numpy as np, jaxkv
from tests.cases.launches import in_threads

def call(i):
    n = 1 + i // 2
    key = np.random.default_rng(i).standard_normal((n, 2, 16), np.float32)

    def step(key, slots):
        caches = jaxkv.reshape_and_cache_flash(
            key, -key, jnp.zeros((6, 4, 2, 16)), jnp.ones((6, 4, 2, 16)), slots, backend={backend!r})
        arrays = caches, jnp.array([[0, 1]]), jnp.array([n])
        return (*jaxkv.gather_kv(*arrays, n, backend={backend!r}),
                jaxkv.paged_attention(jnp.zeros((1, 4, 16)), *arrays, backend={backend!r}))

    keys, values, out = (jax.jit(step) if i % 2 else step)(key, np.arange(n))
    np.testing.assert_allclose(out, -key.mean(0).repeat(2, 0)[None], rtol=1e-5, atol=1e-6)
    return np.array_equal(keys[0], key) and np.array_equal(values[0], -key)

results = in_threads(10, call)
assert results == [True] * 10, results
""")


# ---- fork

CHILD = """
import os
pid = os.fork()
if pid == 0:
    signal.alarm(120)
    call("interpret")
    call(None)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""

TORCH_CALL = """
import torch, torchkv

def call(backend):
    key, caches = torch.randn(3, 2, 16), torch.zeros(2, 6, 4, 2, 16)
    torchkv.reshape_and_cache_flash(key, key, *caches, torch.tensor([1, 7, 9]), backend=backend)
    assert (caches[:, [0, 1, 2], [1, 3, 1]] == key).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("used", [False, True])
def test_fork_after_torchkv_was_imported(used):
    run(TORCH_CALL + "call('interpret')\ncall(None)\n" * used + CHILD + "call('interpret')")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_another_thread_interprets():
    """A lock that another thread holds at that moment would stay locked in the child."""
    run(TORCH_CALL + """
import threading
begun, done = threading.Event(), threading.Event()

def again_and_again():
    while not done.is_set():
        call("interpret")
        begun.set()

thread = threading.Thread(target=again_and_again)
thread.start()
begun.wait()
""" + CHILD + "done.set()\nthread.join()\ncall('interpret')")  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_jaxkv_was_imported():
    """Not after JAX was used: it warns of the deadlock of its own."""
    run("""
import numpy as np
import jax.numpy as jnp, jaxkv

def call(backend):
    key = np.random.default_rng(0).standard_normal((3, 2, 16), np.float32)
    caches = jnp.zeros((6, 4, 2, 16)), jnp.zeros((6, 4, 2, 16))
    caches = jaxkv.reshape_and_cache_flash(key, key, *caches, np.array([1, 7, 9]), backend=backend)
    assert all((np.asarray(c)[[0, 1, 2], [1, 3, 1]] == key).all() for c in caches)
""" + CHILD + "call('interpret')")  # fmt: skip


# ---- the cache folder


def no_folder(monkeypatch, tmp_path):
    """A file is where the folder should be."""
    (tmp_path / "cache").write_text("")


def full(monkeypatch, tmp_path):
    """Files cannot be written, though made."""

    def opened(path, mode="r", *rest):
        if "w" in mode and str(path).startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return open(path, mode, *rest)

    monkeypatch.setattr(triton.runtime.cache, "open", opened, raising=False)


def read_only(monkeypatch, tmp_path):
    """Folders cannot be made."""
    make = os.makedirs

    def makedirs(path, *args, **options):
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return make(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", makedirs)


FOLDERS = {"Not a directory": no_folder, "No space left on device": full, "Read-only file system": read_only}


@pytest.mark.parametrize("reason", FOLDERS)
def test_a_cache_folder_that_cannot_be_used(reason, driver, monkeypatch, tmp_path):
    FOLDERS[reason](monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning) as warned:
        kernel = _launch.load(*write_kernel())
    assert kernel.compiled.asm["cubin"] == driver.loaded[0]
    (message,) = {str(w.message) for w in warned if w.category is RuntimeWarning}
    assert message == (
        f"Triton's cache folder {tmp_path / 'cache'} cannot be used ({reason}): every process compiles anew; the "
        "environment variable TRITON_CACHE_DIR can name another one"
    )
    assert os.environ["TRITON_CACHE_DIR"] == triton.knobs.cache.dir == str(tmp_path / "cache")


def test_a_cache_folder_that_can_be_used_is(driver, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _launch.load(*write_kernel())
    assert list((tmp_path / "cache").rglob("*.cubin"))


def test_no_place_for_files_at_all(driver, monkeypatch):
    def opened(path, mode="r", *rest):
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return open(path, mode, *rest)

    monkeypatch.setattr(triton.runtime.cache, "open", opened, raising=False)
    with pytest.raises(RuntimeError) as error:
        _launch.load(*write_kernel())
    assert re.fullmatch(
        r"Triton cannot start a kernel on this machine: name a folder that can be written in the environment variable "
        r"TRITON_CACHE_DIR \(\[Errno 28\] No space left on device: '.*'\)",
        str(error.value),
    )
    assert isinstance(error.value.__cause__, OSError)


# ---- the compiler and the driver


@pytest.fixture
def utilities(driver, monkeypatch):
    """Triton's driver compiles utilities in C when it starts; so does this one."""
    from triton.runtime import build

    def create():
        build.compile_module_from_src(
            "#include <Python.h>\nstatic struct PyModuleDef module = {PyModuleDef_HEAD_INIT, \"utilities\"};\n"
            "PyMODINIT_FUNC PyInit_utilities(void) { return PyModule_Create(&module); }", "utilities"
        )  # fmt: skip
        return driver

    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", create)
    for function in vars(build).values():
        if hasattr(function, "cache_clear"):  # which compiler was found
            function.cache_clear()
    yield
    for function in vars(build).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.usefixtures("utilities")
@pytest.mark.parametrize("reason", FOLDERS)
def test_utilities_are_compiled_where_the_folder_cannot_be_used(reason, monkeypatch, tmp_path):
    FOLDERS[reason](monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning, match=re.escape(f"cannot be used ({reason})")):
        assert _launch.target() == H100


@pytest.mark.usefixtures("utilities")
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, "Failed to find C compiler.*"),
        ({"CC": "no-such-compiler"}, ".*'no-such-compiler'"),
        ({"CC": "false"}, "Command .* returned non-zero exit status 1."),
    ],
    ids=str,
)
def test_no_compiler(environment, message, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError) as error:
        _launch.target()
    assert re.fullmatch(
        r"Triton cannot start a kernel on this machine: install a C compiler and Python's headers, or name a compiler "
        rf"in the environment variable CC \({message}\)",
        str(error.value),
    )
    assert error.value.__cause__ is not None
    monkeypatch.undo()


@pytest.mark.parametrize(
    "found",
    [
        "device kernel image is invalid",
        "the provided PTX was compiled with an unsupported toolchain.",
        "no kernel image is available for execution on the device",
    ],
)
def test_a_driver_that_is_too_old(found, driver, monkeypatch):
    def load_binary(*_):
        raise RuntimeError(f"Triton Error [CUDA]: {found}")

    monkeypatch.setattr(driver, "load_binary", load_binary)
    with pytest.raises(RuntimeError) as error:
        _launch.load(*write_kernel())
    assert str(error.value) == (
        "Triton cannot start a kernel on this machine: update the GPU's driver, or install a Triton older than "
        f"{triton.__version__} (Triton Error [CUDA]: {found})"
    )
    monkeypatch.undo()


def test_other_errors_are_left_as_they_are(driver, monkeypatch):
    def load_binary(*_):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(driver, "load_binary", load_binary)
    with pytest.raises(RuntimeError, match=r"^Triton Error \[CUDA\]: an illegal memory access was encountered$"):
        _launch.load(*write_kernel())
    kernel, pointees, aligned = write_kernel()
    with pytest.raises(KeyError, match="bool"):
        compile_kernel(kernel, H100, pointees | {"key_ptr": "bool"}, aligned)
    monkeypatch.undo()
