"""Compile and launch the kernels that write on CUDA and ROCm tensors, and interpret them on CPU tensors.

What is launched depends on all of a call but its addresses, the numbers of tokens and a static layer. Contract and plan
run once for calls that agree in the rest, and `Writes` knows most of these again without asking tensors for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.cache import check_cache_address
from kvcore.contract.write import Write
from kvcore.plan import write as plan_write
from kvcore.plan.kernel import INTERPRETER
from torchkv._call import WriteCall, layer_of
from torchkv._memory import address_of, check_apart, span
from torchkv._triton.known import KnownCalls, marker, picker
from torchkv._triton.launch import (
    MOST_LAUNCHES,
    Kernel,
    aligned_pointers,
    interpret,
    is_current,
    load,
    pointees,
    start,
    target,
)


class _Pair(NamedTuple):
    """Two tensors that are written to: their indices among the addresses of a call, and the bytes that each spans."""

    first: int
    second: int
    first_span: int
    second_span: int


@dataclass(slots=True)
class _Launch:
    """A compiled kernel and what its launches have in common.

    Attributes:
        described: What the contract says of them.
        kernel: What is launched.
        plan: How.
        device: Where.
        num_slots: The kernel's scalar of this name.
        num_layers: The kernel's scalar of this name.
        pairs: All pairs of tensors that are written to.
        apart: Pairs that were seen to share no memory although their spans overlap: the two indices, and the bytes from
            one address to the other.
    """

    described: Write
    kernel: Kernel
    plan: plan_write.WritePlan
    device: torch.device
    num_slots: int
    num_layers: int
    pairs: list[_Pair]
    apart: set[tuple[int, int, int]] = field(default_factory=set)

    def unseen(self, addresses: Sequence[int]) -> tuple[int, int, int] | None:
        """A pair that may share memory, as `apart` has it, or None.

        Args:
            addresses: Those of key, value, the tensors that are written to, and others.
        """
        for first, second, first_span, second_span in self.pairs:
            distance = addresses[second] - addresses[first]
            if -second_span < distance < first_span and (first, second, distance) not in self.apart:
                return first, second, distance
        return None

    def start(self, pointers: Sequence[int | None], num_tokens: int) -> None:
        """Starts the kernel, given its pointer arguments."""
        if num_tokens == 0:
            return
        arguments = (*pointers, num_tokens, self.num_slots, self.num_layers)
        if is_current(self.device):
            start(self.kernel, self.plan.grid(num_tokens), arguments)
        else:
            with torch.cuda.device(self.device):
                start(self.kernel, self.plan.grid(num_tokens), arguments)


_launches: dict[tuple[Any, ...], _Launch] = {}


class _Known(NamedTuple):
    """What is done again for calls that are alike.

    Attributes:
        launch: What is launched.
        pointers: Makes the kernel's pointer arguments of the addresses of a call's tensors.
        slots: Which of the tensors is slot_mapping.
        mark: Tells autograd what was changed.
    """

    launch: _Launch
    pointers: Callable[[Sequence[int]], tuple[int | None, ...]]
    slots: int
    mark: Callable[[Sequence[Tensor]], None]


class Writes:
    """Launches of an op whose tensors begin with key, value, those that are written to, and slot_mapping."""

    def __init__(self) -> None:
        self._known: KnownCalls[_Known] = KnownCalls()

    def first(self, call: WriteCall, arguments: Sequence[Any]) -> tuple[()]:
        """Launches a call, and remembers it by the op's arguments."""
        launch = write(call)
        slots = 2 + len(call.written)
        if call.key is arguments[0] and call.value is arguments[1]:  # else they were made of the op's arguments

            def known(tensors: Sequence[Tensor]) -> _Known:
                pointers = picker(_pointers(launch.described, call), tensors)
                return _Known(launch, pointers, slots, marker(tensors, range(2, slots)))

            # The kernel does not depend on the addresses of scales and layer, nor on the numbers of tokens.
            self._known.add(arguments, known, aligned=slots + 1, any_length=(0, 1, slots))
        return ()

    def prepare(self, call: WriteCall) -> list[Kernel]:
        """Checks a call, of tensors that may be fake, and loads its kernel."""
        return [_prepare(call).kernel]

    def again(self, arguments: Sequence[Any]) -> tuple[()] | None:
        """Launches a call like an earlier one; None where there was none, or where this one must be checked itself."""
        found = self._known.find(arguments)
        if found is None:
            return None
        (launch, pointers, slots, mark), tensors, addresses = found
        num_tokens = tensors[slots].shape[0]
        if not num_tokens <= tensors[0].shape[0] == tensors[1].shape[0] or launch.unseen(addresses):
            return None
        launch.start(pointers(addresses), num_tokens)
        mark(tensors)
        return ()


def write(call: WriteCall) -> _Launch:
    """Launches the write on the current stream of the caches' device."""
    key, value, slot_mapping = call.key, call.value, call.slot_mapping
    key_cache, value_cache, scale_caches = call.caches[0], call.caches[-1], call.scale_caches
    k_scale, v_scale, layer, layer_index = call.k_scale, call.v_scale, call.layer, call.layer_index
    device, tensors = key.device, (key, value, *call.caches, *scale_caches, slot_mapping)
    addresses = [tensor.data_ptr() for tensor in tensors]
    signature = (
        key.dtype, key.shape[1:], key.stride(), device,
        value.dtype, value.shape[1:], value.stride(), value.device,
        key_cache.dtype, key_cache.shape, key_cache.stride(), key_cache.device, len(call.caches),
        value_cache is key_cache or (value_cache.dtype, value_cache.shape, value_cache.stride(), value_cache.device),
        *[(scales.dtype, scales.shape, scales.stride(), scales.device) for scales in scale_caches],
        slot_mapping.dtype, slot_mapping.dim(), slot_mapping.stride(), slot_mapping.device,
        call.kv_cache_dtype, call.layout, layer is None, call.scale_layout, call.latent,
        *[address % 16 == 0 for address in addresses], addresses[2] % 4,
        k_scale is None or (k_scale.dtype, k_scale.shape, k_scale.stride(), k_scale.device),
        v_scale is None or (v_scale.dtype, v_scale.shape, v_scale.stride(), v_scale.device),
        layer_index is None or (layer_index.dtype, layer_index.shape, layer_index.device),
    )  # fmt: skip
    launch = _launches.get(signature)
    # The contract has to see again what the signature leaves out: the numbers of tokens, and a static layer.
    num_tokens = slot_mapping.shape[0]
    if (
        launch is None
        or not num_tokens <= key.shape[0] == value.shape[0]
        or not (layer is None or 0 <= layer < launch.num_layers)
    ):
        launch = _prepare(call)  # raises where the contract does
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        _launches[signature] = launch
    unseen = launch.unseen(addresses)
    if unseen:
        check_apart(call.written_names, call.written)
        launch.apart |= {unseen}
    pointers = _pointers(launch.described, call)
    launch.start([p.data_ptr() if isinstance(p, Tensor) else p for p in pointers], num_tokens)
    return launch


def _prepare(call: WriteCall) -> _Launch:
    described = call.check()
    check_cache_address(described.cache.format, address_of(call.caches[0]))
    names, values = plan_write.pointers(described), _pointers(described, call)
    # Scales and layer count as unaligned: neither the signature nor what is known of a call says how they are aligned.
    aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
    with torch.cuda.device(call.device):
        plan = plan_write.plan_write(described, target(), layer_is_pointer=call.layer_index is not None)
        kernel = load(plan.kernel, pointees(names, values), aligned)
    _, num_slots, num_layers = plan_write.scalars(described, 0)
    spans = [span(tensor) * tensor.element_size() for tensor in call.written]
    return _Launch(
        described=described,
        kernel=kernel,
        plan=plan,
        device=call.device,
        num_slots=num_slots,
        num_layers=num_layers,
        pairs=[_Pair(2 + i, 2 + j, spans[i], spans[j]) for i, j in combinations(range(len(spans)), 2)],
    )


def _arguments(described: Write, call: WriteCall) -> list[Any]:
    """What the kernel is launched with."""
    return plan_write.arguments(
        described, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale, call.v_scale,
        layer_of(call), call.slot_mapping.shape[0],
    )  # fmt: skip


def _pointers(described: Write, call: WriteCall) -> list[Any]:
    """The kernel's arguments before its scalars."""
    return _arguments(described, call)[: -len(plan_write.SCALARS)]


def interpret_write(described: Write, call: WriteCall) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_write.plan_write(described, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    interpret(plan.kernel, plan.grid(call.slot_mapping.shape[0]), _arguments(described, call))
