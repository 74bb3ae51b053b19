"""Compile and launch the kernel that rotates and writes on CUDA and ROCm tensors, and interpret it on CPU tensors.

As in `torchkv._triton.write`: what is launched depends on all of a call but its addresses, the numbers of tokens except
whether they are many, and a static layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.cache import check_cache_address
from kvcore.contract.rope import Rope
from kvcore.plan import rope as plan_rope
from kvcore.plan.kernel import INTERPRETER, Target
from torchkv._arguments import dtype_name, spec_of
from torchkv._call import layer_of
from torchkv._memory import address_of, span
from torchkv._rotated import RopeCall
from torchkv._triton.known import KnownCalls, marker, picker
from torchkv._triton.launch import (
    MOST_LAUNCHES,
    ON_GPU,
    Empty,
    Kernel,
    aligned_pointers,
    empty,
    interpret,
    is_current,
    load,
    pointees,
    start,
    target,
)


class _Reach(NamedTuple):
    """How many bytes a tensor spans, given how long its axis of tokens is.

    Attributes:
        counts: How many rows it has: of 0: one, 1: num_tokens, 2: as many as slot_mapping has entries.
        row: Bytes that a row spans.
        step: Bytes from one row to the next.
    """

    counts: int
    row: int
    step: int

    def span(self, counts: tuple[int, int, int]) -> int:
        """Bytes, where counts are 1, num_tokens, and the entries of slot_mapping."""
        return self.row + (counts[self.counts] - 1) * self.step


@dataclass(slots=True)
class _Launch:
    """A compiled kernel and what its launches have in common.

    Attributes:
        described: What the contract says of them.
        kernel: What is launched.
        plan: How.
        device: Where.
        scalars: The kernel's scalars after the numbers of tokens: slots, layers, positions.
        reaches: Of a call's tensors.
        pairs: Those of them that must share no memory, by their places.
        apart: Pairs that were seen to share none although their spans overlap: their places, the bytes from one address
            to the other, and the numbers of tokens.
    """

    described: Rope
    kernel: Kernel
    plan: plan_rope.RopePlan
    device: torch.device
    scalars: tuple[int, ...]
    reaches: list[_Reach]
    pairs: list[tuple[int, int]]
    apart: set[tuple[int, ...]] = field(default_factory=set)

    def unseen(self, addresses: Sequence[int], num_tokens: int, num_written: int) -> set[tuple[int, ...]]:
        """Pairs that may share memory, as `apart` has them. `addresses` are those of a call's tensors."""
        found, counts = set(), (1, num_tokens, num_written)
        for first, second in self.pairs:
            distance = addresses[second] - addresses[first]
            if -self.reaches[second].span(counts) < distance < self.reaches[first].span(counts):
                found.add((first, second, distance, *counts))
        return found - self.apart

    def run(self, pointers: Sequence[int | None], num_tokens: int, num_written: int, result: Tensor | Empty) -> Tensor:
        """Runs the kernel on its device, and returns the rotated query.

        Args:
            pointers: Its pointer arguments except the last, which is the result's.
            num_tokens: Rows of query.
            num_written: Entries of slot_mapping.
            result: The tensor for the result, or what it is for any number of tokens.
        """
        if not is_current(self.device):
            with torch.cuda.device(self.device):
                return self.run(pointers, num_tokens, num_written, result)
        if not isinstance(result, Tensor):
            shape, strides, dtype = result
            result = ON_GPU.empty((num_tokens, *shape[1:]), strides, dtype)
        if num_tokens:
            arguments = (*pointers, num_tokens, num_written, *self.scalars, result.data_ptr())
            start(self.kernel, self.plan.grid(num_tokens, num_written), arguments)
        return result


_launches: dict[tuple[Any, ...], _Launch] = {}


class _Known(NamedTuple):
    """What is done again for calls that are alike.

    Attributes:
        launches: What is launched: for few tokens, and for many.
        pointers: Makes the kernel's pointer arguments of the addresses of a call's tensors.
        rows: Where query, key, value and out are among the tensors.
        positions: Where positions are.
        slots: Where slot_mapping is.
        new: The result where it is made, for any number of tokens; None where it is given.
        mark: Tells autograd what was changed.
    """

    launches: dict[bool, _Launch]
    pointers: Callable[[Sequence[int]], tuple[int | None, ...]]
    rows: list[int]
    positions: int
    slots: int
    new: Empty | None
    mark: Callable[[Sequence[Tensor]], None]


class Ropes:
    """Launches of `rope_and_cache`, whose first tensor is out or, without one, query."""

    def __init__(self, gives: bool) -> None:
        self._known: KnownCalls[_Known] = KnownCalls()
        self._gives = gives  # whether the op's result is a new tensor
        self._section = 12 if gives else 13  # the place of mrope_section among the op's arguments

    def first(self, call: RopeCall, arguments: Sequence[Any]) -> Tensor:
        """Launches a call, and remembers it by the op's arguments."""
        launch, result = rope_and_cache(call)
        many = call.query.shape[0] >= plan_rope.MANY_TOKENS
        arguments = self._hashable(arguments)
        found = self._known.find(arguments)
        if found is not None:
            found[0].launches[many] = launch
        elif not (call.in_place and arguments[1] is not None):  # else out is query by its address only
            tensors, weights, written = _tensors(call), (call.q_norm, call.k_norm), call.write.written
            new = empty(call.query.shape, dtype_name(call.query)) if self._gives else None
            places = {id(tensor): i for i, tensor in enumerate(tensors)}
            rows = [places[id(t)] for t in (call.query, call.write.key, call.write.value, call.out) if t is not None]
            positions, slots = places[id(call.positions)], places[id(call.write.slot_mapping)]

            def known(tensors: Sequence[Tensor]) -> _Known:
                pointers = picker(_pointers(launch.described, call), tensors)
                changed = [places[id(cache)] for cache in written] + [0] * (not self._gives)
                mark = marker(tensors, changed)
                return _Known({many: launch}, pointers, rows, positions, slots, new, mark)

            # The kernel does not depend on the addresses of scales and layer, nor on the numbers of tokens.
            aligned = slots + 1 + sum(tensor is not None for tensor in weights)
            any_length = [*rows, slots] + ([positions] if call.positions.dim() == 1 else [])
            self._known.add(arguments, known, aligned=aligned, any_length=any_length)
        return result

    def prepare(self, call: RopeCall) -> list[Kernel]:
        """Checks a call, of tensors that may be fake, and loads its kernel."""
        return [_prepare(call).kernel]

    def again(self, arguments: Sequence[Any]) -> Tensor | None:
        """Launches a call like an earlier one; None where there was none, or where this one must be checked itself."""
        found = self._known.find(self._hashable(arguments))
        if found is None:
            return None
        (launches, pointers, rows, positions, slots, new, mark), tensors, addresses = found
        first = tensors[0]
        num_tokens, num_written = first.shape[0], tensors[slots].shape[0]
        launch = launches.get(num_tokens >= plan_rope.MANY_TOKENS)
        if (
            launch is None
            or not num_written <= num_tokens == tensors[positions].shape[-1]
            or any(tensors[row].shape[0] != num_tokens for row in rows)
            or launch.unseen(addresses, num_tokens, num_written)
        ):
            return None
        result = launch.run(pointers(addresses), num_tokens, num_written, first if new is None else new)
        mark(tensors)
        return result

    def _hashable(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The op's arguments. Out of torch's dispatcher, mrope_section comes as a list."""
        section = arguments[self._section]
        if section is None:
            return arguments
        return (*arguments[: self._section], tuple(section), *arguments[self._section + 1 :])


def rope_and_cache(call: RopeCall) -> tuple[_Launch, Tensor]:
    """Launches the op on the current stream of query's device.

    Returns:
        What was launched, and the rotated query: a new tensor, or the one that the call brings for it.
    """
    write, query, out, in_place = call.write, call.query, call.out, call.in_place
    key, value, positions, slot_mapping = write.key, write.value, call.positions, write.slot_mapping
    num_tokens, num_written = query.shape[0], slot_mapping.shape[0]
    addresses = [tensor.data_ptr() for tensor in _tensors(call)]
    rows = (query, key, value, None if in_place else out)
    whole = (*write.written, call.cos_sin, call.q_norm, call.k_norm, write.k_scale, write.v_scale, write.layer_index)
    signature = (
        *[None if t is None else (t.dtype, t.shape[1:], t.stride(), t.device) for t in rows],
        *[None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in whole],
        positions.dtype, positions.shape[:-1], positions.stride(), positions.device,
        slot_mapping.dtype, slot_mapping.dim(), slot_mapping.stride(), slot_mapping.device,
        call.rope, call.rotary_dim, call.mrope_section and tuple(call.mrope_section), call.eps, in_place,
        num_tokens >= plan_rope.MANY_TOKENS,
        len(write.caches), write.kv_cache_dtype, write.layout, write.scale_layout, write.layer is None,
        *[address % 16 == 0 for address in addresses], write.caches[0].data_ptr() % 4,
    )  # fmt: skip
    launch = _launches.get(signature)
    # The contract has to see again what the signature leaves out: the numbers of tokens, and a static layer.
    if (
        launch is None
        or not num_written <= num_tokens == key.shape[0] == value.shape[0] == positions.shape[-1]
        or not (out is None or out.shape[0] == num_tokens)
        or not (write.layer is None or 0 <= write.layer < launch.scalars[1])
    ):
        launch = _prepare(call)  # raises where the contract does
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[signature] = launch
    unseen = launch.unseen(addresses, num_tokens, num_written)
    if unseen:
        call.check_apart()
        if len(launch.apart) >= MOST_LAUNCHES:
            launch.apart.clear()
        launch.apart |= unseen
    pointers = [p.data_ptr() if isinstance(p, Tensor) else p for p in _pointers(launch.described, call)]
    return launch, launch.run(pointers, num_tokens, num_written, call.result())


def _tensors(call: RopeCall) -> list[Tensor]:
    """The tensors of a call, in the order of the op's arguments: out, if it is not query, then the `inputs`."""
    write, out = call.write, None if call.in_place else call.out
    tensors = (
        out, call.query, write.key, write.value, *write.written, call.positions, call.cos_sin, write.slot_mapping,
        call.q_norm, call.k_norm, write.k_scale, write.v_scale, write.layer_index,
    )  # fmt: skip
    return [tensor for tensor in tensors if tensor is not None]


def _prepare(call: RopeCall) -> _Launch:
    described = call.check()
    check_cache_address(described.write.cache.format, address_of(call.write.caches[0]))
    names, values = plan_rope.POINTERS, _pointers(described, call)
    # Scales and layer count as unaligned, as those of a write do. New tensors are multiples of 16.
    aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
    aligned |= {"out_ptr"} if call.out is None else aligned_pointers(["out_ptr"], [call.out])
    with torch.cuda.device(call.device):
        plan = _plan(described, call, target())
        kernel = load(plan.kernel, pointees(names, values) | {"out_ptr": dtype_name(call.query)}, aligned)
    tensors = _tensors(call)
    reaches = [_reach(tensor, call) for tensor in tensors]
    first = next(i for i, tensor in enumerate(tensors) if tensor is call.write.caches[0])
    pairs = [*combinations(range(first, first + len(call.write.written)), 2)]
    if call.out is not None:  # it is the first, as itself or as query
        pairs += [(0, i) for i in range(1, len(tensors))]
        if reaches[0].step < reaches[0].row:  # then the number of tokens decides whether it overlaps itself
            pairs.append((0, 0))
    scalars = plan_rope.scalars(described, 0, 0)[2:]
    return _Launch(described, kernel, plan, call.device, scalars, reaches, pairs)


def _reach(tensor: Tensor, call: RopeCall) -> _Reach:
    size, counts, axis = tensor.element_size(), 0, 0
    if any(tensor is rows for rows in (call.query, call.write.key, call.write.value, call.out)):
        counts = 1
    elif tensor is call.positions:
        counts, axis = 1, -1
    elif tensor is call.write.slot_mapping:
        counts = 2
    row = tensor.narrow(axis, 0, 1) if counts and tensor.shape[axis] else tensor
    return _Reach(counts, span(row) * size, tensor.stride(axis) * size if counts else 0)


def _plan(described: Rope, call: RopeCall, target: Target) -> plan_rope.RopePlan:
    out = None if call.out is None else spec_of(call.out)
    layer_is_pointer = call.write.layer_index is not None
    return plan_rope.plan_rope(described, target, layer_is_pointer, out, call.in_place)


def _arguments(described: Rope, call: RopeCall) -> list[Any]:
    """What the kernel is launched with, except its result."""
    write = call.write
    v_scale = write.k_scale if described.latent else write.v_scale
    return plan_rope.arguments(
        described, call.query, write.key, write.value, write.caches, write.scale_caches, call.positions, call.cos_sin,
        write.slot_mapping, call.q_norm, call.k_norm, write.k_scale, v_scale, layer_of(write), call.query.shape[0],
        write.slot_mapping.shape[0],
    )  # fmt: skip


def _pointers(described: Rope, call: RopeCall) -> list[Any]:
    """The kernel's arguments before its scalars."""
    return _arguments(described, call)[: len(plan_rope.POINTERS)]


def interpret_rope(described: Rope, call: RopeCall) -> Tensor:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory. Returns the rotated query."""
    plan, result = _plan(described, call, INTERPRETER), call.result()
    grid = plan.grid(call.query.shape[0], call.write.slot_mapping.shape[0])
    interpret(plan.kernel, grid, [*_arguments(described, call), result])
    return result
