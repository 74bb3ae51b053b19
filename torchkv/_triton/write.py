"""Compile and launch the kernels that write on CUDA and ROCm tensors, and interpret them on CPU tensors.

A launch is a dictionary look-up and a call of the compiled kernel with integer pointers. The dictionary's key has all
that contract and plan depend on, except the numbers of tokens and a static layer, so both run once for each key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from kvcore.contract.cache import check_cache_address
from kvcore.contract.write import Write
from kvcore.plan import write as plan_write
from kvcore.plan.kernel import INTERPRETER
from torchkv._call import WriteCall, layer_of
from torchkv._memory import check_apart, span
from torchkv._triton.launch import MOST_LAUNCHES, Kernel, aligned_pointers, interpret, load, pointees, start, target


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
        kernel: What is launched.
        plan: How.
        pointers: Picks the kernel's pointer arguments, in its order, among the inputs that `write` has.
        num_slots: The kernel's scalar of this name.
        num_layers: The kernel's scalar of this name.
        pairs: All pairs of tensors that are written to.
        apart: Pairs that were seen to share no memory although their spans overlap: the two indices, and the bytes from
            one address to the other.
    """

    kernel: Kernel
    plan: plan_write.WritePlan
    pointers: Callable[[Sequence[int | None]], tuple[int | None, ...]]
    num_slots: int
    num_layers: int
    pairs: list[_Pair]
    apart: set[tuple[int, int, int]] = field(default_factory=set)


_launches: dict[tuple[Any, ...], _Launch] = {}


def write(call: WriteCall) -> None:
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
    for first, second, first_span, second_span in launch.pairs:
        distance = addresses[second] - addresses[first]
        if -second_span < distance < first_span and (first, second, distance) not in launch.apart:
            check_apart(call.written_names, call.written)
            launch.apart.add((first, second, distance))
    if num_tokens == 0:
        return

    inputs = (
        *addresses,
        None if k_scale is None else k_scale.data_ptr(),
        None if v_scale is None else v_scale.data_ptr(),
        layer if layer_index is None else layer_index.data_ptr(),
        None,
    )
    arguments = (*launch.pointers(inputs), num_tokens, launch.num_slots, launch.num_layers)
    grid, index = launch.plan.grid(num_tokens), device.index
    if index == torch.cuda.current_device():  # a guard costs more than the question whether it is needed
        start(launch.kernel, grid, index, arguments)
    else:
        with torch.cuda.device(device):
            start(launch.kernel, grid, index, arguments)


def _prepare(call: WriteCall) -> _Launch:
    described = call.check()
    check_cache_address(described.cache.format, call.caches[0].data_ptr())
    names, values = plan_write.pointers(described), _arguments(described, call)
    # Scales and layer count as unaligned: the signature does not say how they are aligned.
    aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
    with torch.cuda.device(call.device):
        plan = plan_write.plan_write(described, target(), layer_is_pointer=call.layer_index is not None)
        kernel = load(plan.kernel, pointees(names, values), aligned)
    _, num_slots, num_layers = plan_write.scalars(described, 0)
    spans = [span(tensor) * tensor.element_size() for tensor in call.written]
    return _Launch(
        kernel=kernel,
        plan=plan,
        pointers=itemgetter(*_places(described, call)[: len(names)]),
        num_slots=num_slots,
        num_layers=num_layers,
        pairs=[_Pair(2 + i, 2 + j, spans[i], spans[j]) for i, j in combinations(range(len(spans)), 2)],
    )


def _places(described: Write, call: WriteCall) -> list[int]:
    """The index of each of the kernel's arguments among the `inputs` of `write`; -1 for None, which is their last."""
    num_caches, num_written = len(call.caches), len(call.written)
    key, value, *written, slot_mapping, k_scale, v_scale, layer = range(6 + num_written)
    places = plan_write.arguments(
        described, key, value, written[:num_caches], written[num_caches:], slot_mapping, k_scale, v_scale, layer, 0
    )
    return [-1 if place is None else place for place in places]


def _arguments(described: Write, call: WriteCall) -> list[Any]:
    """What the kernel is launched with."""
    return plan_write.arguments(
        described, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale, call.v_scale,
        layer_of(call), call.slot_mapping.shape[0],
    )  # fmt: skip


def interpret_write(described: Write, call: WriteCall) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_write.plan_write(described, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    interpret(plan.kernel, plan.grid(call.slot_mapping.shape[0]), _arguments(described, call))
