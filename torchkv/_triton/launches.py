"""What launches of all ops have in common: calls are checked and compiled once, then known again.

What is launched depends on all of a call but its addresses, a static layer, and the lengths of the axes of tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kvcore.plan.kernel import INTERPRETER, KernelPlan, Target
from torchkv._memory import span
from torchkv._triton.known import KnownCalls, marker, picker
from torchkv._triton.launch import (
    INTERPRETED,
    MOST_LAUNCHES,
    ON_GPU,
    SCALARS,
    Kernel,
    Load,
    Runner,
    load,
    signature,
    target,
)


class Kernels(Protocol):
    """An op's kernels, ready to be started."""

    @property
    def described(self) -> Any:
        """What the contract says of the call."""
        ...

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        """Runs the kernels on the current device.

        Args:
            runner: How.
            pointers: The first kernel's pointer arguments, but for results.
            tensors: Those of the call, as `Launches.tensors` has them.

        Returns:
            The op's results, () where it has none. None, and nothing is run, where lengths that may differ from call to
            call are not what the contract wants.
        """


class Apart:
    """Which tensors of calls must share no memory. Mostly their addresses tell.

    Args:
        pairs: Two tensors each, by their places among a call's. One that is paired with itself may overlap itself.
        lengths: Tensors, by their places, the lengths of whose first axes differ from call to call: any lengths, for
            the contract may still refuse a call.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], lengths: Sequence[int] = ()) -> None:
        self._pairs, self._lengths = pairs, lengths
        self._limits: dict[tuple[int, ...], list[tuple[int, int, int, int]]] = {}
        self._seen: set[tuple[int, ...]] = set()

    def unseen(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> list[tuple[int, ...]]:
        """Pairs that may share memory: their spans overlap, and were not seen to do no harm at this distance."""
        lengths = tuple([tensors[i].shape[0] for i in self._lengths]) if self._lengths else ()
        limits = self._limits.get(lengths)
        if limits is None:
            limits = self._measure(tensors, lengths)
        found = []
        for first, second, low, high in limits:
            distance = addresses[second] - addresses[first]
            if low < distance < high and (first, second, distance, *lengths) not in self._seen:
                found.append((first, second, distance, *lengths))
        return found

    def see(self, pairs: Sequence[tuple[int, ...]]) -> None:
        """Remembers that pairs, as `unseen` gives them, share no memory."""
        if len(self._seen) >= MOST_LAUNCHES:
            self._seen.clear()
        self._seen.update(pairs)

    def _measure(self, tensors: Sequence[Tensor], lengths: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        """The pairs, and between which bytes from the first's address to the second's their spans overlap."""
        if len(self._limits) >= MOST_LAUNCHES:
            self._limits.clear()
        spans = [span(tensor) * tensor.element_size() for tensor in tensors]
        limits = self._limits[lengths] = [(i, j, -spans[j], spans[i]) for i, j in self._pairs]
        return limits


@dataclass(frozen=True, slots=True)
class Launch[K: Kernels]:
    """What is launched for calls that agree in all that it depends on.

    Attributes:
        kernels: The op's.
        device: Where.
        num_layers: Layers of the cache, where it has an axis of them.
        aligned: How many of a call's tensors, from the first on, begin at multiples of 16 if those of `kernels` do.
        any_length: Tensors, by their places, whose first axis may have another length.
        written: Those that are written to.
        apart: Those that must share no memory, if there are any.
    """

    kernels: K
    device: torch.device
    num_layers: int | None
    aligned: int
    any_length: Sequence[int]
    written: Sequence[int]
    apart: Apart | None

    def run(self, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        """Runs the kernels on their device. Arguments and results are those of `Kernels.run`."""
        if self.device.index == torch._C._cuda_getDevice():  # a guard costs more, and so does torch.cuda.current_device
            return self.kernels.run(ON_GPU, pointers, tensors)
        with torch.cuda.device(self.device):
            return self.kernels.run(ON_GPU, pointers, tensors)


class Known[K: Kernels](NamedTuple):
    """What is done again for calls that are alike.

    Attributes:
        launch: What is launched.
        pointers: Makes the kernel's pointers of the addresses of a call's tensors.
        mark: Tells autograd what was changed, if anything was.
    """

    launch: Launch[K]
    pointers: Callable[[Sequence[int]], tuple[Any, ...]]
    mark: Callable[[Sequence[Tensor]], None] | None


class Launches[K: Kernels](ABC):
    """Launches of one op. Calls are those of `torchkv._call` and `torchkv._rotated`.

    Args:
        k_scale: The place of k_scale among the op's arguments; v_scale comes next. None where there are none.
        varies: What else kernels depend on, besides what `KnownCalls` compares, given the tensors of a call.
    """

    any_length: ClassVar[Mapping[str, int]] = {}
    """Axes of tokens, by the names of a call's fields. 0 is the first one, -1 the last."""

    def __init__(self, k_scale: int | None, varies: Callable[[Sequence[Tensor]], Any] | None = None) -> None:
        self._k_scale = k_scale
        self._launches: dict[tuple[Any, ...], Launch[K]] = {}
        self._varies = varies
        self._known: KnownCalls[Known[K]] = KnownCalls(varies)

    @abstractmethod
    def tensors(self, call: Any) -> list[Tensor]:
        """A call's tensors: those of the op's arguments, as `flat` has them, or what was made of these."""

    @abstractmethod
    def prepare(self, call: Any, described: Any, target: Target, load: Load) -> Launch[K]:
        """What a call launches.

        Args:
            call: Its tensors' addresses are looked at.
            described: What the contract says of it.
            target: What to plan for.
            load: Compiles a kernel.
        """

    @abstractmethod
    def pointers(self, described: Any, call: Any) -> list[Any]:
        """The first kernel's pointer arguments, but for results: tensors, numbers and None."""

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The op's arguments without lists, and without a tensor that is there twice."""
        i = self._k_scale
        if i is None or arguments[i] is None or arguments[i] is not arguments[i + 1]:
            return arguments
        return (*arguments[: i + 1], "k_scale", *arguments[i + 2 :])

    def again(self, arguments: Sequence[Any]) -> Any:
        """Launches a call like an earlier one; None where there was none, or where this one must be checked itself."""
        found = self._known.find(self.flat(arguments))
        if found is None:
            return None
        (launch, pointers, mark), tensors, addresses = found
        if launch.apart and launch.apart.unseen(tensors, addresses):
            return None
        results = launch.run(pointers(addresses), tensors)
        if mark and results is not None:
            mark(tensors)
        return results

    def launch(self, call: Any, tensors: Sequence[Tensor]) -> tuple[Launch[K], Any]:
        """Launches a call, whose tensors are these, on the current stream of its device.

        Returns:
            What was launched, and the op's results.
        """
        # How many tensors there are tells whether out is query.
        key = self._varies and self._varies(tensors), len(tensors), *signature(call, self.any_length)
        launch, results = self._launches.get(key), None
        if launch is not None and (call.layer is None or 0 <= call.layer < launch.num_layers):
            results = self._run(launch, call, tensors)
        if launch is None or results is None:
            described = call.check()  # raises where the contract does
            call.check_memory(described)
            with torch.cuda.device(call.device):
                launch = self.prepare(call, described, target(), load)
            if len(self._launches) >= MOST_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
            results = self._run(launch, call, tensors)
        return launch, results

    def _run(self, launch: Launch[K], call: Any, tensors: Sequence[Tensor]) -> Any:
        described = launch.kernels.described
        unseen = launch.apart and launch.apart.unseen(tensors, list(map(Tensor.data_ptr, tensors)))
        if launch.apart and unseen:
            call.check_memory(described)
            launch.apart.see(unseen)
        pointers = [p if type(p) in SCALARS else ON_GPU.address(p) for p in self.pointers(described, call)]
        return launch.run(pointers, tensors)

    def compile(self, described: Any, call: Any) -> list[Kernel]:
        """Compiles and loads a call's kernels, which it returns. Tensors may be fake."""
        kernels: list[Kernel] = []

        def load_one(kernel: KernelPlan, pointees: Mapping[str, str | None], aligned: frozenset[str]) -> Kernel:
            kernels.append(load(kernel, pointees, aligned))
            return kernels[-1]

        with torch.cuda.device(call.device):
            self.prepare(call, described, target(), load_one)
        return kernels

    def interpret(self, described: Any, call: Any) -> Any:
        """Runs the kernels in Triton's interpreter, on the tensors' own memory. Returns the op's results."""
        kernels = self.prepare(call, described, INTERPRETER, lambda kernel, pointees, aligned: kernel).kernels
        return kernels.run(INTERPRETED, self.pointers(described, call), self.tensors(call))

    def first(self, call: Any, arguments: Sequence[Any]) -> Any:
        """Launches a call, and remembers it by the op's arguments."""
        tensors = self.tensors(call)
        launch, results = self.launch(call, tensors)

        def known() -> Known[K]:
            make = picker(self.pointers(launch.kernels.described, call), tensors)
            return Known(launch, make, marker(tensors, launch.written))

        self._known.add(self.flat(arguments), tensors, known, launch.aligned, launch.any_length)
        return results
