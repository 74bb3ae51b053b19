"""What the compiler makes of the kernels that move blocks, for GPUs that are not here: wide accesses, no spills."""

import re

import pytest

pytest.importorskip("triton")

from kvcore.arrays import ArraySpec
from kvcore.contract.blocks import check_blocks
from kvcore.layout import CacheLayout
from kvcore.plan.blocks import index_name, plan_blocks, pointers
from kvcore.run.compiler import compile_kernel
from tests.cases.arrays import LAYOUTS
from tests.cases.hopper_ptx import ptxas, spilled
from tests.cases.widths import TARGETS, accesses

H100 = TARGETS["sm_90"]


def describe(layout="NHD", n=40, dtype="bfloat16", num_layers=None, name="pairs", scales=False, **sizes):
    layout = CacheLayout.of(layout)
    layout = layout.with_layer() if num_layers else layout
    given = {"num_blocks": 4096, "block_size": 16, "num_heads": 8, "head_size": 128} | sizes
    x = 8 if "dim/x" in layout.pattern else None
    caches = [ArraySpec(shape, dtype) for shape in layout.shapes(**given, num_layers=num_layers, x=x)]
    scale = ArraySpec((4096, 16, 8), "float32")
    return check_blocks(
        name, ArraySpec((n, 2) if name == "pairs" else (n,), "int32"), caches, [scale] * 2 * scales, layout, None
    )


def compile_for(target, call, aligned=True):
    """The kernels of a call: the one that finds nodes, or None, and the one that moves."""
    plan = plan_blocks(call, target, (aligned,) * len(call.arrays))
    pointees = dict.fromkeys(pointers(call))
    pointees |= zip(pointees, (array.dtype for array in call.arrays), strict=False)
    pointees |= {index_name(call): "int32"} | ({"nodes_ptr": "int32"} if plan.nodes else {})
    sixteen = frozenset(name for name in pointees if pointees[name] and (aligned or "ptr" not in name))
    nodes = None
    if plan.nodes:
        of_nodes = {"pairs_ptr": "int32", "nodes_ptr": "int32"}
        nodes = compile_kernel(plan.nodes, target, of_nodes, frozenset(of_nodes))
    return nodes, compile_kernel(plan.kernel, target, pointees, sixteen)


def test_no_pairs():
    """NumPy and torch give an empty array steps of 0, and kernels are compiled for it all the same."""
    call = describe(n=0)
    compile_for(H100, call._replace(indices=call.indices._replace(strides=(0, 0))))


@pytest.mark.parametrize("name", ["pairs", "blocks"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "KV_NHD"])
def test_blocks_move_128_bits_at_a_time(layout, target, name):
    """HEAD_MAJOR, too, whose V a writer stores by single elements."""
    _, kernel = compile_for(TARGETS[target], describe(layout, name=name))
    loads, stores = accesses(kernel)
    if target == "gfx942":  # pairs are loaded together
        loads -= {64, 96}
    assert (loads, stores) == ({128} if name == "pairs" else set(), {128})


@pytest.mark.parametrize("options", [
    *({"layout": layout, "num_layers": 4} for layout in LAYOUTS), {"dtype": "uint8"}, {"dtype": "float8_e4m3fn"},
    {"dtype": "float32"}, {"head_size": 72}, {"layout": "PALLAS", "num_blocks": 2**20},
    {"layout": "MLA", "num_heads": 1, "head_size": 576}, {"num_layers": 80, "num_blocks": 2**19}, {"n": 1000},
], ids=str)  # fmt: skip
def test_so_they_do_in_other_shapes(options):
    _, kernel = compile_for(H100, describe(**options))
    assert accesses(kernel) == ({128}, {128})


def test_scales_move_128_bits_at_a_time():
    _, kernel = compile_for(H100, describe(scales=True, dtype="uint8"))
    assert accesses(kernel) == ({128}, {128})


def test_what_shapes_do_not_allow_is_narrow():
    _, kernel = compile_for(H100, describe(dtype="uint8", head_size=12, num_heads=1, block_size=1, name="blocks"))
    assert accesses(kernel)[1] == {32}
    _, kernel = compile_for(H100, describe(name="blocks"), aligned=False)
    assert accesses(kernel)[1] == {16}


@pytest.mark.parametrize("n", [40, 1000, 2000])
def test_as_many_programs_fit_as_copies_need(n, tmp_path):
    """64 registers: eight programs of four warps on a multiprocessor have 64 KiB under way."""
    for call in (describe(n=n), describe(n=n, num_layers=32), describe(n=n, layout="PALLAS", dtype="uint8")):
        nodes, kernel = compile_for(H100, call)
        report = ptxas(kernel, tmp_path)
        assert int(re.findall(r"Used (\d+) registers", report)[0]) <= 64
        assert spilled(report) <= 64  # of what walks from pair to pair
        if nodes is not None:
            assert spilled(ptxas(nodes, tmp_path)) == 0
        assert (nodes is not None) == (n > 1024)


def test_nothing_is_shared_but_in_reductions():
    """Blocks go from memory to registers, and back."""
    _, kernel = compile_for(H100, describe(n=2000))
    assert kernel.metadata.shared == 0
    _, kernel = compile_for(H100, describe(name="blocks"))
    assert kernel.metadata.shared == 0
