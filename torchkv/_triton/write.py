"""Compile and launch the Triton kernels on CUDA and ROCm tensors, and interpret them on CPU tensors.

A launch is a dictionary look-up and a call of the compiled kernel with integer pointers. All that the contract and the
plan depend on is in the dictionary's key, but for the number of tokens, so both run once a configuration.
"""

from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.write import Write
from kvcore.plan.kernel import INTERPRETER
from kvcore.plan.write import arguments, plan_write, pointers
from torchkv._arguments import dtype_name
from torchkv._call import Call, check, memory_names
from torchkv._memory import check_address, overlap_error, share_elements, span
from torchkv._triton.launch import Kernel, interpret, load, start, target


class _Launcher(NamedTuple):
    """A compiled kernel and what its launches have in common."""

    kernel: Kernel
    token_rows: int
    rows: int
    row_programs: int
    num_slots: int
    num_layers: int
    scaled: bool
    gaps: tuple[int, ...]  # where the kernel gets None among the tensors
    # Any two that are written to, and the bytes from the first to past the last element of each.
    pairs: tuple[tuple[int, int, int, int], ...]
    apart: set[tuple[int, int, int]]  # such two, and bytes between them at which they were seen to share nothing


_launchers: dict[tuple[Any, ...], _Launcher] = {}


def launch(call: Call) -> None:
    """Launches on the current stream of the caches' device."""
    (
        key, value, memory, slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, layer_index, _, scale_layout,
        rows,
    ) = call  # fmt: skip
    first, last = memory[0], memory[-1]
    home = first.device
    n = slot_mapping.shape[0]
    addresses: list[Any] = [key.data_ptr(), value.data_ptr(), *[m.data_ptr() for m in memory], slot_mapping.data_ptr()]
    signature = (
        key.dtype, key.shape[1:], key.stride(), key.device,
        value.dtype, value.shape[1:], value.stride(), value.device,
        first.dtype, first.shape, first.stride(), home,
        last is first or (last.dtype, last.shape, last.stride(), last.device),
        slot_mapping.dtype, slot_mapping.dim(), slot_mapping.stride(), slot_mapping.device,
        len(memory), kv_cache_dtype, layout, layer is None, scale_layout, rows,
        *[address & 15 == 0 for address in addresses], addresses[2] & 3,
        k_scale is None or (k_scale.dtype, shape := k_scale.shape, shape and k_scale.stride(), k_scale.device),
        v_scale is None or (v_scale.dtype, shape := v_scale.shape, shape and v_scale.stride(), v_scale.device),
        layer_index is None or (layer_index.dtype, layer_index.shape, layer_index.device),
        len(memory) > 2 and tuple((m.dtype, m.shape, m.stride(), m.device) for m in memory[1:-1]),
    )  # fmt: skip
    found = _launchers.get(signature)
    # What the signature leaves out, the contract has to see again.
    if found is None or not n <= key.shape[0] == value.shape[0] or not (layer is None or 0 <= layer < found.num_layers):
        write = check(call)
        with torch.cuda.device(home):
            found = _launchers[signature] = _compile(write, call)
    for i, j, span_i, span_j in found.pairs:
        distance = addresses[2 + j] - addresses[2 + i]
        if -span_j < distance < span_i and (i, j, distance) not in found.apart:
            if share_elements(memory[i], memory[j]):
                names = memory_names(len(memory))
                raise overlap_error(names[i], names[j])
            found.apart.add((i, j, distance))
    if n == 0:
        return

    # One more device guard costs more than the look-up: only where another device is current.
    device = home.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(found, call, device, n, addresses)
    else:
        _run(found, call, device, n, addresses)


def _run(found: _Launcher, call: Call, device: int, n: int, addresses: list[Any]) -> None:
    grid = (-(-n * found.token_rows // found.rows), found.row_programs, 1)
    for place in found.gaps:
        addresses.insert(place, None)
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


def _compile(write: Write, call: Call) -> _Launcher:
    check_address(call.memory[0], write.cache.format)
    plan = plan_write(write, target(), layer_is_pointer=call.layer_index is not None)
    pointees: dict[str, str | None] = {}
    aligned = []
    given = _arguments(write, call)
    names = pointers(write)
    for name, argument in zip(names, given, strict=False):
        pointees[name] = None if argument is None else "scalar"
        if isinstance(argument, Tensor):
            pointees[name] = dtype_name(argument)
            # Not of scales and layer: the launcher's signature does not say how they are aligned.
            if name not in ("k_scale_ptr", "v_scale_ptr", "layer") and argument.data_ptr() % 16 == 0:
                aligned.append(name)
    *_, num_slots, num_layers = given
    spans = [span(m) * m.element_size() for m in call.memory]
    return _Launcher(
        kernel=load(plan.kernel, pointees, frozenset(aligned)),
        token_rows=plan.token_rows,
        rows=plan.rows,
        row_programs=plan.row_programs,
        num_slots=num_slots,
        num_layers=num_layers,
        scaled=write.scaled,
        gaps=tuple(i for i, _ in enumerate(names[:-3]) if given[i] is None),
        pairs=tuple((i, j, spans[i], spans[j]) for i, j in combinations(range(len(spans)), 2)),
        apart=set(),
    )


def _arguments(write: Write, call: Call) -> list[Any]:
    return arguments(
        write, call.key, call.value, call.caches, call.scale_caches, call.slot_mapping, call.k_scale, call.v_scale,
        call.layer if call.layer_index is None else call.layer_index, call.slot_mapping.shape[0],
    )  # fmt: skip


def interpret_write(write: Write, call: Call) -> None:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory."""
    n = call.slot_mapping.shape[0]
    plan = plan_write(write, INTERPRETER, layer_is_pointer=call.layer_index is not None)
    interpret(plan.kernel, plan.grid(n), _arguments(write, call))
