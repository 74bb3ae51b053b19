"""Compile a plan's kernel ahead of time: neither torch nor JAX nor a GPU is needed."""

import importlib
import os
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvcore import installed

with installed.needed("triton", installed.TRITON):
    import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcore.formats import FP8
from kvcore.plan.kernel import Descriptor, KernelPlan, Target

LOCK = threading.RLock()
"""Held while Triton compiles or interprets: to interpret, it patches `triton.language`, which compiling reads."""

if hasattr(os, "register_at_fork"):  # a child has no thread that would release what another one held
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)

_ELEMENTS = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "int8": "u8",
    # The kernels handle quantised elements as bytes: not every target knows the types.
    **dict.fromkeys(FP8, "u8"),
}


def compile_kernel(
    kernel: KernelPlan, target: Target, pointers: Mapping[str, str | None], aligned: frozenset[str]
) -> Any:
    """Compiles a kernel.

    Args:
        kernel: What to compile.
        target: For what.
        pointers: For each pointer argument the dtype it points to, "scalar" for an integer in its place, or None.
        aligned: Names of the pointers that are multiples of 16.

    Returns:
        Triton's CompiledKernel.

    Raises:
        RuntimeError: this machine lacks something that Triton needs.
    """
    function = kernel_function(kernel)
    signature: dict[str, str] = {}
    for name, dtype in pointers.items():
        if name in kernel.descriptors:
            signature[name] = _descriptor_type(kernel.descriptors[name], _ELEMENTS[str(dtype)])
        else:
            signature[name] = "constexpr" if dtype is None else "i64" if dtype == "scalar" else f"*{_ELEMENTS[dtype]}"
    signature |= kernel.scalars | dict.fromkeys(kernel.constexprs, "constexpr")
    place = {name: i for i, name in enumerate(function.arg_names)}
    source = _source_type(function)(
        fn=function,
        signature={name: signature[name] for name in function.arg_names},
        constexprs={(place[n],): v for n, v in kernel.constexprs.items()}
        | {(place[n],): None for n, dtype in pointers.items() if dtype is None},
        # In an order of their own: Triton names what it keeps on disk after this dict as it prints.
        attrs={
            (place[n],): [["tt.divisibility", 16]]
            for n in function.arg_names
            if n in aligned and pointers[n] and n not in kernel.descriptors
        },
    )
    options = {"num_warps": kernel.num_warps, **kernel.options}
    with LOCK, readable_errors():
        return with_cache(lambda: triton.compile(source, target=GPUTarget(*target), options=options))


def has_gluon() -> bool:
    """Whether Triton has Gluon as the kernels in `kvcore.kernels.hopper` are written in it: since 3.8."""
    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 8)


def shared_layout(descriptor: Descriptor) -> Any:
    """The layout of a descriptor's box in shared memory, as Gluon has it."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(descriptor.swizzle, 16, len(descriptor.block))


def _descriptor_type(descriptor: Descriptor, element: str) -> str:
    """What Triton calls the type of a descriptor."""
    return f"tensordesc<{element}[{', '.join(map(str, descriptor.block))}],{shared_layout(descriptor)!r}>"


def _source_type(function: Any) -> Any:
    """What Triton compiles a function of Triton, or of Gluon, from."""
    if not function.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def kernel_function(kernel: KernelPlan) -> Any:
    """The function that Triton compiles."""
    with LOCK:
        return getattr(importlib.import_module(f"kvcore.kernels.{kernel.module}"), kernel.name)


def with_cache[T](build: Callable[[], T]) -> T:
    """Lets Triton build something: in a temporary folder where its cache folder cannot be used."""
    try:
        return build()
    except OSError as error:
        cache = knobs.cache.dir
        with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
            knobs.cache.dir = folder
            built = build()
        warnings.warn(
            f"Triton's cache folder {cache} cannot be used ({error.strerror or error}): every process compiles anew; "
            "the environment variable TRITON_CACHE_DIR can name another one",
            RuntimeWarning,
            stacklevel=2,
        )
        return built


@contextmanager
def readable_errors() -> Iterator[None]:
    """Makes one sentence, with what would help, of the errors for what Triton needs and a machine lacks."""
    try:
        yield
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, OSError) and not (isinstance(error, FileNotFoundError) and error.filename):
            remedy = "name a folder that can be written in the environment variable TRITON_CACHE_DIR"
        elif not isinstance(error, RuntimeError) or "C compiler" in message:  # its command is not there, or fails
            remedy = "install a C compiler and Python's headers, or name a compiler in the environment variable CC"
        elif "Triton Error" in message and ("image" in message or "PTX" in message):
            remedy = f"update the GPU's driver, or install a Triton older than {triton.__version__}"
        else:
            raise
        raise RuntimeError(f"Triton cannot start a kernel on this machine: {remedy} ({message})") from error
