"""What launches of `paged_attention` and of `gather_kv` have in common, on CUDA and ROCm tensors.

Contract, plan and compilation run once for tensors that agree in all but their addresses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchkv._call import AttentionCall, GatherCall, Results
from torchkv._memory import check_results_apart
from torchkv._triton.known import KnownCalls, distinct, marker, picker
from torchkv._triton.launch import MOST_LAUNCHES, ON_GPU, Runner, is_current

Call = AttentionCall | GatherCall


@dataclass(slots=True)
class _Launch[Kernels]:
    """What calls have in common whose tensors differ in their addresses only.

    Attributes:
        kernels: What is launched.
        device: Where.
        num_layers: Layers of the cache, where it has an axis of them.
        apart: Addresses of results and inputs that were seen to share no memory.
    """

    kernels: Kernels
    device: torch.device
    num_layers: int | None
    apart: set[tuple[int, ...]] = field(default_factory=set)


class ReadOp[Kernels](NamedTuple):
    """What attention and gather differ in.

    Attributes:
        call: What its calls are.
        key: All of a call that its kernels depend on, except a static layer.
        prepare: Checks a call and compiles its kernels, which are `loaded` of what it gives.
        arguments: What the first kernel is launched with, except the results.
        run: Runs the kernels, given that, and tensors for the results or None.
        results: What errors call the results.
    """

    call: type[AttentionCall] | type[GatherCall]
    key: Callable[[Any], tuple[Any, ...]]
    prepare: Callable[[Any], Kernels]
    arguments: Callable[[Any, Any], list[Any]]
    run: Callable[[Runner, Kernels, Sequence[Any], Results | None], Results]
    results: tuple[str, str]


_launches: dict[tuple[Any, ...], Any] = {}


def launch_read(op: ReadOp[Any], call: Call) -> tuple[_Launch[Any], Results]:
    """Launches a call on the current stream of its device."""
    key = op.key(call)
    launch = _launches.get(key)
    if launch is None or not (call.layer is None or 0 <= call.layer < launch.num_layers):
        kernels = op.prepare(call)  # raises where the contract does
        launch = _Launch(kernels, call.device, kernels.described.cache.extents.num_layers)
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    if call.results is not None:
        _check_apart(launch.apart, op.results, call.results, call.inputs)
    arguments = op.arguments(launch.kernels.described, call)
    pointers = [ON_GPU.address(a) if isinstance(a, Tensor) else a for a in arguments]
    return launch, _run(op, launch, pointers, call.results)


def _check_apart(
    apart: set[tuple[int, ...]], names: Sequence[str], results: Results, inputs: dict[str, Tensor | None]
) -> None:
    """Checks that results share no memory with one another or with inputs, unless `apart` has their addresses."""
    addresses = tuple(dict.fromkeys(t.data_ptr() for t in (*results, *inputs.values()) if t is not None))
    if addresses not in apart:
        check_results_apart(names, results, inputs)
        if len(apart) >= MOST_LAUNCHES:
            apart.clear()
        apart.add(addresses)


def _run(op: ReadOp[Any], launch: _Launch[Any], arguments: Sequence[Any], results: Results | None) -> Results:
    """Runs kernels on their device."""
    if is_current(launch.device):
        return op.run(ON_GPU, launch.kernels, arguments, results)
    with torch.cuda.device(launch.device):
        return op.run(ON_GPU, launch.kernels, arguments, results)


class _Known(NamedTuple):
    """What is done again for calls that are alike.

    Attributes:
        launch: What is launched.
        arguments: Makes the first kernel's arguments, except the results, of the addresses of a call's tensors.
        mark: Tells autograd what was changed.
    """

    launch: _Launch[Any]
    arguments: Callable[[Sequence[int]], tuple[Any, ...]]
    mark: Callable[[Sequence[Tensor]], None]


class Reads:
    """Launches of an op whose arguments begin with tensors for the results or none, query or not, and a list of caches.

    Args:
        op: Attention or gather.
        results: Whether there are tensors for the results.
        caches: Which of the arguments is the list of caches. The next one is block_tables.
    """

    def __init__(self, op: ReadOp[Any], results: bool, caches: int) -> None:
        self._op, self._results, self._caches = op, results, caches
        names = op.call._fields
        self._scale = caches + names.index("k_scale") - names.index("caches")  # then comes v_scale
        self._has_query = "query" in names
        self._known: KnownCalls[_Known] = KnownCalls()

    def first(self, call: Call, arguments: Sequence[Any]) -> Results:
        """Launches a call, and remembers it by the op's arguments."""
        launch, results = launch_read(self._op, call)

        def known(tensors: Sequence[Tensor]) -> _Known:
            make = picker(self._op.arguments(launch.kernels.described, call), tensors)
            return _Known(launch, make, marker(tensors, range(2)))

        flat, by_shape = self._flat(arguments)
        self._known.add(flat, known, by_shape)
        return results

    def prepare(self, call: Call) -> list[Any]:
        """Checks a call, of tensors that may be fake, and loads its kernels."""
        return self._op.prepare(call).loaded

    def again(self, arguments: Sequence[Any]) -> Results | None:
        """Launches a call like an earlier one; None where there was none, or where this one must be checked itself."""
        flat, by_shape = self._flat(arguments)
        found = self._known.find(flat, *by_shape)
        if found is None:
            return None
        (launch, make, mark), tensors, addresses = found
        if not self._results:
            return _run(self._op, launch, make(addresses), None)
        if tuple(dict.fromkeys(addresses)) not in launch.apart:
            return None
        results = _run(self._op, launch, make(addresses), (arguments[0], arguments[1]))
        mark(tensors)
        return results

    def _flat(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Arguments as `KnownCalls` wants them, and which of the tensors have other shapes from call to call."""
        i, caches = self._caches, arguments[self._caches]
        arguments, tables = distinct(arguments, self._scale), i + len(caches)
        by_shape = (i - 1, tables) if self._has_query else (tables,)
        return (*arguments[:i], *caches, *arguments[i + 1 :]), by_shape
