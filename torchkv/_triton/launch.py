"""Compiled kernels on torch's current device, started by integer pointers, past Triton's own launchers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.arrays import contiguous_strides
from kvcore.plan.kernel import Descriptor, KernelPlan, Target
from torchkv._arguments import dtype_name
from torchkv._memory import address_of

Grid = tuple[int, int, int]
"""Programs along each axis."""

Load = Callable[[KernelPlan, Mapping[str, str | None], frozenset[str]], Any]
"""Makes what is started: given a plan, what its pointers point to, and which of them are multiples of 16."""

Empty = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""A tensor that is to be made: its shape, its strides, its dtype."""

SCALARS = frozenset((type(None), bool, int, float, str))
"""Types of arguments that are no tensors. `isinstance` takes its time where the class is Tensor."""

MOST_LAUNCHES = 4096
"""Launches that are remembered of each kind: shapes that never come back would fill the memory."""


class Kernel(NamedTuple):
    """A compiled kernel and what its launches have in common.

    Attributes:
        compiled: Triton's CompiledKernel, which holds the loaded binary.
        run: Triton's launcher.
        hooks: triton.knobs.runtime.
        device: Index of the device that it is loaded on.
        constexprs: What stands for the compile-time arguments, which come last.
        launch: What the launcher calls, or itself: given a grid, a stream, `settings`, and the arguments.
        settings: What is between the stream and the arguments where no hook is set.
        packed: Whether the arguments are one, a tuple.
        descriptors: Which of the arguments are passed as TMA descriptors, and what they describe.
    """

    compiled: Any
    run: Callable[..., None]
    hooks: Any
    device: int
    constexprs: tuple[None, ...]
    launch: Callable[..., None]
    settings: tuple[Any, ...]
    packed: bool
    descriptors: tuple[tuple[int, Descriptor], ...]


class _Described:
    """What Triton's launcher makes a TMA descriptor of: it looks like a tensor's TensorDescriptor, without a tensor."""

    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, address: int, descriptor: Descriptor) -> None:
        self.base, self._address = self, address
        self.shape, self.strides = descriptor.shape, descriptor.strides

    def data_ptr(self) -> int:
        return self._address


_kernels: dict[tuple[Any, ...], Kernel] = {}


def load(kernel: KernelPlan, pointers: Mapping[str, str | None], aligned: frozenset[str]) -> Kernel:
    """Compiles for the current device, once. Arguments are those of `kvcore.run.compiler.compile_kernel`."""
    from kvcore.run.compiler import LOCK, compile_kernel, knobs, readable_errors, with_cache

    device = torch.cuda.current_device()
    key = (
        kernel.module, kernel.name, kernel.num_warps, *kernel.constexprs.items(), *kernel.options.items(),
        *kernel.descriptors.items(), *pointers.items(), aligned, device,
    )  # fmt: skip
    with LOCK:  # of threads that want the same, one compiles
        if key not in _kernels:
            compiled = compile_kernel(kernel, target(), pointers, aligned)
            with readable_errors():
                run = with_cache(lambda: compiled.run)  # loads it, and with older Tritons compiles a launcher
            constexprs = (None,) * len(kernel.constexprs)
            names = [*pointers]
            descriptors = tuple((names.index(name), described) for name, described in kernel.descriptors.items())
            launcher = _launcher(compiled, run)
            _kernels[key] = Kernel(compiled, run, knobs.runtime, device, constexprs, *launcher, descriptors)
        return _kernels[key]


def _launcher(compiled: Any, run: Any) -> tuple[Callable[..., None], tuple[Any, ...], bool]:
    """The last three attributes of a `Kernel`.

    Triton's launcher for CUDA takes more than a microsecond, each time, to see that a kernel needs no scratch memory,
    then calls a function in C. Here that is seen once. Triton 3.7 changed the function's parameters.
    """
    function, metadata = compiled.function, compiled.packed_metadata
    cuda = type(run).__module__ == "triton.backends.nvidia.driver" and type(run).__name__ == "CudaLauncher"
    if not cuda or run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return run, (function, metadata, None, None, None), False
    settings = function, run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature"):
        return run.launch, (*settings, metadata, *[None] * 5, run.arg_annotations, run.kernel_signature), True
    return run.launch, (*settings, None, None, metadata, None, None, None), False


def start(kernel: Kernel, grid: Grid, arguments: Sequence[Any]) -> None:
    """Starts a kernel on the current stream of its device, which is the current one. Pointers are addresses."""
    if kernel.descriptors:
        arguments = list(arguments)
        for place, descriptor in kernel.descriptors:
            arguments[place] = _Described(arguments[place], descriptor)
    arguments = (*arguments, *kernel.constexprs)
    stream = torch._C._cuda_getCurrentRawStream(kernel.device)
    enter, leave = kernel.hooks.launch_enter_hook, kernel.hooks.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
        compiled = kernel.compiled
        metadata = compiled.launch_metadata(grid, stream, *arguments)
        kernel.run(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *arguments)
    elif kernel.packed:
        kernel.launch(*grid, stream, *kernel.settings, arguments)
    else:
        kernel.launch(*grid, stream, *kernel.settings, *arguments)


def target() -> Target:
    """What to compile for on torch's current device."""
    from kvcore.run.compiler import LOCK, readable_errors, with_cache  # first: says so where there is no Triton

    from triton.runtime import driver  # isort: skip

    with LOCK, readable_errors():
        gpu: Any = with_cache(lambda: driver.active).get_current_target()  # at first it compiles its utilities
    return Target(gpu.backend, gpu.arch, gpu.warp_size)


def interpret(kernel: KernelPlan, grid: Grid, arguments: Sequence[Any]) -> None:
    """Runs a kernel in Triton's interpreter, on the memory of CPU tensors."""
    from kvcore.run import interpreter

    def pointer(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return interpreter.Pointer(argument.data_ptr(), dtype_name(argument))

    interpreter.run(kernel, grid, list(map(pointer, arguments)))


class Runner(NamedTuple):
    """How kernels are run.

    Attributes:
        start: Starts a kernel: given what was loaded, a grid, and arguments.
        empty: Makes a tensor, given its `Empty`.
        address: What a kernel gets for a tensor.
    """

    start: Callable[[Any, Grid, Sequence[Any]], None]
    empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
    address: Callable[[Tensor], Any]


def _empty_on_host(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


# What inductor makes tensors with, on the current device: torch's own functions take twice the time.
ON_GPU = Runner(start, torch._C._dynamo.guards._empty_strided_cuda, Tensor.data_ptr)  # type: ignore
INTERPRETED = Runner(interpret, _empty_on_host, lambda tensor: tensor)


def empty(shape: Sequence[int], dtype: str) -> Empty:
    """A contiguous tensor that is to be made."""
    return tuple(shape), contiguous_strides(shape), getattr(torch, dtype)


def signature(call: Any, any_length: Mapping[str, int]) -> list[Any]:
    """All that a launch depends on; of addresses, only whether they are multiples of 16, and of 4.

    Args:
        call: A NamedTuple of tensors, what is hashable, lists of such, and NamedTuples like it. Of `layer`, it only
            counts whether there is one.
        any_length: The axes whose lengths are left out, by the fields' names: 0 for the first one, -1 for the last.
    """
    parts: list[Any] = []
    for name, value in zip(call._fields, call, strict=True):
        if type(value) in SCALARS:
            parts.append(value is None if name == "layer" else value)
        elif isinstance(value, Tensor):
            parts.append(_signature_of(value, any_length.get(name)))
        elif isinstance(value, (list, tuple)):
            if hasattr(value, "_fields"):
                parts += signature(value, any_length)
            else:
                parts.append(tuple([_signature_of(v) if isinstance(v, Tensor) else v for v in value]))
        else:
            parts.append(value)
    return parts


def _signature_of(tensor: Tensor, any_length: int | None = None) -> tuple[Any, ...]:
    shape, address = tensor.shape, tensor.data_ptr()
    if any_length is not None:
        shape = shape[:-1] if any_length else shape[1:]
    return tensor.dtype, shape, tensor.stride(), tensor.device, address % 16 == 0, address % 4


def pointees(names: Sequence[str], arguments: Sequence[Any]) -> dict[str, str | None]:
    """The dtype that each argument of these names points to; "scalar" for a number, None for None.

    Arguments may have more at the end than names; these are ignored.
    """
    return {
        name: dtype_name(argument) if isinstance(argument, Tensor) else None if argument is None else "scalar"
        for name, argument in zip(names, arguments, strict=False)
    }


def aligned_pointers(names: Sequence[str], arguments: Sequence[Any]) -> frozenset[str]:
    """The names of the arguments that are pointers to multiples of 16. Those beyond the names are ignored."""
    return frozenset(
        name
        for name, argument in zip(names, arguments, strict=False)
        if isinstance(argument, Tensor) and address_of(argument) % 16 == 0
    )
