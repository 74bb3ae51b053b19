"""Compile and launch the kernels that write on CUDA and ROCm tensors, and interpret them on CPU tensors.

A launch is a dictionary look-up and a call of the compiled kernel with integer pointers. All that the contract and the
plan depend on is in the dictionary's key, but for the number of tokens, so both run once a configuration.
"""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch

from kvcore.contract.cache import check_cache_address
from kvcore.contract.checks import overlap_error
from kvcore.contract.write import Write
from kvcore.plan.kernel import INTERPRETER
from kvcore.plan.write import WritePlan, arguments, plan_write, pointers, scalars
from torchkv._call import WriteCall, layer_of
from torchkv._memory import share_elements, span
from torchkv._triton.launch import Kernel, aligned_pointers, interpret, load, pointees, start, target


class _Pair(NamedTuple):
    """Two tensors that are written to, by their places in `WriteCall.written`, and the bytes that each reaches."""

    first: int
    second: int
    first_span: int
    second_span: int


@dataclass(slots=True)
class _Launch:
    """A compiled kernel and what its launches have in common.

    Attributes:
        plan: How to launch it.
        kernel: What is launched.
        order: For each pointer argument its place among a call's tensors, as `_run` has them; None where the kernel
            gets None.
        num_slots: The kernel's scalar.
        num_layers: The kernel's scalar.
        pairs: Any two tensors that are written to.
        apart: Places of two of them, and bytes from one to the other at which they were seen to share nothing.
    """

    plan: WritePlan
    kernel: Kernel
    order: list[int | None]
    num_slots: int
    num_layers: int
    pairs: list[_Pair]
    apart: set[tuple[int, int, int]] = field(default_factory=set)


_launches: dict[tuple[Any, ...], _Launch] = {}


def write(call: WriteCall) -> None:
    """Launches the write on the current stream of the caches' device."""
    key, value, slot_mapping, layer = call.key, call.value, call.slot_mapping, call.layer
    k_scale, v_scale, layer_index = call.k_scale, call.v_scale, call.layer_index
    written = call.caches + call.scale_caches
    addresses = [tensor.data_ptr() for tensor in (key, value, *written, slot_mapping)]
    signature = (
        key.dtype, key.shape[1:], key.stride(), key.device,
        value.dtype, value.shape[1:], value.stride(), value.device,
        *[(tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in written], len(call.caches),
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
        launch = _launches[signature] = _prepare(call)
    for first, second, first_span, second_span in launch.pairs:
        distance = addresses[2 + second] - addresses[2 + first]
        if -second_span < distance < first_span and (first, second, distance) not in launch.apart:
            if share_elements(written[first], written[second]):
                raise overlap_error(call.written_names[first], call.written_names[second])
            launch.apart.add((first, second, distance))
    if num_tokens == 0:
        return

    # One more device guard costs more than the look-up: only where another device is current.
    device = key.device.index
    if device == torch.cuda.current_device():
        _run(launch, call, device, addresses)
    else:
        with torch.cuda.device(device):
            _run(launch, call, device, addresses)


def _run(launch: _Launch, call: WriteCall, device: int, addresses: list[int]) -> None:
    num_tokens, k_scale, v_scale, layer_index = call.slot_mapping.shape[0], call.k_scale, call.v_scale, call.layer_index
    inputs = (
        *addresses,
        None if k_scale is None else k_scale.data_ptr(),
        None if v_scale is None else v_scale.data_ptr(),
        call.layer if layer_index is None else layer_index.data_ptr(),
    )
    arguments = [None if place is None else inputs[place] for place in launch.order]
    grid = launch.plan.grid(num_tokens)
    start(launch.kernel, grid, device, (*arguments, num_tokens, launch.num_slots, launch.num_layers))


def _prepare(call: WriteCall) -> _Launch:
    described = call.check()
    check_cache_address(described.cache.format, call.caches[0].data_ptr())
    names, values = pointers(described), _arguments(described, call)
    # Not of scales and layer: the signature does not say how they are aligned.
    aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
    with torch.cuda.device(call.device):
        plan = plan_write(described, target(), layer_is_pointer=call.layer_index is not None)
        kernel = load(plan.kernel, pointees(names, values), aligned)
    _, num_slots, num_layers = scalars(described, 0)
    spans = [span(tensor) * tensor.element_size() for tensor in call.written]
    return _Launch(
        plan=plan,
        kernel=kernel,
        order=_order(described, call)[: len(names)],
        num_slots=num_slots,
        num_layers=num_layers,
        pairs=[_Pair(i, j, spans[i], spans[j]) for i, j in combinations(range(len(spans)), 2)],
    )


def _order(described: Write, call: WriteCall) -> list[int | None]:
    """What the kernel is launched with, as places in the order that a call has its tensors in."""
    num_caches, num_written = len(call.caches), len(call.written)
    key, value, *written, slot_mapping, k_scale, v_scale, layer = range(6 + num_written)
    return arguments(
        described, key, value, written[:num_caches], written[num_caches:], slot_mapping,
        None if call.k_scale is None else k_scale, None if call.v_scale is None else v_scale,
        None if layer_of(call) is None else layer, 0,
    )  # fmt: skip


def _arguments(described: Write, call: WriteCall) -> list[Any]:
    """What the kernel is launched with."""
    return arguments(
        described, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale, call.v_scale,
        layer_of(call), call.slot_mapping.shape[0],
    )  # fmt: skip


def interpret_write(described: Write, call: WriteCall) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    plan = plan_write(described, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    interpret(plan.kernel, plan.grid(call.slot_mapping.shape[0]), _arguments(described, call))
