"""Run the kernels in Triton's interpreter, on host memory, whether or not the process also compiles them.

Triton decides when a kernel is decorated. So the package of kernels is loaded a second time, under a name of its
own, with interpretation switched on; the package that is compiled stays as it is.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from kvcore import kernels
from kvcore.formats import FP8
from kvcore.plan.kernel import KernelPlan
from kvcore.run.compiler import LOCK

_NAME = "kvcore._interpreted_kernels"


class Pointer:
    """Address and dtype of host memory, as the interpreter expects them of a torch tensor; nothing is copied.

    Args:
        address: Where the first element lies, in bytes.
        dtype: Name of the elements' dtype ("bfloat16").
    """

    def __init__(self, address: int, dtype: str) -> None:
        self._address = address
        self.dtype = "uint8" if dtype in FP8 or dtype == "int8" else dtype  # the kernels handle these as bytes

    def data_ptr(self) -> int:
        return self._address

    # The interpreter copies tensors to the host and back. Memory that is there already needs neither.

    def untyped_storage(self) -> "Pointer":
        return self

    def cpu(self) -> "Pointer":
        return self

    def new_empty(self, _size: int, device: str) -> "Pointer":
        return Pointer(self._address, self.dtype)

    def set_(self, *_: Any) -> None: ...

    def copy_(self, _: "Pointer") -> None: ...

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    def stride(self) -> tuple[int, ...]:
        return ()


def run(kernel: KernelPlan, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    """Interprets a kernel.

    Args:
        kernel: From a plan for `kvcore.plan.kernel.INTERPRETER`.
        grid: Programs along each axis.
        arguments: `Pointer`, integer or None for each pointer and scalar of the kernel, in order.
    """
    if 0 in grid:
        return
    with LOCK, _unread_checks_off(), np.errstate(all="ignore"):  # NaN and infinity are input like any other
        getattr(_interpreted(kernel.module), kernel.name)[grid](*arguments, **kernel.constexprs)


@contextmanager
def _unread_checks_off() -> Iterator[None]:
    """Triton works out whether integers overflow, and without `debug` nobody asks: half of the time, for nothing."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    try:
        yield
    finally:
        interpreter_builder.options = options


@cache
def _interpreted(module: str) -> ModuleType:
    from triton import knobs

    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            _NAME, kernels.__file__, submodule_search_locations=list(kernels.__path__)
        )
        assert spec is not None
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        loaded = importlib.import_module(f"{_NAME}.{module}")
    _call_directly()
    return loaded


def _call_directly() -> None:
    """Has kernels call each other's functions as they are.

    Triton puts all of its language's functions in their interpreted form before a launch, and once more before each
    call from one function to another: a third of the time, for nothing, as no launch ends in between.
    """
    from triton.runtime.interpreter import InterpretedFunction

    class Function(InterpretedFunction):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.rewrite()(*args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith(_NAME):
            for value in vars(module).values():
                if type(value) is InterpretedFunction:
                    value.__class__ = Function
