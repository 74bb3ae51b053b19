"""What the compiler makes of the kernel that requantises, for GPUs that are not here: wide accesses, no spills."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from kvcore.arrays import ArraySpec
from kvcore.cache_spec import CacheSpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.relayout import check_relayout
from kvcore.plan.kernel import Target
from kvcore.plan.requantise import POINTERS, STATIC_SCALES, arguments, plan_requantise
from kvcore.run.compiler import compile_kernel
from tests.cases.hopper_ptx import ptxas, spilled
from tests.cases.widths import TARGETS, accesses

FORMATS = {
    "bfloat16": {},
    "float32": dict(dtype="float32"),
    "fp8": dict(kv_cache_dtype="fp8"),
    "int8": dict(kv_cache_dtype="int8"),
    "int4": dict(kv_cache_dtype="int4"),
    "nvfp4": dict(kv_cache_dtype="nvfp4"),
    "int8 of tokens": dict(kv_cache_dtype="int8", per_token_head=True),
}


def cache(
    block_size, num_layers, static, dtype="bfloat16", layout="NHD", kv_cache_dtype="auto", per_token_head=False,
    heads=8, head_size=128,
):  # fmt: skip
    """What the contract is told of a cache, and the dtypes of its arrays and of its static scales."""
    spec = CacheSpec.create(
        num_layers, 1, block_size, heads, head_size, None, dtype, layout, kv_cache_dtype, per_token_head
    )
    spec = replace(spec, num_blocks=65536 // block_size)
    scales = [ArraySpec(shape, "float32") for shape in spec.scale_shapes]
    has_static = static is not None and kv_cache_dtype != "auto" and not per_token_head
    given = scales or ([ArraySpec(static, "float32")] * 2 if has_static else [None, None])
    caches = [ArraySpec(shape, spec.dtype) for shape in spec.shapes]
    described = CacheArguments(caches, kv_cache_dtype, *given, spec.layout, scale_layout=spec.scale_layout)
    return described, [s.dtype for s in caches + scales], ["float32" if has_static else None] * 2


def compile_for(target: Target, source, destination, pairs=True, num_layers=None, static=(1,)):
    sides = cache(16, num_layers, static, **source), cache(32, num_layers, static, **destination)
    (old, old_memory, old_static), (new, new_memory, new_static) = sides
    call = check_relayout(
        old, new, ArraySpec((4096, 2), "int32") if pairs else None, source.get("head_size", 128), None, True
    )
    given = arguments(call, old_memory, new_memory, "int32" if pairs else None, old_static + new_static)
    pointees = dict(zip(POINTERS, given, strict=True))
    aligned = frozenset(name for name in pointees if pointees[name] and name not in STATIC_SCALES)
    return compile_kernel(plan_requantise(call, target).kernel, target, pointees, aligned)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("layouts", [("NHD", "NHD"), ("NHD", "HND"), ("HND", "PACKED_NHD")])
@pytest.mark.parametrize(
    "case", [("bfloat16", "fp8", 128, 64), ("fp8", "bfloat16", 64, 128), ("fp8", "int8", 128, 128)]
)
def test_a_thread_moves_16_bytes_of_the_wider_elements(case, layouts, pairs, target):
    old, new, load, store = case
    source, destination = (dict(layout=a) | FORMATS[f] for a, f in zip(layouts, (old, new), strict=True))
    loads, stores = accesses(compile_for(TARGETS[target], source, destination, pairs))
    assert load in loads
    assert loads - {64} <= {load}  # pairs may be loaded as one, or two
    assert stores == {store}


@pytest.mark.parametrize("static", [None, (1,), (8,)])
@pytest.mark.parametrize("case", [("bfloat16", "fp8"), ("fp8", "bfloat16"), ("fp8", "int8")])
def test_nothing_is_stored_before_all_is_loaded(case, static):
    old, new = case
    ptx = compile_for(TARGETS["sm_90"], FORMATS[old], FORMATS[new], static=static).asm["ptx"]
    order = "".join(re.findall(r"(ld|st)\.global", ptx))
    assert "stld" not in order
    assert "bar.sync" not in ptx  # no value goes from thread to thread


@pytest.mark.parametrize("old", FORMATS)
@pytest.mark.parametrize("new", FORMATS)
def test_it_fits(old, new, tmp_path):
    static, num_layers = ((32, 8), 32) if old == "int8" else ((1,), None)
    layouts = dict(layout="NHD"), dict(layout="PALLAS" if new != "nvfp4" else "HND")
    source, destination = (of | FORMATS[f] for of, f in zip(layouts, (old, new), strict=True))
    kernel = compile_for(TARGETS["sm_90"], source, destination, num_layers=num_layers, static=static)
    assert spilled(ptxas(kernel, tmp_path)) == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case", [("bfloat16", "fp8"), ("fp8", "int8 of tokens"), ("int8 of tokens", "nvfp4"), ("nvfp4", "float32")]
)
@pytest.mark.parametrize("sizes", [(3, 128), (40, 128), (5, 80), (1, 4096)])
def test_heads_and_sizes_that_are_no_power_of_two(sizes, case, target):
    """Whole tiles of heads, and parts; what a tile has beyond a head is masked."""
    heads, head_size = sizes
    source, destination = (FORMATS[name] | dict(heads=heads, head_size=head_size) for name in case)
    compile_for(TARGETS[target], source, destination, static=(heads,))
