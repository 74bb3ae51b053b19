"""The MLA kernel for Hopper, compiled without a GPU: wgmma, TMA, shared memory, registers."""

import re

import pytest

pytest.importorskip("triton", minversion="3.8")

from tests.cases.hopper import latent
from tests.cases.hopper_ptx import compile_for_hopper, count_in_loops, ptxas, spilled

CALLS = {  # and bytes that a thread may spill: many only where rows of a program see different positions
    "pages of 16": (dict(block_size=16), 64),
    "pages of 64": (dict(), 0),
    "pages of 256, layers": (dict(block_size=256, layers=3), 0),
    "splits": (dict(heads=16, sequences=1, context=131072), 64),
    "window, cap, sinks": (dict(dtype="float16", sinks=True, options=(None, True, 100, 30.0)), 64),
    "ragged, not causal": (dict(tokens=256, options=(-0.5, False, None, None)), 64),
    "ragged, all": (dict(tokens=256, dtype="float16", sinks=True, options=(None, True, 100, 30.0)), 1536),
    "ragged, splits": (dict(heads=16, tokens=4, sequences=1, context=131072, block_size=16), 1536),
}

PRODUCTS = 9 * 4 + 2 * 4
"""Of a pair of blocks, in each warpgroup's loop: nine chunks of 64 columns of K, two blocks of V; 16 deep."""


@pytest.mark.parametrize("name", CALLS)
def test_kernel(name, tmp_path):
    options, most = CALLS[name]
    kernel = compile_for_hopper(latent(**options))
    assert kernel.metadata.name == "hopper_mla_kernel"
    assert kernel.metadata.num_warps == 12  # two warpgroups, two producers of 1, and what fills their group
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.global_scratch_size == 0  # descriptors come from the host

    ptx, element = kernel.asm["ptx"], "f16" if "dtype" in options else "bf16"
    for columns in (64, 256):  # scores, and a half of V
        assert f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{element}.{element}" in ptx
    assert f"cp.async.bulk.tensor.{5 if 'layers' in options else 4}d.shared::cta.global" in ptx
    assert "ld.global.v4.b32" in ptx  # query, 16 bytes at a time

    report = ptxas(kernel, tmp_path)
    assert spilled(report) <= most
    assert "wgmma" not in report  # it would say that it waits for products, or makes them one by one
    # Whatever is spilled, the two loops go nearly without.
    loops = count_in_loops(kernel.asm["sass"], r"\b(STL|LDL)\b", PRODUCTS)
    assert len(loops) == 2
    assert max(loops) <= (2 if most <= 64 else 16)


@pytest.mark.parametrize("name", ["pages of 64", "ragged, all"])
def test_all_threads_have_done_what_one_announces(name):
    """One thread arrives at a barrier in shared memory: for all, which must have met since they read or wrote."""
    ptx = compile_for_hopper(latent(**CALLS[name][0])).asm["ptx"]
    memory = r"stmatrix|(?:st|ld)\.shared|wgmma\.(?:mma_async|wait_group)|fence\.proxy\.async"
    events = re.findall(rf"\b(?:{memory}|mbarrier\.arrive|bar(?:\.warp)?\.sync)\b", ptx)
    arrivals = [i for i, event in enumerate(events) if event == "mbarrier.arrive"]
    assert len(arrivals) > 20
    assert {events[i - 1] for i in arrivals} == {"bar.sync", "bar.warp.sync"}

    # Weights lie where K did: all warps of the group have multiplied it before one of them stores.
    first, last = r"bar\.sync (?:stmatrix )+", r"fence\.proxy\.async bar\.sync mbarrier\.arrive"
    assert len(re.findall(first + last, " ".join(events))) == 2
    assert " ".join(events).count(" bar.sync stmatrix") == 2
