"""The kernels that read a cache, compiled for GPUs that are not there: they fit, and they load 16 bytes at a time."""

import re

import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import AttentionOptions, check_attention, check_gather
from kvcore.layout import CacheLayout
from kvcore.plan.attention import plan_attention
from kvcore.plan.gather import plan_gather
from kvcore.plan.kernel import Target
from kvcore.run.compiler import compile_kernel

TARGETS = {
    "sm_80": (Target("cuda", 80), 163),
    "sm_86": (Target("cuda", 86), 99),
    "sm_90": (Target("cuda", 90), 227),
    "sm_100": (Target("cuda", 100), 227),
    "gfx942": (Target("hip", "gfx942", 64), 64),
}
HEADS = {"128": (128, 128, 8, 32, "NHD"), "256": (256, 256, 4, 16, "HND"), "MLA": (576, 512, 1, 128, "MLA")}


def integers(*shape, dtype="int32"):
    return ArraySpec(shape, dtype)


def caches(layout, head_size, head_size_v, heads, dtype):
    shapes = CacheLayout.of(layout).shapes(
        num_blocks=1000, block_size=16, num_heads=heads, head_size=head_size, head_size_v=head_size_v
    )
    return [ArraySpec(shape, dtype) for shape in shapes]


def compile_attention(target, head, kv_cache_dtype="auto", ragged=False, index="int32"):
    head_size, head_size_v, heads, q_heads, layout = HEADS[head]
    dtype = "bfloat16" if kv_cache_dtype == "auto" else "uint8"
    call = check_attention(
        ArraySpec((512 if ragged else 8, q_heads, head_size), "bfloat16"),
        integers(8, 64, dtype=index), integers(8, dtype=index), integers(9, dtype=index) if ragged else None, None,
        AttentionOptions(None, True, None, None),
        CacheArguments(caches(layout, head_size, head_size_v, heads, dtype), kv_cache_dtype, layout=layout),
        head_size_v,
    )  # fmt: skip
    plan = plan_attention(call, target)
    pointers = {
        "query_ptr": "bfloat16", "key_cache_ptr": dtype, "value_cache_ptr": dtype, "block_tables_ptr": index,
        "seq_lens_ptr": index, "query_start_loc_ptr": index if ragged else None, "sinks_ptr": None,
        "k_scale_ptr": None, "v_scale_ptr": None, "layer": None,
        "out_ptr": "float32" if plan.splits > 1 else "bfloat16", "lse_ptr": "float32",
    }  # fmt: skip
    sixteen = frozenset(name for name, dtype in pointers.items() if dtype)
    return compile_kernel(plan.attend, target, pointers, sixteen)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TARGETS)
def test_attention_fits(name, head, ragged):
    target, kib = TARGETS[name]
    assert compile_attention(target, head, ragged=ragged).metadata.shared <= kib * 1024


@pytest.mark.parametrize("ragged", [False, True])
def test_integers_of_64_bits_compile(ragged):
    compile_attention(Target("cuda", 90), "128", ragged=ragged, index="int64")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e5m2"])
def test_attention_copies_16_bytes_at_a_time(kv_cache_dtype):
    ptx = compile_attention(Target("cuda", 90), "128", kv_cache_dtype).asm["ptx"]
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^,]*, \[[^,]*, (0x)?(\w+)", ptx)
    # Entries of the block table are 4 bytes; all else has 16.
    assert {int(size, 16) for _, size in sizes} <= {4, 16}
    assert sum(int(size, 16) == 16 for _, size in sizes) >= 16
    if kv_cache_dtype != "auto":  # elements are bytes, and go to the tensor cores as words
        assert ptx.count("ldmatrix") >= 16
        assert ptx.count("ld.shared.b8") < 8


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_gather_compiles(name, kv_cache_dtype):
    target, _ = TARGETS[name]
    dtype = "bfloat16" if kv_cache_dtype == "auto" else "uint8"
    call = check_gather(
        integers(8, 64), integers(8), 100, "bfloat16",
        CacheArguments(caches("NHD", 128, 128, 8, dtype), kv_cache_dtype), None, None,
    )  # fmt: skip
    plan = plan_gather(call, target)
    pointers = {
        "key_cache_ptr": dtype, "value_cache_ptr": dtype, "block_tables_ptr": "int32", "seq_lens_ptr": "int32",
        "k_scale_ptr": None, "v_scale_ptr": None, "layer": None, "key_ptr": "bfloat16", "value_ptr": "bfloat16",
    }  # fmt: skip
    sixteen = frozenset(name for name, dtype in pointers.items() if dtype)
    kernel = compile_kernel(plan.kernel, target, pointers, sixteen)
    if target.backend == "cuda":
        assert "st.global.v4" in kernel.asm["ptx"]
