"""What the registrations of all ops have in common: dispatch by device and backend, FakeTensor, autograd, vmap.

`torch.library.Library` costs 3 to 5 µs a call, `custom_op` and `triton_op` ten times that, and the latter clones
caches that are views of one tensor under torch.compile. `call_again` saves even these, where nothing has to see the op.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.library import Library

from kvcore.contract.checks import no_interpreter_error, no_triton_error
from torchkv._arguments import explain

LIBRARY = Library("torchkv", "DEF")


class Launches(Protocol):
    """What runs an op's kernels. All return the op's results, () where it has none."""

    def first(self, call: Any, arguments: Sequence[Any]) -> Any:
        """Checks a call and launches its kernels. `arguments` are the op's."""

    def compile(self, described: Any, call: Any) -> Any:
        """Compiles and loads a call's kernels, in a list, given what the contract has said; tensors may be fake."""

    def again(self, arguments: Sequence[Any]) -> Any:
        """Launches the kernels of a call like an earlier one, and tells autograd; None where there was none like it."""

    def interpret(self, described: Any, call: Any) -> Any:
        """Runs the kernels in Triton's interpreter, on CPU tensors, given what the contract has said of the call."""


@dataclass(slots=True)
class Backends:
    """What carries out an op where no kernel is run.

    All get a call and what the contract has said of it. They return the op's results: tensors that the call brings for
    them, new ones, or None where the op has none.

    Attributes:
        torch: Computes with torch's own operations.
        fake: Makes tensors like the results, without values.
    """

    torch: Callable[[Any, Any], Any]
    fake: Callable[[Any, Any], Any]


Rule = Callable[[Any, int, Sequence[Any], Sequence[Any]], Any]
"""What vmap does with an op: a function of the op, the batch's size, the mapped axis of each argument, and the
arguments."""


def define(schema: str, call_of: Callable[..., Any], launches: Launches, backends: Backends, vmap: Rule) -> Any:
    """Defines an op.

    Args:
        schema: Its name, parameters and results.
        call_of: Makes one of the calls of `torchkv._call` of the op's arguments.
        launches: What runs its kernels, for this op alone.
        backends: What carries it out where none is run.
        vmap: Its rule for vmap, which returns what `torch.library.register_vmap` asks for.

    Returns:
        The op's overload, `torch.ops.torchkv.NAME.default`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.torchkv, name).default
    written, returns = _written(op), bool(op._schema.returns)
    defaults = [parameter.default_value for parameter in op._schema.arguments]

    def mark(args: Sequence[Any]) -> None:
        """Tells autograd that kernels changed tensors, as torch's own in-place operations do."""
        followed = [args[i] for i in written if args[i] is not None and not args[i].is_inference()]
        if followed:
            torch.autograd.graph.increment_version(followed)

    def in_torch(described: Any, call: Any) -> Any:
        """Computes with torch's operations, in the dtypes that they are given, as kernels do: autocast has others."""
        with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
            return backends.torch(described, call)

    def on_gpu(*args: Any) -> Any:
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what equals its default, at the end
        results = launches.again(args)
        if results is not None:
            return results if returns else None
        call = call_of(*args)
        if call.backend is None or call.backend == "triton":
            results = launches.first(call, args)
            mark(args)
        else:
            described = call.check()
            if call.backend == "interpret":
                raise no_interpreter_error(str(call.device))
            call.check_memory(described)
            results = in_torch(described, call)
        return results if returns else None

    def on_host(*args: Any) -> Any:
        call = call_of(*args)
        described = call.check()
        if call.backend == "triton":
            raise no_triton_error(call.device.type)
        call.check_memory(described)
        if call.backend == "interpret":
            with torch.no_grad():
                results = launches.interpret(described, call)
            mark(args)
        else:
            results = in_torch(described, call)
        return results if returns else None

    def fake(*args: Any) -> Any:
        call = call_of(*args)
        described = call.check()
        prepared = PREPARED.get()
        if prepared is not None:
            call.check_memory(described)
            if _launches_kernels(call):
                prepared.update((id(kernel), kernel) for kernel in launches.compile(described, call))
        results = backends.fake(described, call)
        return results if returns else None

    def mapped(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return vmap(op, info.batch_size, in_dims, args)

    LIBRARY.impl(name, on_host, "CPU")
    LIBRARY.impl(name, on_gpu, "CUDA")  # ROCm builds of torch use the same key
    torch.library.register_fake(f"torchkv::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"torchkv::{name}", mapped, lib=LIBRARY)
    _again[op] = launches.again
    CALLS[op] = call_of
    return op


CALLS: dict[Any, Callable[..., Any]] = {}
"""What makes a call of an op's arguments, for all ops."""


_again: dict[Any, Callable[[Sequence[Any]], Any]] = {}
"""What launches an op's kernels again."""


PREPARED: ContextVar[dict[int, Any] | None] = ContextVar("PREPARED", default=None)
"""Kernels of the calls of fake tensors, by their ids; None where kernels of such calls are not to be compiled."""


def _launches_kernels(call: Any) -> bool:
    """Whether a call launches kernels; an error if its backend cannot run on its device."""
    on_host = call.device.type == "cpu"
    if call.backend == "triton" and on_host:
        raise no_triton_error(call.device.type)
    if call.backend == "interpret" and not on_host:
        raise no_interpreter_error(str(call.device))
    return not on_host and call.backend != "torch"


def call(op: Any, arguments: Sequence[Any]) -> Any:
    """Calls an op. Where it is an argument that torch's dispatcher refuses, the error is one line that names it.

    Raises:
        TypeError: an argument is of a wrong type.
    """
    results = call_again(op, arguments)
    if results is not None:
        return results
    try:
        return op(*arguments)
    except (RuntimeError, AttributeError):
        explain(op, arguments)
        raise


def call_again(op: Any, arguments: Sequence[Any]) -> Any:
    """Launches the kernels of a call like an earlier one without torch's dispatcher, which takes 3 to 5 µs.

    Returns:
        The results, () where the op has none; None where the op must be called: the call is like none that was
        launched, torch traces it, or a mode or a profiler wants to see the op.
    """
    if (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()  # type: ignore
    ):
        return None
    return _again[op](arguments)


def call_each(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What an op gives for each item of a batch; the items' arguments are views."""
    return [op(*(_item(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(batch_size)]


def _item(argument: Any, dim: Any, i: int) -> Any:
    """An argument of item i, or the list of tensors that it is; dim is its mapped axis, or theirs."""
    if isinstance(argument, (list, tuple)):
        return [_item(a, d, i) for a, d in zip(argument, dim or [None] * len(argument), strict=True)]
    return argument if dim is None else argument.select(dim, i)


def _written(op: Any) -> list[int]:
    """The places of the arguments that an op writes to."""
    arguments = enumerate(op._schema.arguments)
    return [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
