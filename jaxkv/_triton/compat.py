"""Makes jax-triton 0.4.1 work with the versions of jax and Triton that it does not know, and keep what it compiled."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def import_jax_triton() -> Any:
    """Imports jax_triton and mends what this environment needs mended. Each part names when it can go."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "TMA_TF32"):  # Triton 3.6; jax-triton asks for 3.7 and imports this for TMA only
        driver.TMA_TF32 = 11
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache_dir is not None:  # importing jax_triton deletes the variable; torch's half of the process uses it
        os.environ["TRITON_CACHE_DIR"] = cache_dir

    # jax 0.12 calls dead-code rules with (used outputs, live inputs, equation), jax-triton's knows the outer two.
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    primitive = triton_lib.triton_kernel_call_p
    rule: Any = partial_eval.dce_rules[primitive]
    if jax.__version_info__ >= (0, 12) and len(inspect.signature(rule).parameters) == 2:
        partial_eval.dce_rules[primitive] = lambda used, live, equation: rule(used, equation)

    # jax-triton compiles Gluon with the passes of Triton's language. Can go when it takes Gluon's own.
    compile_ttir = with_passes_of_gluon(triton_lib.compile_ttir_to_ptx_inplace)
    # It compiles anew in each process. Can go when it keeps results, as Triton does for torch.
    triton_lib.compile_ttir_to_ptx_inplace = kept_on_disk(compile_ttir)
    # It launches as many warps as it was told. Can go when it launches as many as were compiled.
    if triton_lib.triton_kernel_call_lib is not None:
        triton_lib.triton_kernel_call_lib = WithCompiledWarps(triton_lib.triton_kernel_call_lib)
    # Of threads that want the same kernel, one compiles; and none while another thread interprets.
    function = triton_lib.TritonFunction
    function.get_or_create_kernel = _one_at_a_time(function.get_or_create_kernel)
    return jax_triton


class WithCompiledWarps:
    """jaxlib's module that makes kernels, where they are launched with as many warps as they were compiled for.

    A kernel whose warps have different work is compiled for more than a plan says, and hangs with fewer. The number is
    in its PTX, so it comes with each result of the compiler, wherever that was kept.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def TritonKernel(self, name: str, num_warps: int, num_ctas: int, shared: int, binary: str, *rest: Any) -> Any:  # noqa: N802
        """A kernel; `binary` is PTX, or the path of a file for ROCm."""
        threads = re.search(r"^\s*\.reqntid (\d+)", binary, re.MULTILINE)
        if threads is not None:
            num_warps = int(threads[1]) // 32
        return self._library.TritonKernel(name, num_warps, num_ctas, shared, binary, *rest)


def with_passes_of_gluon(compile_ttir: Callable[..., Any]) -> Callable[..., Any]:
    """jax_triton's `compile_ttir_to_ptx_inplace`, which takes modules of Gluon through Gluon's passes, as Triton does.

    They have their layouts, and Triton's passes would choose others.
    """

    @functools.wraps(compile_ttir)
    def compile_either(ttir: Any, backend: Any, options: Any, capability: int) -> Any:
        # Until Triton's own passes ran, only Gluon has said how many warps there are.
        gluon = ttir.get_int_attr("ttg.num-warps") is not None
        return compile_ttir(ttir, _Gluon(backend) if gluon else backend, options, capability)

    return compile_either


class _Gluon:
    """A backend of Triton for modules of Gluon."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, *_: Any) -> Any:
        return module

    def make_ttgir(self, module: Any, *arguments: Any) -> Any:
        return self._backend.gluon_to_ttgir(module, *arguments)


def _one_at_a_time(compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    from kvcore.run.compiler import LOCK

    @functools.wraps(compile_kernel)
    def locked(*args: Any, **options: Any) -> Any:
        with LOCK:
            return compile_kernel(*args, **options)

    return locked


def cache_dir() -> Path | None:
    """The folder of compile results: $JAXKV_CACHE_DIR, or jaxkv in the user's cache folder. None: nothing is kept."""
    named = os.environ.get("JAXKV_CACHE_DIR")
    if named is not None:
        return Path(named) if named else None
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(users, "jaxkv") if os.path.isabs(users) else None  # relative: to be ignored, or there is no home


def kept_on_disk(compile_ttir: Callable[..., Any]) -> Callable[..., Any]:
    """jax_triton's `compile_ttir_to_ptx_inplace`, with results in `cache_dir`.

    An entry is named after all that the result depends on. What cannot be read, or is not what was written, is compiled
    anew and replaced; what cannot be written is not kept.
    """
    import jax_triton
    import triton
    from jax_triton import triton_lib
    from triton import knobs
    from triton._C.libtriton import get_cache_invalidating_env_vars  # type: ignore
    from triton.backends.nvidia import compiler as nvidia

    @functools.wraps(compile_ttir)
    def load_or_compile(ttir: Any, backend: Any, options: Any, capability: int) -> Any:
        folder = cache_dir()
        # Who wants to see the steps wants them taken.
        steps = options.debug or triton_lib._JAX_TRITON_DUMP_DIR or knobs.compilation.always_compile
        if folder is None or steps:
            return compile_ttir(ttir, backend, options, capability)
        ptx_version = nvidia.get_ptx_version_from_options(options, backend.target.arch)  # of ptxas, if none is given
        versions = (triton.__version__, jax_triton.__version__, ptx_version)
        variables = sorted(get_cache_invalidating_env_vars().items())
        key = "\n".join(map(repr, (versions, capability, options, variables, str(ttir))))
        entry = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        stored = _load(entry)
        if stored is not None:
            return triton_lib.CompilationResult(**stored, ttgir="", llir="")
        result = compile_ttir(ttir, backend, options, capability)
        names = (field.name for field in dataclasses.fields(result))
        _store(entry, {name: getattr(result, name) for name in names if name not in ("ttgir", "llir")})
        return result

    return load_or_compile


def _load(entry: Path) -> dict[str, Any] | None:
    """What was stored; None where nothing was, or where it is damaged."""
    try:
        checksum, _, content = entry.read_bytes().partition(b"\n")
    except OSError:
        return None
    return json.loads(content) if checksum == _checksum(content) else None


def _store(entry: Path, result: dict[str, Any]) -> None:
    """Writes an entry, whole or not at all."""
    content = json.dumps(result).encode()
    with contextlib.suppress(OSError):  # read-only, full, no folder: the next process compiles it, too
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent) as beside:
            new = Path(beside, entry.name)
            new.write_bytes(_checksum(content) + b"\n" + content)
            new.replace(entry)


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
