"""The attention kernel for Hopper, compiled without a GPU: wgmma, TMA, shared memory, registers."""

import pytest

pytest.importorskip("triton", minversion="3.8")

from kvcore.run.compiler import has_gluon
from tests.cases.hopper import HEADS, prefill
from tests.cases.hopper_ptx import compile_for_hopper, ptxas, spilled

SPILLED = {(192, 128): 512, (256, 256): 2048}
"""Bytes of registers that a thread may spill, by head sizes: most of them in the way that is taken once infinite or NaN
values were met. Others: 256."""


@pytest.mark.parametrize("head_sizes", HEADS)
def test_heads(head_sizes, tmp_path):
    kernel = compile_for_hopper(prefill(*head_sizes))
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64" in ptx
    assert "cp.async.bulk.tensor.4d" in ptx
    assert kernel.metadata.num_warps == 4 * 2 + 4  # two consumers, a producer of 1, and what fills its group
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.global_scratch_size == 0  # descriptors come from the host
    assert spilled(ptxas(kernel, tmp_path)) <= SPILLED.get(head_sizes, 256)


@pytest.mark.parametrize(
    "options",
    [
        dict(options=(None, True, 100, 30.0), dtype="float16", sinks=True, block_size=64, layout="HND"),
        dict(options=(None, False, None, None), layout="KV_NHD", layers=3, block_size=256),
        dict(options=(-0.5, True, None, None), layout="PACKED_NHD", block_size=8, tokens=80, max_blocks=8192),
    ],
)
def test_meanings(options, tmp_path):
    kernel = compile_for_hopper(prefill(**options))
    assert f"cp.async.bulk.tensor.{5 if 'layers' in options else 4}d" in kernel.asm["ptx"]
    assert spilled(ptxas(kernel, tmp_path)) <= 256


def test_gluon_is_there():
    assert has_gluon()
