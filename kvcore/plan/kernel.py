"""A kernel of a plan, and what it is compiled for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kvcore.formats import BFLOAT16, E4M3, E5M2, FLOAT16, FloatFormat


class Target(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        backend: "cuda", "hip" or "interpret".
        arch: Compute capability as an integer (90), or the name of a gfx architecture.
        warp_size: Threads that run in step.
    """

    backend: str
    arch: int | str
    warp_size: int = 32


INTERPRETER = Target("interpret", 0)


EXACT = {"enable_fp_fusion": False}
"""Options for arithmetic that is done as it is written: a fused multiply-add would round once, not twice."""


class Descriptor(NamedTuple):
    """An array as TMA sees it, and the box of it that is copied at once. Axes go from slowest to fastest.

    Attributes:
        shape: Sizes of the axes: coordinates beyond them are read as zeros.
        strides: In elements. The last is 1.
        block: Sizes of the box.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def swizzle(self) -> int:
        """Bytes within which shared memory permutes rows of the box, of 16-bit elements."""
        return min(128, 2 * self.block[-1])


class KernelPlan(NamedTuple):
    """A kernel, and all that its compilation depends on, except the types of its pointers.

    Attributes:
        module: Name of its module in `kvcore.kernels`.
        name: Its name there.
        num_warps: Warps per program.
        scalars: Its run-time integers, which follow the pointers, and their types.
        constexprs: Its compile-time arguments, by name.
        options: Options of the compiler.
        descriptors: Of the pointers that the kernel gets as TMA descriptors, by name: what they describe.
    """

    module: str
    name: str
    num_warps: int
    scalars: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    descriptors: Mapping[str, Descriptor] = MappingProxyType({})


def has_e4m3(target: Target) -> bool:
    """Whether the target converts e4m3 to other floats, which is exact."""
    return target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89


def converts_exactly(stored: FloatFormat, target: Target) -> bool:
    """Whether the compiler's cast from float32 rounds once, to nearest even, and saturates where the format does.

    True from sm_90 on (checked over all 2³² patterns on an H100), of the 16-bit formats except for the bits of NaN. To
    fp8, sm_89 rounds twice before Triton 3.9, sm_80 has no instruction, and the interpreter truncates, all formats:
    there the kernels encode with integer arithmetic.
    """
    formats = (E4M3, E5M2, BFLOAT16, FLOAT16)
    converts = stored._replace(name="") in [f._replace(name="") for f in formats]
    return converts and target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 90
