"""Compile a plan's kernel ahead of time: neither torch nor JAX nor a GPU is needed."""

import importlib
from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcore.plan import KernelPlan, Target
from kvcore.quantization import FP8

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
    """
    function = kernel_function(kernel)
    signature: dict[str, str] = {}
    for name, dtype in pointers.items():
        signature[name] = "constexpr" if dtype is None else "i64" if dtype == "scalar" else f"*{_ELEMENTS[dtype]}"
    signature |= kernel.scalars | dict.fromkeys(kernel.constexprs, "constexpr")
    place = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in function.arg_names},
        constexprs={(place[n],): v for n, v in kernel.constexprs.items()}
        | {(place[n],): None for n, dtype in pointers.items() if dtype is None},
        attrs={(place[n],): [["tt.divisibility", 16]] for n in aligned if pointers[n] is not None},
    )
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": kernel.num_warps, **kernel.options})


def kernel_function(kernel: KernelPlan) -> Any:
    """The function that Triton compiles."""
    return getattr(importlib.import_module(f"kvcore.kernels.{kernel.module}"), kernel.name)
