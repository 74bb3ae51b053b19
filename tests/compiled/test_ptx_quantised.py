"""Kernels of quantised caches, compiled for GPUs that are not here: every format on every target, and they fit."""

import pytest

pytest.importorskip("triton")

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import AttentionOptions, check_attention, check_gather
from kvcore.contract.write import check_write
from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from kvcore.plan import attention, gather
from kvcore.plan.attention import plan_attention
from kvcore.plan.gather import plan_gather
from kvcore.plan.kernel import Target
from kvcore.plan.write import plan_write, pointers
from kvcore.run.compiler import compile_kernel

TARGETS = {
    "sm_80": (Target("cuda", 80), 163),
    "sm_89": (Target("cuda", 89), 99),
    "sm_90": (Target("cuda", 90), 227),
    "sm_100": (Target("cuda", 100), 227),
    "gfx942": (Target("hip", "gfx942", 64), 64),
}
FORMATS = [name for name in KV_CACHE_DTYPES if name not in ("auto", "fp8")]
FLOAT, BYTES = "bfloat16", "uint8"


def integers(*shape):
    return ArraySpec(shape, "int32")


def arrays(name):
    """Caches, heads, head sizes and layout."""
    if name == "fp8_ds_mla":
        return [ArraySpec((100, 16, 656), BYTES)], 1, 576, 512, CacheLayout.MLA
    size = stored_size(KV_CACHE_DTYPES[name], 128)
    return [ArraySpec((100, 16, 8, size), BYTES)] * 2, 8, 128, 128, CacheLayout.NHD


def scales(name, granularity):
    if granularity == "token_head":
        return ArraySpec((100, 16, 8), "float32")
    return None if name == "fp8_ds_mla" else ArraySpec((8,) if granularity == "head" else (), "float32")


def kinds(*granularities):
    for name in FORMATS:
        for granularity in granularities:
            if granularity == "tensor" or name not in ("nvfp4", "fp8_ds_mla"):
                yield name, granularity


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "granularity"), list(kinds("tensor", "token_head")))
def test_writes_compile(name, granularity, target):
    caches, heads, head_size, _, _ = arrays(name)
    key, value = ((1, 512), (1, 64)) if name == "fp8_ds_mla" else ((heads, head_size),) * 2
    scale = scales(name, granularity)
    own = granularity == "token_head"
    write = check_write(
        ArraySpec((9, *key), FLOAT), ArraySpec((9, *value), FLOAT), integers(9),
        CacheArguments(
            caches, name, None if own else scale, None if own else scale, scale_caches=[scale] * 2 if own else ()
        ),
    )  # fmt: skip
    names = pointers(write)
    pointees = dict.fromkeys(names) | {"key_ptr": FLOAT, "value_ptr": FLOAT, "slot_mapping_ptr": "int32"}
    pointees |= {"key_cache_ptr": BYTES, "value_cache_ptr": BYTES if len(caches) == 2 else None}
    if own:
        pointees |= {"k_scale_cache_ptr": "float32", "v_scale_cache_ptr": "float32"}
    elif scale is not None:
        pointees |= {"k_scale_ptr": "float32", "v_scale_ptr": "float32"}
    sixteen = frozenset(n for n, dtype in pointees.items() if dtype)
    kernel = compile_kernel(plan_write(write, TARGETS[target][0]).kernel, TARGETS[target][0], pointees, sixteen)
    if target == "sm_90":
        ptx = kernel.asm["ptx"]
        assert "ld.global.v4.b32" in ptx
        assert "div.full" not in ptx
        assert ("e4m3x2" in ptx) == (name in ("fp8_e4m3", "nvfp4", "fp8_ds_mla"))  # rows, or scales of blocks
    elif target in ("sm_80", "sm_89"):
        assert "cvt.rn.satfinite" not in kernel.asm["ptx"]  # rounds twice, or does not exist


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("name", "granularity"), [("int8", "head"), ("int4", "token_head"), ("nvfp4", "tensor"), ("fp8_ds_mla", "tensor")]
)
def test_attention_fits(name, granularity, target):
    caches, heads, head_size, head_size_v, layout = arrays(name)
    scale = scales(name, granularity)
    q_heads = 128 if heads == 1 else 32
    call = check_attention(
        ArraySpec((8, q_heads, head_size), FLOAT), integers(8, 64), integers(8), None, None,
        AttentionOptions(None, True, None, None), CacheArguments(caches, name, scale, scale, layout),
        head_size_v if heads == 1 else None,
    )  # fmt: skip
    plan = plan_attention(call, TARGETS[target][0])
    of_scale = None if scale is None else "float32"
    pointees = {
        "query_ptr": FLOAT, "key_cache_ptr": BYTES, "value_cache_ptr": BYTES, "block_tables_ptr": "int32",
        "seq_lens_ptr": "int32", "query_start_loc_ptr": None, "sinks_ptr": None, "k_scale_ptr": of_scale,
        "v_scale_ptr": of_scale, "layer": None, "out_ptr": "float32" if plan.splits > 1 else FLOAT,
        "lse_ptr": "float32",
    }  # fmt: skip
    sixteen = frozenset(n for n, dtype in pointees.items() if dtype)
    kernel = compile_kernel(plan.attend, TARGETS[target][0], pointees, sixteen)
    assert kernel.metadata.shared <= TARGETS[target][1] * 1024
    if target == "sm_90" and name in ("int8", "int4"):  # words go to the tensor cores and are converted in pairs
        assert "sub.f16x2" in kernel.asm["ptx"]
        assert kernel.asm["ptx"].count("ld.shared.b8") < 8


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("name", "granularity"), [("int8", "token_head"), ("int4", "head"), ("nvfp4", "tensor"), ("fp8_ds_mla", "tensor")]
)
def test_gather_compiles(name, granularity, target):
    caches, heads, head_size, head_size_v, layout = arrays(name)
    scale = scales(name, granularity)
    call = check_gather(
        integers(8, 64), integers(8), 100, FLOAT, CacheArguments(caches, name, scale, scale, layout), head_size,
        head_size_v if heads == 1 else None,
    )  # fmt: skip
    of_scale = None if scale is None else "float32"
    pointees = {
        "key_cache_ptr": BYTES, "value_cache_ptr": BYTES, "block_tables_ptr": "int32", "seq_lens_ptr": "int32",
        "k_scale_ptr": of_scale, "v_scale_ptr": of_scale, "layer": None, "key_ptr": FLOAT, "value_ptr": FLOAT,
    }  # fmt: skip
    sixteen = frozenset(n for n, dtype in pointees.items() if dtype)
    compile_kernel(plan_gather(call, TARGETS[target][0]).kernel, TARGETS[target][0], pointees, sixteen)


OF_LAYERS = [("fp8_e4m3", 1), ("int4", 8), ("nvfp4", 8)]
"""Formats, and how many scales a layer has."""


@pytest.mark.parametrize("op", ["write", "attention", "gather"])
@pytest.mark.parametrize("layer", ["int32", "scalar"])
@pytest.mark.parametrize(("name", "of_a_layer"), OF_LAYERS)
def test_scales_of_layers_compile(name, of_a_layer, layer, op):
    target, scale = TARGETS["sm_90"][0], ArraySpec((3, of_a_layer), "float32")
    caches = [ArraySpec((3, *cache.shape), BYTES) for cache in arrays(name)[0]]
    index = 1 if layer == "scalar" else ArraySpec((1,), layer)
    arguments = CacheArguments(caches, name, scale, scale, CacheLayout.NHD.with_layer(), index)
    in_memory, row = layer != "scalar", ArraySpec((8, 8, 128), FLOAT)
    pointees = dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "float32") | {"layer": layer}
    pointees |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), BYTES)
    if op == "write":
        write = check_write(row, row, integers(8), arguments)
        kernel, names = plan_write(write, target, in_memory).kernel, pointers(write)
        pointees |= {"key_ptr": FLOAT, "value_ptr": FLOAT, "slot_mapping_ptr": "int32"}
    else:
        pointees |= {"block_tables_ptr": "int32", "seq_lens_ptr": "int32"}
    if op == "attention":
        query, options = ArraySpec((8, 32, 128), FLOAT), AttentionOptions(None, True, None, None)
        call = check_attention(query, integers(8, 64), integers(8), None, None, options, arguments, None)
        plan = plan_attention(call, target, in_memory)
        kernel, names = plan.attend, (*attention.POINTERS, "out_ptr", "lse_ptr")
        pointees |= {"query_ptr": FLOAT, "out_ptr": "float32" if plan.splits > 1 else FLOAT, "lse_ptr": "float32"}
    if op == "gather":
        call = check_gather(integers(8, 64), integers(8), 100, FLOAT, arguments, 128, None)
        kernel, names = plan_gather(call, target, in_memory).kernel, (*gather.POINTERS, "key_ptr", "value_ptr")
        pointees |= {"key_ptr": FLOAT, "value_ptr": FLOAT}
    pointees = {each: pointees.get(each) for each in names}
    sixteen = frozenset(n for n, dtype in pointees.items() if dtype and n != "layer")
    compile_kernel(kernel, target, pointees, sixteen)
