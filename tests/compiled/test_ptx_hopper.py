"""The attention kernel for Hopper, compiled without a GPU: wgmma, TMA, shared memory, registers."""

import re
import subprocess

import pytest

pytest.importorskip("triton", minversion="3.8")

from kvcore.plan.attention import POINTERS, plan_attention
from kvcore.run.compiler import compile_kernel, has_gluon
from tests.cases.hopper import H100, HEADS, is_for_hopper, prefill

SPILLED = {(64, 64): 1024, (192, 128): 512, (256, 256): 2048}
"""Bytes of registers that a thread may spill, by head sizes: most of them in the way that is taken once infinite or NaN
values were met. Others: 256."""


def compile_prefill(**options):
    call = prefill(**options)
    plan = plan_attention(call, H100, layer_is_pointer=call.cache.extents.num_layers is not None, descriptors=True)
    assert is_for_hopper(plan)
    dtype = call.query.dtype
    integers = {"block_tables_ptr", "seq_lens_ptr", "query_start_loc_ptr"}
    pointers = {name: "int32" if name in integers else dtype for name in POINTERS}
    pointers |= dict.fromkeys(("sinks_ptr", "k_scale_ptr", "v_scale_ptr", "layer"))
    pointers |= {"sinks_ptr": call.sinks and "float32", "layer": call.cache.extents.num_layers and "int32"}
    pointers |= {"out_ptr": "float32" if plan.splits > 1 else dtype, "lse_ptr": "float32"}
    return compile_kernel(plan.attend, H100, pointers, frozenset(n for n, d in pointers.items() if d and n != "layer"))


def spilled(kernel, tmp_path):
    """Bytes that threads store because registers are too few, as ptxas has it."""
    from triton.backends.nvidia.compiler import get_ptxas

    (tmp_path / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"(\d+) bytes spill stores", report)[0])


@pytest.mark.parametrize("head_sizes", HEADS)
def test_heads(head_sizes, tmp_path):
    kernel = compile_prefill(head_size=head_sizes[0], head_size_v=head_sizes[1])
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64" in ptx
    assert "cp.async.bulk.tensor.4d" in ptx
    consumers = 3 if head_sizes == (64, 64) else 2
    assert kernel.metadata.num_warps == 4 * consumers + 4  # those, a producer of 1, and what fills its group
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.global_scratch_size == 0  # descriptors come from the host
    assert spilled(kernel, tmp_path) <= SPILLED.get(head_sizes, 256)


@pytest.mark.parametrize(
    "options",
    [
        dict(options=(None, True, 100, 30.0), dtype="float16", sinks=True, block_size=64, layout="HND"),
        dict(options=(None, False, None, None), layout="KV_NHD", layers=3, block_size=256),
        dict(options=(-0.5, True, None, None), layout="PACKED_NHD", block_size=8, tokens=80, max_blocks=8192),
    ],
)
def test_meanings(options, tmp_path):
    kernel = compile_prefill(**options)
    assert f"cp.async.bulk.tensor.{5 if 'layers' in options else 4}d" in kernel.asm["ptx"]
    assert spilled(kernel, tmp_path) <= 256


def test_gluon_is_there():
    assert has_gluon()
