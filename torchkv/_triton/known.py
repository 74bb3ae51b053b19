"""Calls that were launched before, recognised by asking their tensors as little as can be.

torch makes an object of each dtype, shape, strides and device that it is asked for, and a launch with five tensors
depends on twenty of these. The guards of torch.compile compare them all in one call, without objects.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchkv._triton.launch import MOST_LAUNCHES

_MOST_ALIKE = 8
"""Calls that are remembered of those that differ in their tensors only: they are asked for one after the other."""

_PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that leave torch's functions as they are."""

_USUAL_KEYS = (torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView)
"""What torch's dispatcher always looks at, beside the tensors' own keys."""


class _Entry(NamedTuple):
    """A call that was launched.

    Attributes:
        alike: Whether other tensors are like its own.
        aligned: How many of them, from the first on, begin at multiples of 16.
        followed: Whether one requires gradients, which were not recorded.
        found: What was found for it.
    """

    alike: Callable[..., bool]
    aligned: int
    followed: bool
    found: Any


class _Kind(NamedTuple):
    """Calls whose arguments have the same types: where the tensors are, and the calls by what else they have."""

    tensors: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    options: Callable[[Sequence[Any]], Any]
    entries: dict[Any, tuple[_Entry, ...]]


class KnownCalls[Found]:
    """Calls of one op that were launched, and what is to be done again for those like them.

    Calls are alike if they agree in all arguments but the tensors, and if torch's dispatcher sees the same in the
    tensors: dtype, shape, strides, device, and what modes and transforms make of them. No gradients are recorded.

    Args:
        varies: What else they must agree in, given their tensors, whatever these are.
    """

    def __init__(self, varies: Callable[[Sequence[Tensor]], Any] | None = None) -> None:
        self._varies = varies
        self._kinds: dict[tuple[type, ...], _Kind] = {}
        self._count = 0

    def find(self, arguments: Sequence[Any]) -> tuple[Found, tuple[Tensor, ...], list[int]] | None:
        """What was found for a call like this one, the call's tensors, and their addresses; None for a new one.

        Args:
            arguments: Tensors, and numbers, strings, tuples of such, and None.
        """
        kind = self._kinds.get(tuple(map(type, arguments)))
        if kind is None or forward_ad._current_level >= 0:  # tangents are recorded
            return None
        tensors = kind.tensors(arguments)
        for alike, aligned, followed, found in kind.entries.get(self._key(kind, arguments, tensors), ()):
            if alike(*tensors):
                addresses = list(map(Tensor.data_ptr, tensors))
                if reduce(or_, addresses[:aligned]) % 16 or (followed and torch.is_grad_enabled()):
                    return None
                return found, tensors, addresses
        return None

    def add(
        self,
        arguments: Sequence[Any],
        tensors: Sequence[Tensor],
        make: Callable[[], Found],
        aligned: int,
        any_length: Iterable[int] = (),
    ) -> None:
        """Remembers a call, unless it is one whose like has to be looked at by torch's dispatcher, or by us.

        Args:
            arguments: As for `find`. Without a tensor they are none.
            tensors: Those that were launched with. If they are not the arguments', nothing is remembered.
            make: Makes what is to be done again.
            aligned: How many of the tensors, from the first on, begin at multiples of 16.
            any_length: Tensors, by their places, whose first axis may have another length.
        """
        types = tuple(map(type, arguments))
        kind = self._kinds.get(types) or _kind(arguments)
        followed = any(t.requires_grad for t in tensors)
        if (
            list(map(id, kind.tensors(arguments))) != list(map(id, tensors))
            or any(type(t) not in _PLAIN for t in tensors)
            or (followed and torch.is_grad_enabled())
            or forward_ad._current_level >= 0
            or any(t.data_ptr() % 16 for t in tensors[:aligned])
            or len({*map(id, tensors)}) < len(tensors)  # the guards recognise no call that has a tensor twice
            or not _nothing_listens()
            or self.find(arguments) is not None
        ):
            return
        sizes: list[list[int | None]] = [list(t.shape) for t in tensors]
        for i in any_length:
            sizes[i][0] = None
        guards = torch._C._dynamo.guards.TensorGuards(  # type: ignore
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=[list(t.stride()) for t in tensors]
        )
        if self._count >= MOST_LAUNCHES:
            self._kinds, self._count = {}, 0
            kind = kind._replace(entries={})
        entries, key = self._kinds.setdefault(types, kind).entries, self._key(kind, arguments, tensors)
        entries[key] = (_Entry(guards.check, aligned, followed, make()), *entries.get(key, ()))[:_MOST_ALIKE]
        self._count += 1

    def _key(self, kind: _Kind, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        """What calls that are alike have in common, beside what the guards compare.

        To the dispatcher, tensors that were made in inference mode are outside it what others are in it. Only the
        latter have versions, which torch's in-place operations raise there, too.
        """
        varies = self._varies and self._varies(tensors)
        return kind.options(arguments), varies, torch.is_inference_mode_enabled()


def _kind(arguments: Sequence[Any]) -> _Kind:
    places = [isinstance(argument, Tensor) for argument in arguments]
    return _Kind(
        itemgetter(*[i for i, is_tensor in enumerate(places) if is_tensor]),
        itemgetter(*[i for i, is_tensor in enumerate(places) if not is_tensor]),
        {},
    )


def picker(arguments: Sequence[Any], tensors: Sequence[Tensor]) -> Callable[[Sequence[int]], tuple[Any, ...]]:
    """What makes a kernel's arguments of addresses.

    Args:
        arguments: A kernel's: tensors, numbers and None.
        tensors: Those of a call, among them all of the arguments that are tensors.

    Returns:
        A function of the addresses of other tensors in the place of `tensors`: the arguments, tensors as addresses.
    """
    constants, places = [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            places.append(next(i for i, tensor in enumerate(tensors) if tensor is argument))
        else:
            places.append(len(tensors) + len(constants))
            constants.append(argument)
    pick = itemgetter(*places)
    return lambda addresses: pick((*addresses, *constants))


def marker(tensors: Sequence[Tensor], written: Iterable[int]) -> Callable[[Sequence[Tensor]], None] | None:
    """What tells autograd which tensors of a call were changed, as torch's own in-place operations do, if any were.

    Args:
        tensors: Those of a call. Ones made in inference mode have no versions to be raised.
        written: The places of those that are written to.
    """
    places = [i for i in written if not tensors[i].is_inference()]
    if not places:
        return None
    changed = itemgetter(*places)
    return lambda tensors: torch.autograd.graph.increment_version(changed(tensors))


def _nothing_listens() -> bool:
    """Whether no mode, transform or tracer is between a call and the kernel for its device."""
    keys = torch._C._dispatch_tls_local_include_set()
    for key in _USUAL_KEYS:
        keys = keys.remove(key)
    return keys.raw_repr() == 0
