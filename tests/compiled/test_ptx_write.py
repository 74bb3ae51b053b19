"""What the compiler makes of the kernels, for GPUs that are not here: wide accesses, and code for every target."""

import re
from collections import Counter

import pytest

pytest.importorskip("triton")

from kvcore.plan.kernel import Target
from kvcore.plan.write import plan_write, pointers
from kvcore.run.compiler import compile_kernel
from tests.cases.writes import describe

TARGETS = {
    "sm_80": Target("cuda", 80),
    "sm_90": Target("cuda", 90),
    "sm_100": Target("cuda", 100),
    "gfx942": Target("hip", "gfx942", 64),
}
ROW_LAYOUTS = (
    "NHD",
    "HND",
    "PALLAS",
    "KV_NHD",
    "BLOCK_KV_NHD",
    "BLOCK_KV_HND",
    "PACKED_NHD",
    "PACKED_HND",
    "INTERLEAVED",
)


def compile_for(target, layout, *, aligned=True, **options):
    write = describe(layout, **options)
    names = pointers(write)
    pointees = dict.fromkeys(names)
    for name in names[:-4]:
        pointees[name] = write.cache.dtype if "cache" in name else write.key.dtype
    pointees |= {"slot_mapping_ptr": "int32", "layer": "scalar" if write.cache.layout.has_layer else None}
    if write.scaled:
        pointees |= {"k_scale_ptr": "float32", "v_scale_ptr": "float32"}
    sixteen = (
        frozenset(n for n in names if n not in ("layer", "k_scale_ptr", "v_scale_ptr")) if aligned else frozenset()
    )
    return compile_kernel(plan_write(write, target).kernel, target, pointees, sixteen)


def accesses(kernel):
    """Vector widths, in bits, of (loads, stores) of rows; the 32-bit loads of slots and scales are left out."""
    if "ptx" in kernel.asm:
        found = re.findall(r"(ld|st)\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
        widths = Counter((op, int(vector or 1) * int(bits)) for op, vector, bits in found)
    else:
        found = re.findall(
            r"(?:global|buffer)_(load|store)_(dwordx4|dwordx2|dword|ushort|short|ubyte|byte)",
            kernel.asm["amdgcn"],
        )
        size = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}
        widths = Counter((op[:2].replace("lo", "ld"), size[width]) for op, width in found)
    loads = {width for op, width in widths if op == "ld" and width > 32}
    stores = {width for op, width in widths if op == "st"}
    return loads, stores


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_move_128_bits_at_a_time(target, layout):
    loads, stores = accesses(compile_for(TARGETS[target], layout))
    assert (loads, stores) == ({128}, {128})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "NHD", "num_layers": 4, "layer": 1},
        {"layout": "HND", "head_size": 120},
        {"layout": "NHD", "head_size": 80},
        {"layout": "NHD", "num_heads": 1, "head_size": 64},
        {"layout": "NHD", "num_heads": 32},
        {"layout": "NHD", "dtype": "float32"},
        {"layout": "PACKED_NHD", "head_size": 192, "head_size_v": 128},
        {"layout": "PALLAS", "num_blocks": 2**20},
    ],
    ids=str,
)
def test_so_they_do_for_other_shapes(target, options):
    loads, stores = accesses(compile_for(TARGETS[target], **options))
    assert (loads, stores) == ({128}, {128})


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("target", TARGETS)
def test_fp8_halves_the_stores_and_compiles_everywhere(target, kv_cache_dtype):
    """sm_80 has no e4m3: there, and for CDNA, the kernel encodes with integers."""
    kernel = compile_for(TARGETS[target], "NHD", kv_cache_dtype=kv_cache_dtype, cache_dtype="uint8")
    assert accesses(kernel) == ({128}, {64})
    if "ptx" in kernel.asm:
        assert ("cvt.rn.satfinite" in kernel.asm["ptx"]) == (TARGETS[target].arch >= 90)
        assert "div.rn.f32" in kernel.asm["ptx"]
        assert "div.full" not in kernel.asm["ptx"]


def test_head_major_keys_move_16_bytes():
    loads, stores = accesses(compile_for(TARGETS["sm_90"], "HEAD_MAJOR"))
    assert loads == {128}
    assert stores == {128, 16}  # V's elements lie block_size apart


def test_unaligned_pointers_are_not_taken_for_aligned():
    loads, stores = accesses(compile_for(TARGETS["sm_90"], "NHD", aligned=False))
    assert not loads
    assert stores == {16}
