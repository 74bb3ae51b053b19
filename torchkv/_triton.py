"""Compile and launch the Triton kernels on CUDA and ROCm tensors, and interpret them on CPU tensors.

A launch is a dictionary look-up and a call of the compiled kernel with integer pointers. All that the contract and the
plan depend on is in the dictionary's key, but for the number of tokens, so both run once a configuration.
"""

from collections.abc import Callable
from itertools import combinations
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract import Write
from kvcore.plan import INTERPRETER, arguments, plan_write, pointers, scalars
from torchkv._call import Call, check, dtype_name, memory_names
from torchkv._launch import Kernel, interpret, load, start, target
from torchkv._memory import check_address, overlap_error, share_elements, span


class _Launcher(NamedTuple):
    """A compiled kernel and what its launches have in common."""

    kernel: Kernel
    token_rows: int
    rows: int
    row_programs: int
    num_slots: int
    num_layers: int
    # What the kernel gets, out of the addresses of key, value, memory and slots, of both scales, layer, and None.
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    # Any two of the memory, and the bytes from the first to past the last element of each
    pairs: tuple[tuple[int, int, int, int], ...]
    apart: set[tuple[int, int, int]]  # two of the memory, and the bytes between them at which they were seen to be so


_launchers: dict[tuple[Any, ...], _Launcher] = {}


def launch(call: Call) -> None:
    """Launches on the current stream of the caches' device."""
    (
        key, value, caches, slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, layer_index, _, scale_caches,
        scale_layout, rows,
    ) = call  # fmt: skip
    key_cache, value_cache = caches[0], caches[-1]
    memory = call.memory
    device = key_cache.device.index
    n = slot_mapping.shape[0]
    addresses = [key.data_ptr(), value.data_ptr(), *(m.data_ptr() for m in memory), slot_mapping.data_ptr()]
    alignment = 0
    for address in addresses:
        alignment = alignment << 1 | (address & 15 == 0)

    signature = (
        key.dtype, key.shape[1:], key.stride(), key.device,
        value.dtype, value.shape[1:], value.stride(), value.device,
        key_cache.dtype, key_cache.shape, key_cache.stride(), key_cache.device,
        value_cache.dtype, value_cache.shape, value_cache.stride(), value_cache.device,
        slot_mapping.dtype, slot_mapping.dim(), slot_mapping.stride(), slot_mapping.device,
        len(caches), kv_cache_dtype, layout, layer is None, alignment, addresses[2] & 3, rows,
        k_scale is None or (k_scale.dtype, k_scale.shape, k_scale.stride(), k_scale.device),
        v_scale is None or (v_scale.dtype, v_scale.shape, v_scale.stride(), v_scale.device),
        layer_index is None or (layer_index.dtype, layer_index.shape, layer_index.device),
        scale_caches and (scale_layout, *((s.dtype, s.shape, s.stride(), s.device) for s in scale_caches)),
    )  # fmt: skip
    found = _launchers.get(signature)
    # What the signature leaves out, the contract has to see again.
    if found is None or not n <= key.shape[0] == value.shape[0] or not (layer is None or 0 <= layer < found.num_layers):
        write = check(call)
        with torch.cuda.device(device):
            found = _launchers[signature] = _compile(write, call)
    for i, j, span_i, span_j in found.pairs:
        distance = addresses[2 + j] - addresses[2 + i]
        if -span_j < distance < span_i and (i, j, distance) not in found.apart:
            if share_elements(memory[i], memory[j]):
                names = memory_names(len(caches), len(scale_caches))
                raise overlap_error(names[i], names[j])
            found.apart.add((i, j, distance))
    if n == 0:
        return

    # One more device guard costs more than the look-up: only where another device is current.
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(found, call, device, n, addresses)
    else:
        _run(found, call, device, n, addresses)


def _run(found: _Launcher, call: Call, device: int, n: int, addresses: list[int]) -> None:
    grid = (-(-n * found.token_rows // found.rows), found.row_programs, 1)
    picked = found.pick(
        (
            *addresses,
            None if call.k_scale is None else call.k_scale.data_ptr(),
            None if call.v_scale is None else call.v_scale.data_ptr(),
            call.layer if call.layer_index is None else call.layer_index.data_ptr(),
            None,
        )
    )
    start(found.kernel, grid, device, (*picked, n, found.num_slots, found.num_layers))


def _compile(write: Write, call: Call) -> _Launcher:
    check_address(call.caches[0], write.format)
    plan = plan_write(write, target(), layer_is_pointer=call.layer_index is not None)
    pointees: dict[str, str | None] = {}
    aligned = []
    for name, argument in zip(pointers(write), _arguments(write, call), strict=True):
        pointees[name] = None if argument is None else "scalar"
        if isinstance(argument, Tensor):
            pointees[name] = dtype_name(argument)
            # Not of scales and layer: the launcher's signature does not say how they are aligned.
            if name not in ("k_scale_ptr", "v_scale_ptr", "layer") and argument.data_ptr() % 16 == 0:
                aligned.append(name)
    _, num_slots, num_layers = scalars(write, 0)
    spans = [span(m) * m.element_size() for m in call.memory]
    return _Launcher(
        kernel=load(plan.kernel, pointees, frozenset(aligned)),
        token_rows=plan.token_rows,
        rows=plan.rows,
        row_programs=plan.row_programs,
        num_slots=num_slots,
        num_layers=num_layers,
        pick=_picker(write, len(call.caches), len(call.memory)),
        pairs=tuple((i, j, spans[i], spans[j]) for i, j in combinations(range(len(spans)), 2)),
        apart=set(),
    )


def _picker(write: Write, num_caches: int, num_written: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Puts what a launch has into the kernel's order, without asking the plan for it every time."""
    slots = 2 + num_written
    caches, scale_caches = range(2, 2 + num_caches), range(2 + num_caches, slots)
    order = arguments(write, 0, 1, caches, scale_caches, slots, slots + 1, slots + 2, slots + 3)
    return itemgetter(*(slots + 4 if place is None else place for place in order))


def _arguments(write: Write, call: Call) -> list[Tensor | int | None]:
    layer = call.layer if call.layer_index is None else call.layer_index
    return arguments(
        write, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale, call.v_scale,
        layer,
    )  # fmt: skip


def interpret_write(write: Write, call: Call) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    n = call.slot_mapping.shape[0]
    plan = plan_write(write, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    interpret(plan.kernel, plan.grid(n), [*_arguments(write, call), *scalars(write, n)])
