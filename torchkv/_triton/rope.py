"""Compile and launch the kernel that rotates and writes on CUDA and ROCm tensors, and interpret it on CPU tensors.

As in `torchkv._triton.write`: what is launched depends on all of a call but its addresses, the numbers of tokens and a
static layer, so contract and plan run once for calls that agree in the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kvcore.contract.cache import check_cache_address
from kvcore.contract.rope import Rope
from kvcore.plan import rope as plan_rope
from kvcore.plan.kernel import INTERPRETER, Target
from torchkv._arguments import dtype_name, spec_of
from torchkv._call import layer_of
from torchkv._memory import span
from torchkv._rotated import RopeCall
from torchkv._triton.known import KnownCalls, distinct, picker
from torchkv._triton.launch import (
    MOST_LAUNCHES,
    ON_GPU,
    Empty,
    Kernel,
    aligned_pointers,
    empty,
    interpret,
    load,
    on,
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
        kernel: What is launched.
        plan: How.
        device: Where.
        pointers: Picks the kernel's pointer arguments, in its order, among the inputs that `rope_and_cache` has.
        scalars: The kernel's scalars after the numbers of tokens: slots, layers, positions.
        reaches: Of the tensors whose addresses the inputs begin with.
        pairs: Those of them that must share no memory, by their places.
        apart: Pairs that were seen to share none although their spans overlap: their places, the bytes from one address
            to the other, and the numbers of tokens.
    """

    kernel: Kernel
    plan: plan_rope.RopePlan
    device: torch.device
    pointers: Callable[[Sequence[int | None]], tuple[int | None, ...]]
    scalars: tuple[int, ...]
    reaches: list[_Reach]
    pairs: list[tuple[int, int]]
    apart: set[tuple[int, ...]] = field(default_factory=set)

    def unseen(self, addresses: Sequence[Any], counts: tuple[int, int, int]) -> set[tuple[int, ...]]:
        """Pairs that may share memory, as `apart` has them."""
        unseen = set()
        for first, second in self.pairs:
            distance = addresses[second] - addresses[first]
            if -self.reaches[second].span(counts) < distance < self.reaches[first].span(counts):
                unseen.add((first, second, distance, *counts))
        return unseen - self.apart

    def remember(self, pairs: set[tuple[int, ...]]) -> None:
        """Adds pairs that share no memory to `apart`."""
        if len(self.apart) >= MOST_LAUNCHES:
            self.apart.clear()
        self.apart |= pairs

    def start(self, inputs: Sequence[int | None], num_tokens: int, num_written: int, result: Tensor) -> None:
        """Starts the kernel on the current device, given the addresses of tensors, a static layer, and None."""
        if num_tokens:
            arguments = (*self.pointers(inputs), num_tokens, num_written, *self.scalars, result.data_ptr())
            start(self.kernel, self.plan.grid(num_tokens, num_written), arguments)


_launches: dict[tuple[Any, ...], _Launch] = {}


def rope_and_cache(call: RopeCall) -> Tensor:
    """Launches the op on the current stream of query's device.

    Returns:
        The rotated query: a new tensor, or the one that the call brings for it.
    """
    return _launch(call)[1]


def _launch(call: RopeCall) -> tuple[_Launch, Tensor]:
    """What was launched for a call, and the rotated query."""
    write, query, out, in_place = call.write, call.query, call.out, call.in_place
    key, value, positions, slot_mapping = write.key, write.value, call.positions, write.slot_mapping
    num_tokens, num_written = query.shape[0], slot_mapping.shape[0]
    tensors = _tensors(call, in_place)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
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
        *[address is None or address % 16 == 0 for address in addresses], write.caches[0].data_ptr() % 4,
    )  # fmt: skip
    launch = _launches.get(signature)
    # The contract has to see again what the signature leaves out: the numbers of tokens, and a static layer.
    if (
        launch is None
        or not num_written <= num_tokens == key.shape[0] == value.shape[0] == positions.shape[-1]
        or not (out is None or out.shape[0] == num_tokens)
        or not (write.layer is None or 0 <= write.layer < launch.scalars[1])
    ):
        launch = _prepare(call, tensors)  # raises where the contract does
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[signature] = launch
    unseen = launch.unseen(addresses, (1, num_tokens, num_written))
    if unseen:
        call.check_apart()
        launch.remember(unseen)
    result = call.result()
    with on(launch.device):
        launch.start((*addresses, write.layer, None), num_tokens, num_written, result)
    return launch, result


class _Known(NamedTuple):
    """What is done again for calls that are alike.

    Attributes:
        launch: What is launched.
        inputs: Makes what `_Launch.start` takes of the addresses of a call's tensors.
        new: The result where it is made, for any number of tokens; None where it is given.
    """

    launch: _Launch
    inputs: Callable[[Sequence[int]], tuple[Any, ...]]
    new: Empty | None


class Rotations:
    """Launches of one of the ops.

    Args:
        out: Whether its arguments begin with a tensor for the result; if query is None then, it is that.
    """

    def __init__(self, out: bool) -> None:
        self._out = int(out)
        self._known: tuple[KnownCalls[_Known], ...] = (KnownCalls(), KnownCalls())  # of few, and of many tokens

    def first(self, call: RopeCall, arguments: Sequence[Any]) -> Tensor:
        """Launches a call, and remembers it by the op's arguments."""
        launch, result = _launch(call)
        write, in_place = call.write, call.in_place
        if in_place and call.out is not call.query:
            return result  # other tensors of this kind have memory of their own
        new = empty(call.query.shape, dtype_name(call.query)) if call.out is None else None

        def known(tensors: Sequence[Tensor]) -> _Known:
            return _Known(launch, picker((*_tensors(call, in_place), write.layer, None), tensors), new)

        key = 1 + (self._out and not in_place)  # among the tensors; those before are out and query, or one of the two
        positions, slots = key + 2 + len(write.written), key + 4 + len(write.written)
        any_length = (*range(key + 2), slots) if call.positions.dim() > 1 else (*range(key + 2), positions, slots)
        # The kernel does not depend on the addresses of scales and layer, which come last.
        last = {id(x) for x in (write.k_scale, write.v_scale, write.layer_index) if x is not None}
        flat, many = self._flat(arguments)
        aligned = sum(isinstance(argument, Tensor) for argument in flat) - len(last)
        self._known[many].add(flat, known, aligned=aligned, any_length=any_length)
        return result

    def again(self, arguments: Sequence[Any]) -> Tensor | None:
        """Launches a call like an earlier one; None where there was none, or where this one must be checked itself."""
        if forward_ad._current_level >= 0:  # tangents are asked for
            return None
        flat, many = self._flat(arguments)
        found = self._known[many].find(flat)
        if found is None:
            return None
        (launch, make, new), _, addresses = found
        i, out = self._out, arguments[0]  # query, where there is no out
        query = out if arguments[i] is None else arguments[i]
        key, value, positions, slot_mapping = arguments[i + 1], arguments[i + 2], arguments[i + 7], arguments[i + 9]
        num_tokens, num_written = query.shape[0], slot_mapping.shape[0]
        inputs = make(addresses)
        if (
            not num_written <= num_tokens == key.shape[0] == value.shape[0] == positions.shape[-1] == out.shape[0]
            or (query is not out and query.data_ptr() == out.data_ptr())
            or launch.unseen(inputs, (1, num_tokens, num_written))
        ):
            return None
        with on(launch.device):
            result = out if new is None else ON_GPU.empty((num_tokens, *new[0][1:]), *new[1:])
            launch.start(inputs, num_tokens, num_written, result)
        return result

    def _flat(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], bool]:
        """Arguments as `KnownCalls` wants them, and whether there are many tokens."""
        i = self._out
        query = arguments[0] if arguments[i] is None else arguments[i]
        many = isinstance(query, Tensor) and query.dim() > 0 and query.shape[0] >= plan_rope.MANY_TOKENS
        section = arguments[i + 12]
        if section is not None:
            arguments = (*arguments[: i + 12], tuple(section), *arguments[i + 13 :])
        return distinct(arguments, i + 17), many


def _tensors(call: RopeCall, in_place: bool) -> tuple[Tensor | None, ...]:
    """The tensors of a call, in the order of its `inputs`; then out, if it is not query."""
    write = call.write
    return (
        call.query, write.key, write.value, *write.written, call.positions, call.cos_sin, write.slot_mapping,
        call.q_norm, call.k_norm, write.k_scale, write.v_scale, write.layer_index, None if in_place else call.out,
    )  # fmt: skip


def _prepare(call: RopeCall, tensors: Sequence[Tensor | None]) -> _Launch:
    described = call.check()
    check_cache_address(described.write.cache.format, call.write.caches[0].data_ptr())
    values = _arguments(described, call)
    # Scales and layer count as unaligned, as those of a write do. New tensors are multiples of 16.
    aligned = aligned_pointers(plan_rope.POINTERS, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
    aligned |= {"out_ptr"} if call.out is None else aligned_pointers(["out_ptr"], [call.out])
    pointers = pointees(plan_rope.POINTERS, values) | {"out_ptr": dtype_name(call.query)}
    with torch.cuda.device(call.device):
        plan = _plan(described, call, target())
        kernel = load(plan.kernel, pointers, aligned)
    reaches = _reaches(call, tensors)
    pairs = [*combinations(range(3, 3 + len(call.write.written)), 2)]
    if call.out is not None:
        out = 0 if tensors[-1] is None else len(tensors) - 1
        pairs += [(i, out) for i, tensor in enumerate(tensors) if tensor is not None and i != out]
        if reaches[out].step < reaches[out].row:  # then the number of tokens decides whether it overlaps itself
            pairs.append((out, out))
    return _Launch(
        kernel=kernel,
        plan=plan,
        device=call.device,
        pointers=itemgetter(*_places(described, call, len(tensors))),
        scalars=plan_rope.scalars(described, 0, 0)[2:],
        reaches=reaches,
        pairs=pairs,
    )


def _reaches(call: RopeCall, tensors: Sequence[Tensor | None]) -> list[_Reach]:
    reaches = []
    for place, tensor in enumerate(tensors):
        if tensor is None:
            reaches.append(_Reach(0, 0, 0))
            continue
        size, counts, axis = tensor.element_size(), 0, 0
        if place < 3 or place == len(tensors) - 1:
            counts = 1
        elif tensor is call.positions:
            counts, axis = 1, -1
        elif tensor is call.write.slot_mapping:
            counts = 2
        row = tensor.narrow(axis, 0, 1) if counts and tensor.shape[axis] else tensor
        reaches.append(_Reach(counts, span(row) * size, tensor.stride(axis) * size if counts else 0))
    return reaches


def _plan(described: Rope, call: RopeCall, target: Target) -> plan_rope.RopePlan:
    in_place = call.in_place
    out = None if in_place or call.out is None else spec_of(call.out)
    layer_is_pointer = call.write.layer_index is not None
    return plan_rope.plan_rope(described, target, layer_is_pointer, described.query if in_place else out, in_place)


def _places(described: Rope, call: RopeCall, num_tensors: int) -> list[int]:
    """The index of each of the kernel's pointers among the inputs of `rope_and_cache`; -1 for None, their last."""
    num_caches, num_written = len(call.write.caches), len(call.write.written)
    query, key, value, *others, _ = range(num_tensors)
    written, (positions, cos_sin, slot_mapping, q_norm, k_norm, k_scale, v_scale, layer) = (
        others[:num_written], others[num_written:],
    )  # fmt: skip
    if call.write.layer_index is None:
        layer = num_tensors
    places = plan_rope.arguments(
        described, query, key, value, written[:num_caches], written[num_caches:], positions, cos_sin, slot_mapping,
        q_norm, k_norm, k_scale, k_scale if described.latent else v_scale, layer, 0, 0,
    )  # fmt: skip
    return [-1 if place is None else place for place in places[: len(plan_rope.POINTERS)]]


def _arguments(described: Rope, call: RopeCall) -> list[Any]:
    """What the kernel is launched with, but its result."""
    write = call.write
    return plan_rope.arguments(
        described, call.query, write.key, write.value, write.caches, write.scale_caches, call.positions, call.cos_sin,
        write.slot_mapping, call.q_norm, call.k_norm, write.k_scale,
        write.k_scale if described.latent else write.v_scale, layer_of(write), call.query.shape[0],
        write.slot_mapping.shape[0],
    )  # fmt: skip


def interpret_rope(described: Rope, call: RopeCall) -> Tensor:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory. Returns the rotated query."""
    plan, result = _plan(described, call, INTERPRETER), call.result()
    grid = plan.grid(call.query.shape[0], call.write.slot_mapping.shape[0])
    interpret(plan.kernel, grid, [*_arguments(described, call), result])
    return result
