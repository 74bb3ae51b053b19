"""Attention kernels for Hopper, compiled without a GPU, and what ptxas says of them."""

import re
import subprocess
from pathlib import Path
from typing import Any

from kvcore.contract.read import Attention
from kvcore.plan.attention import POINTERS, plan_attention
from kvcore.run.compiler import compile_kernel
from tests.cases.hopper import H100, is_for_hopper


def compile_for_hopper(call: Attention) -> Any:
    """Triton's CompiledKernel of a call that a kernel for Hopper takes, with arrays that begin at multiples of 16."""
    plan = plan_attention(call, H100, layer_is_pointer=call.cache.extents.num_layers is not None, descriptors=True)
    assert is_for_hopper(plan)
    dtype = call.query.dtype
    pointers: dict[str, str | None] = dict.fromkeys(POINTERS)
    pointers |= dict.fromkeys(("query_ptr", "key_cache_ptr", "value_cache_ptr"), dtype)
    pointers |= dict.fromkeys(("block_tables_ptr", "seq_lens_ptr"), "int32")
    pointers |= {
        "query_start_loc_ptr": None if call.query_start_loc is None else "int32",
        "sinks_ptr": None if call.sinks is None else "float32",
        "layer": None if call.cache.extents.num_layers is None else "int32",
        "out_ptr": "float32" if plan.splits > 1 else dtype,
        "lse_ptr": "float32",
    }
    return compile_kernel(plan.attend, H100, pointers, frozenset(n for n, d in pointers.items() if d and n != "layer"))


def ptxas(kernel: Any, folder: Path) -> str:
    """What ptxas says when it makes a kernel of its PTX in a folder."""
    from triton.backends.nvidia.compiler import get_ptxas

    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


def spilled(report: str) -> int:
    """Bytes that a thread stores because registers are too few, in what `ptxas` says."""
    return int(re.findall(r"(\d+) bytes spill stores", report)[0])


def count_in_loops(sass: str, counted: str, products: int) -> list[int]:
    """How many instructions of a kind lie in the loops with so many products of wgmma, in the order of the program.

    A loop is what lies between a label and a jump back to it. Where such loops overlap, the shortest counts: compilers
    move what is rare past the end, and jump back from there.
    """
    lines = sass.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\w+):$", line))}
    back = []
    for i, line in enumerate(lines):
        match = re.search(r"\bBRA (?:.*\W)?(\w+);", line)
        if match and labels.get(match[1], i) < i:  # the jump to itself behind the last instruction has no label
            back.append((labels[match[1]], i))
    found: list[tuple[int, int]] = []
    for begin, end in sorted(back, key=lambda loop: loop[1] - loop[0]):
        alone = all(end < first or last < begin for first, last in found)
        if alone and sum(bool(re.search(r"\bHGMMA\b", line)) for line in lines[begin:end]) == products:
            found.append((begin, end))
    return [sum(bool(re.search(counted, line)) for line in lines[begin:end]) for begin, end in sorted(found)]
