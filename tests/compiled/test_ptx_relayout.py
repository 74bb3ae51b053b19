"""What the compiler makes of the kernel of `relayout`, for GPUs that are not here: wide accesses, no spills."""

import re

import pytest

pytest.importorskip("triton")

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.relayout import check_relayout
from kvcore.layout import CacheLayout
from kvcore.plan.kernel import Target
from kvcore.plan.relayout import POINTERS, arguments, plan_relayout
from kvcore.run.compiler import compile_kernel
from tests.cases.hopper_ptx import ptxas, spilled
from tests.cases.widths import TARGETS, accesses


def describe(source="NHD", destination="HND", n=4096, num_layers=None, pairs=True, dtype="bfloat16", target_size=32):
    caches = []
    for layout, block_size in ((source, 16), (destination, target_size)):
        layout = CacheLayout.of(layout)
        layout = layout.with_layer() if num_layers else layout
        shapes = layout.shapes(
            num_blocks=65536 // block_size, block_size=block_size, num_heads=8, head_size=128, num_layers=num_layers,
            x=8 if "dim/x" in layout.pattern else None,
        )  # fmt: skip
        caches.append(CacheArguments([ArraySpec(shape, dtype) for shape in shapes], layout=layout))
    return check_relayout(*caches, ArraySpec((n, 2), "int32") if pairs else None, 128, None)


def compile_for(target: Target, call):
    given = arguments(call, ["bfloat16"] * 2, ["bfloat16"] * 2, None if call.pairs is None else "int32")
    pointees = dict(zip(POINTERS, given, strict=False))
    return compile_kernel(
        plan_relayout(call, target).kernel, target, pointees, frozenset(name for name in pointees if pointees[name])
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("source", "destination"), [("NHD", "HND"), ("HND", "KV_NHD"), ("NHD", "NHD")])
def test_slots_move_128_bits_at_a_time(source, destination, pairs, target):
    kernel = compile_for(TARGETS[target], describe(source, destination, pairs=pairs))
    loads, stores = accesses(kernel)
    assert loads - {64} == {128}  # pairs may be loaded as one, or two
    assert stores == {128}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("source", "destination"), [("NHD", "HEAD_MAJOR"), ("HEAD_MAJOR", "NHD")])
def test_eight_slots_move_at_a_time_where_slots_are_innermost(source, destination, target):
    kernel = compile_for(TARGETS[target], describe(source, destination, pairs=False, target_size=16))
    assert accesses(kernel) == ({128}, {128})


@pytest.mark.parametrize("pairs", [True, False])
def test_nothing_is_stored_before_all_is_loaded(pairs):
    """A thread that waits for K before it asks for V has half as many bytes under way."""
    ptx = compile_for(TARGETS["sm_90"], describe(pairs=pairs)).asm["ptx"]
    order = re.findall(r"(ld|st)\.global\.v4", ptx)
    assert order == ["ld", "ld", "st", "st"]


def test_no_pairs():
    """NumPy and torch give an empty array steps of 0, and kernels are compiled for it all the same."""
    call = describe(n=0)
    assert call.pairs is not None
    compile_for(TARGETS["sm_90"], call._replace(pairs=call.pairs._replace(strides=(0, 0))))


@pytest.mark.parametrize("destination", ["HEAD_MAJOR", "PALLAS", "PACKED_NHD"])
@pytest.mark.parametrize("num_layers", [None, 32])
def test_it_fits(destination, num_layers, tmp_path):
    kernel = compile_for(TARGETS["sm_90"], describe(destination=destination, num_layers=num_layers))
    assert spilled(ptxas(kernel, tmp_path)) == 0
