"""Compile and launch the Triton kernels on CUDA and ROCm tensors, and interpret them on CPU tensors.

A launch is a dictionary look-up and a call of the compiled kernel with integer pointers. All that the contract and the
plan depend on is in the dictionary's key, but for the number of tokens, so both run once a configuration.
"""

from typing import Any, NamedTuple

import torch

from kvcore.checks import overlap_error
from kvcore.contract import Write
from kvcore.plan import INTERPRETER, plan_write, pointers, scalars
from torchkv._call import Call, check, dtype_name
from torchkv._launch import Kernel, interpret, load, start, target
from torchkv._memory import share_elements, span


class _Launcher(NamedTuple):
    """A compiled kernel and what its launches have in common."""

    kernel: Kernel
    tokens: int
    row_programs: int
    num_slots: int
    num_layers: int
    spans: tuple[int, int]  # bytes from the first to past the last element of each cache
    apart: set[int]  # bytes from key to value cache at which interleaved caches were seen to share nothing
    scaled: bool


_launchers: dict[tuple[Any, ...], _Launcher] = {}


def launch(call: Call) -> None:
    """Launches on the current stream of the caches' device."""
    key, value, caches, slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, layer_index, _ = call
    key_cache, value_cache = caches[0], caches[-1]
    device = key_cache.device.index
    n = slot_mapping.shape[0]
    addresses = [key.data_ptr(), value.data_ptr(), *(c.data_ptr() for c in caches), slot_mapping.data_ptr()]
    alignment = 0
    for address in addresses:
        alignment = alignment << 1 | (address & 15 == 0)

    signature = (
        key.dtype, key.shape[1:], key.stride(), key.device,
        value.dtype, value.shape[1:], value.stride(), value.device,
        key_cache.dtype, key_cache.shape, key_cache.stride(), key_cache.device,
        value_cache.dtype, value_cache.shape, value_cache.stride(), value_cache.device,
        slot_mapping.dtype, slot_mapping.dim(), slot_mapping.stride(), slot_mapping.device,
        len(caches), kv_cache_dtype, layout, layer is None, alignment,
        k_scale is None or (k_scale.dtype, k_scale.shape, k_scale.device),
        v_scale is None or (v_scale.dtype, v_scale.shape, v_scale.device),
        layer_index is None or (layer_index.dtype, layer_index.shape, layer_index.device),
    )  # fmt: skip
    found = _launchers.get(signature)
    # What the signature leaves out, the contract has to see again.
    if found is None or not n <= key.shape[0] == value.shape[0] or not (layer is None or 0 <= layer < found.num_layers):
        write = check(call)
        with torch.cuda.device(device):
            found = _launchers[signature] = _compile(write, call, addresses)
    if len(caches) == 2:
        distance = addresses[3] - addresses[2]
        if -found.spans[1] < distance < found.spans[0] and distance not in found.apart:
            if share_elements(key_cache, value_cache):
                raise overlap_error()
            found.apart.add(distance)
    if n == 0:
        return

    # One more device guard costs more than the look-up: only where another device is current.
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(found, call, device, n, addresses)
    else:
        _run(found, call, device, n, addresses)


def _run(found: _Launcher, call: Call, device: int, n: int, addresses: list[int]) -> None:
    grid = (-(-n // found.tokens), found.row_programs, 1)
    arguments = (
        *addresses,
        call.k_scale.data_ptr() if found.scaled and call.k_scale is not None else None,
        call.v_scale.data_ptr() if found.scaled and call.v_scale is not None else None,
        call.layer if call.layer_index is None else call.layer_index.data_ptr(),
        n,
        found.num_slots,
        found.num_layers,
    )
    start(found.kernel, grid, device, arguments)


def _compile(write: Write, call: Call, addresses: list[int]) -> _Launcher:
    plan = plan_write(write, target(), layer_is_pointer=call.layer_index is not None)
    tensors = (call.key, call.value, *call.caches, call.slot_mapping)
    names = pointers(write.layout.single_array)
    pointees: dict[str, str | None] = dict.fromkeys(names)
    pointees |= {name: dtype_name(tensor) for name, tensor in zip(names, tensors, strict=False)}
    for name, scale in (("k_scale_ptr", call.k_scale), ("v_scale_ptr", call.v_scale)):
        pointees[name] = "float32" if write.scaled and scale is not None else None
    if call.layer_index is not None:
        pointees["layer"] = dtype_name(call.layer_index)
    elif call.layer is not None:
        pointees["layer"] = "scalar"
    aligned = frozenset(name for name, address in zip(names, addresses, strict=False) if address % 16 == 0)
    _, num_slots, num_layers = scalars(write, 0)
    size = call.caches[0].element_size()
    return _Launcher(
        kernel=load(plan.kernel, pointees, aligned),
        tokens=plan.tokens,
        row_programs=plan.row_programs,
        num_slots=num_slots,
        num_layers=num_layers,
        spans=(span(call.caches[0]) * size, span(call.caches[-1]) * size),
        apart=set(),
        scaled=write.scaled,
    )


def interpret_write(write: Write, call: Call) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    if len(call.caches) == 2 and share_elements(*call.caches):
        raise overlap_error()
    n = call.slot_mapping.shape[0]
    plan = plan_write(write, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    arguments = [
        call.key,
        call.value,
        *call.caches,
        call.slot_mapping,
        call.k_scale if write.scaled else None,
        call.v_scale if write.scaled else None,
        call.layer if call.layer_index is None else call.layer_index,
        *scalars(write, n),
    ]
    interpret(plan.kernel, plan.grid(n), arguments)
