"""Compile a plan's kernel ahead of time: neither torch nor JAX nor a GPU is needed."""

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcore import plan_attention, plan_gather
from kvcore.kernels import reshape_and_cache
from kvcore.plan import SCALARS, Target, WritePlan

_ELEMENTS = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    # The kernels handle fp8 as bytes: not every target knows the types.
    "float8_e4m3fn": "u8",
    "float8_e5m2": "u8",
}
SCALAR_TYPES: dict[str, str] = dict(zip(SCALARS, ("i32", "i64", "i32"), strict=True))
"""Of a write's run-time integers."""
ATTENTION_SCALAR_TYPES: dict[str, str] = dict.fromkeys(plan_attention.SCALARS, "i32")
GATHER_SCALAR_TYPES: dict[str, str] = dict.fromkeys(plan_gather.SCALARS, "i32")

# The write's arithmetic is exact as written: a fused multiply-add would round once where it rounds twice.
EXACT = {"enable_fp_fusion": False}


def compile_plan(plan: WritePlan, target: Target, arguments: Mapping[str, str | None], aligned: frozenset[str]) -> Any:
    """Compiles the kernel of a write.

    Args:
        plan: What to compile.
        target: For what.
        arguments: For each pointer argument of the kernel the dtype it points to, "scalar" for an integer `layer`,
            or None for an argument that is None.
        aligned: Names of the pointers that are multiples of 16.

    Returns:
        Triton's CompiledKernel.
    """
    kernel = getattr(reshape_and_cache, plan.kernel)
    return compile_kernel(kernel, target, arguments, SCALAR_TYPES, plan.constexprs, plan.num_warps, aligned, EXACT)


def compile_kernel(
    kernel: Any,
    target: Target,
    pointers: Mapping[str, str | None],
    scalars: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    aligned: frozenset[str],
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles any of the kernels.

    Args:
        kernel: A function of `kvcore.kernels`.
        target: What to compile for.
        pointers: For each pointer argument the dtype it points to, "scalar" for an integer in its place, or None.
        scalars: Types of the integers that are no pointers.
        constexprs: Compile-time arguments.
        num_warps: Warps per program.
        aligned: Names of the pointers that are multiples of 16.
        options: More options of the compiler.

    Returns:
        Triton's CompiledKernel.
    """
    signature: dict[str, str] = {}
    for name, dtype in pointers.items():
        signature[name] = "constexpr" if dtype is None else "i64" if dtype == "scalar" else f"*{_ELEMENTS[dtype]}"
    signature |= dict(scalars) | dict.fromkeys(constexprs, "constexpr")
    place = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(place[n],): v for n, v in constexprs.items()}
        | {(place[n],): None for n, dtype in pointers.items() if dtype is None},
        attrs={(place[n],): [["tt.divisibility", 16]] for n in aligned if pointers[n] is not None},
    )
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": num_warps, **(options or {})})
