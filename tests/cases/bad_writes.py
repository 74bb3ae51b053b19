"""Bad calls of the writers, and the ways to make them."""

import numpy as np

from kvcore.layout import CacheLayout
from tests.cases.arrays import DTYPES, random_bits

FORMATS = (
    "'auto', 'fp8', 'fp8_e4m3', 'fp8_e5m2', 'fp8_e4m3fnuz', 'fp8_e5m2fnuz', 'int8', 'int4', 'nvfp4' or 'fp8_ds_mla'"
)


def array(shape, dtype="bfloat16"):
    """Any bits: contents never matter to the contract, and poisoned caches show what is written."""
    if dtype in DTYPES:
        return random_bits(np.random.default_rng(0), shape, dtype)
    return np.ones(shape, dtype)


def valid(op, dtype="bfloat16"):
    """Arguments that fulfil the contract: 5 tokens, 3 heads of 16 (V of diffkv: 24), 6 blocks of 4 slots."""
    common = {"key": array((5, 3, 16), dtype), "slot_mapping": np.array([3, 23, -1, 0, 9])}
    if op == "flash":
        caches = {"key_cache": array((6, 4, 3, 16), dtype), "value_cache": array((6, 4, 3, 16), dtype)}
        return common | {"value": array((5, 3, 16), dtype)} | caches
    return common | {"value": array((5, 3, 24), dtype), "kv_cache": array((6, 4, 3, 40), dtype)}


def both(dtype):
    return {"key": array((5, 3, 16), dtype), "value": array((5, 3, 16), dtype)}


def caches(shape=(6, 4, 3, 16), dtype="bfloat16"):
    return {"key_cache": array(shape, dtype), "value_cache": array(shape, dtype)}


STACKED = "layer block slot head dim"


FLOATS = "float32, bfloat16 or float16"


fp8 = {"kv_cache_dtype": "fp8"} | caches(dtype="uint8")


stacked = {"layout": STACKED} | caches((2, 6, 4, 3, 16))


# name: op, what differs from a valid call, type, message
BAD = {
    # shapes of inputs
    "key of rank 2": (
        "flash", {"key": array((5, 48))}, ValueError,
        "key must have shape (num_tokens, num_heads, head_size), got (5, 48)",
    ),
    "key of rank 4": (
        "diffkv", {"key": array((1, 5, 3, 16))}, ValueError,
        "key must have shape (num_tokens, num_heads, head_size), got (1, 5, 3, 16)",
    ),
    "value of rank 2": (
        "flash", {"value": array((5, 48))}, ValueError,
        "value must have shape (num_tokens, num_heads, head_size_v), got (5, 48)",
    ),
    "heads of key": (
        "flash", {"key": array((5, 2, 16))}, ValueError,
        "key must have shape (num_tokens, 3, 16), got (5, 2, 16)",
    ),
    "heads of key, one array": (
        "diffkv", {"key": array((5, 1, 16))}, ValueError,
        "key must have shape (num_tokens, 3, 16), got (5, 1, 16)",
    ),
    "head size of key": (
        "flash", {"key": array((5, 3, 17))}, ValueError,
        "key must have shape (num_tokens, 3, 16), got (5, 3, 17)",
    ),
    "heads of value": (
        "flash", {"value": array((5, 4, 16))}, ValueError, "value must have shape (5, 3, 16), got (5, 4, 16)",
    ),
    "head size of value": (
        "flash", {"value": array((5, 3, 8))}, ValueError, "value must have shape (5, 3, 16), got (5, 3, 8)",
    ),
    "tokens of value": (
        "flash", {"value": array((6, 3, 16))}, ValueError, "value must have shape (5, 3, 16), got (6, 3, 16)",
    ),
    "head size of value, one array": (
        "diffkv", {"value": array((5, 3, 23))}, ValueError,
        "value must have shape (5, 3, 24), got (5, 3, 23)",
    ),
    "key takes all of k+v": (
        "diffkv", {"key": array((5, 3, 40))}, ValueError,
        "kv_cache axis k+v must have a size above head_size = 40, got 40",
    ),
    "scalar slots": (
        "flash", {"slot_mapping": np.array(3)}, ValueError, "slot_mapping must have shape (n,), got ()",
    ),
    "slots of rank 2": (
        "diffkv", {"slot_mapping": np.zeros((5, 1), np.int64)}, ValueError,
        "slot_mapping must have shape (n,), got (5, 1)",
    ),
    "more slots than tokens": (
        "flash", {"slot_mapping": np.arange(6)}, ValueError,
        "slot_mapping must have at most num_tokens = 5 entries, got 6",
    ),
    "slots without tokens": (
        "flash", {"key": array((0, 3, 16)), "value": array((0, 3, 16)), "slot_mapping": np.arange(1)},
        ValueError,
        "slot_mapping must have at most num_tokens = 0 entries, got 1",
    ),
    # dtypes of inputs and caches
    "float slots": (
        "flash", {"slot_mapping": np.arange(5, dtype=np.float32)}, TypeError,
        "slot_mapping must have dtype int32 or int64, got float32",
    ),
    "int16 slots": (
        "diffkv", {"slot_mapping": np.arange(5, dtype=np.int16)}, TypeError,
        "slot_mapping must have dtype int32 or int64, got int16",
    ),
    "uint32 slots": (
        "flash", {"slot_mapping": np.arange(5, dtype=np.uint32)}, TypeError,
        "slot_mapping must have dtype int32 or int64, got uint32",
    ),
    "bool slots": (
        "flash", {"slot_mapping": np.ones(5, bool)}, TypeError,
        "slot_mapping must have dtype int32 or int64, got bool",
    ),
    "dtype of value": (
        "flash", {"value": array((5, 3, 16), "float16")}, TypeError,
        "value must have dtype bfloat16, as key, got float16",
    ),
    "dtype of the value cache": (
        "flash", {"value_cache": array((6, 4, 3, 16), "float32")}, TypeError,
        "value_cache must have dtype bfloat16, as key_cache, got float32",
    ),
    "float64": (
        "flash", both("float64"), TypeError,
        "key must have dtype float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz or "
        "float8_e5m2fnuz, got float64",
    ),
    "integers": (
        "flash", both("int32"), TypeError,
        "key must have dtype float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz or "
        "float8_e5m2fnuz, got int32",
    ),
    "bytes": (
        "flash", both("uint8"), TypeError,
        "key must have dtype float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz or "
        "float8_e5m2fnuz, got uint8",
    ),
    # kv_cache_dtype
    "kv_cache_dtype": (
        "flash", {"kv_cache_dtype": "int3"}, ValueError, f"kv_cache_dtype must be {FORMATS}, got 'int3'",
    ),
    "empty kv_cache_dtype": (
        "diffkv", {"kv_cache_dtype": ""}, ValueError,
        f"kv_cache_dtype must be {FORMATS}, got ''",
    ),
    "fp8 in a cache of bfloat16": (
        "flash", {"kv_cache_dtype": "fp8"}, TypeError,
        "key_cache must have dtype float8_e4m3fn or uint8 for kv_cache_dtype 'fp8', got bfloat16",
    ),
    "fp8 in one array of bfloat16": (
        "diffkv", {"kv_cache_dtype": "fp8_e5m2"}, TypeError,
        "kv_cache must have dtype float8_e5m2 or uint8 for kv_cache_dtype 'fp8_e5m2', got bfloat16",
    ),
    "e4m3 in a cache of e5m2": (
        "flash", {"kv_cache_dtype": "fp8_e4m3"} | caches(dtype="float8_e5m2"), TypeError,
        "key_cache must have dtype float8_e4m3fn or uint8 for kv_cache_dtype 'fp8_e4m3', got float8_e5m2",
    ),
    "key in another fp8": (
        "flash", {"kv_cache_dtype": "fp8_e4m3"} | both("float8_e5m2") | caches(dtype="uint8"), TypeError,
        "key must have dtype float32, bfloat16, float16 or float8_e4m3fn for kv_cache_dtype 'fp8_e4m3', "
        "got float8_e5m2",
    ),
    "auto in a cache of bytes": (
        "flash", caches(dtype="uint8"), TypeError,
        f"key_cache must have dtype {FLOATS} for kv_cache_dtype 'auto' and key of dtype bfloat16, got uint8",
    ),
    "auto in a cache of fp8": (
        "diffkv", {"kv_cache": array((6, 4, 3, 40), "float8_e4m3fn")}, TypeError,
        f"kv_cache must have dtype {FLOATS} for kv_cache_dtype 'auto' and key of dtype bfloat16, "
        "got float8_e4m3fn",
    ),
    "auto in a cache of integers": (
        "flash", caches(dtype="int32"), TypeError,
        f"key_cache must have dtype {FLOATS} for kv_cache_dtype 'auto' and key of dtype bfloat16, got int32",
    ),
    "fp8 key in a cache of bfloat16": (
        "flash", both("float8_e4m3fn"), TypeError,
        "key_cache must have dtype float8_e4m3fn for kv_cache_dtype 'auto' and key of dtype float8_e4m3fn, "
        "got bfloat16",
    ),
    # scales
    "a scale for another number of heads": (
        "flash", fp8 | {"k_scale": array((4,), "float32")}, ValueError,
        "k_scale must have shape (), (1,) or (3,), got (4,)",
    ),
    "v_scale of rank 2": (
        "flash", fp8 | {"v_scale": array((1, 1), "float32")}, ValueError,
        "v_scale must have shape (), (1,) or (3,), got (1, 1)",
    ),
    "empty scale": (
        "diffkv", {"k_scale": array((0,), "float32")}, ValueError,
        "k_scale must have shape (), (1,) or (3,), got (0,)",
    ),
    "k_scale of float64": (
        "flash", fp8 | {"k_scale": array((), "float64")}, TypeError,
        "k_scale must have dtype float32, got float64",
    ),
    "v_scale of bfloat16": (
        "flash", fp8 | {"v_scale": array((1,))}, TypeError,
        "v_scale must have dtype float32, got bfloat16",
    ),
    "integer scale without effect": (
        "diffkv", {"v_scale": array((1,), "int32")}, TypeError, "v_scale must have dtype float32, got int32",
    ),
    # layouts
    "layout of another type": (
        "flash", {"layout": 3}, TypeError, "layout must be a pattern string or a CacheLayout, got 3",
    ),
    "layout as a list": (
        "diffkv", {"layout": ["block", "slot"]}, TypeError,
        "layout must be a pattern string or a CacheLayout, got ['block', 'slot']",
    ),
    "unknown axis": (
        "flash", {"layout": "block slot heads dim"}, ValueError,
        "layout 'block slot heads dim' has an unknown axis 'heads'; "
        "known are layer, block, slot, head, kv, dim, dim/x, x, k+v, latent",
    ),
    "missing axis": (
        "flash", {"layout": "block head dim"}, ValueError, "layout 'block head dim' must name axis slot",
    ),
    "layout of one array for two": (
        "flash", {"layout": "KV_NHD"}, ValueError,
        "layout must describe two arrays, a key and a value cache, "
        "got 'kv block slot head dim', which is for reshape_and_cache_flash_diffkv",
    ),
    "layout of two arrays for one": (
        "diffkv", {"layout": CacheLayout.HND}, ValueError,
        "layout must describe one array for K and V, "
        "got 'block head slot dim', which is for reshape_and_cache_flash",
    ),
    "rank of the caches": (
        "flash", caches((24, 3, 16)), ValueError,
        "key_cache must have 4 axes (block slot head dim), got shape (24, 3, 16)",
    ),
    "rank of the value cache": (
        "flash", {"value_cache": array((24, 3, 16))}, ValueError,
        "value_cache must have 4 axes (block slot head dim), got shape (24, 3, 16)",
    ),
    "rank of the one array": (
        "diffkv", {"kv_cache": array((6, 4, 120))}, ValueError,
        "kv_cache must have 4 axes (block slot head k+v), got shape (6, 4, 120)",
    ),
    "value cache like a key cache": (
        "flash", caches((6, 3, 2, 4, 8)), ValueError,
        "layer must be given where key_cache and value_cache have 5 axes each, got None",
    ),
    "blocks of the value cache": (
        "flash", {"value_cache": array((5, 4, 3, 16))}, ValueError,
        "value_cache axis block must have size 6, as in key_cache, got 5",
    ),
    "slots of the value cache": (
        "flash", {"value_cache": array((6, 8, 3, 16))}, ValueError,
        "value_cache axis slot must have size 4, as in key_cache, got 8",
    ),
    "heads of the value cache": (
        "flash", {"value_cache": array((6, 4, 1, 16))}, ValueError,
        "value_cache axis head must have size 3, as in key_cache, got 1",
    ),
    "layers of the value cache": (
        "flash", stacked | {"value_cache": array((3, 6, 4, 3, 16)), "layer": 0}, ValueError,
        "value_cache axis layer must have size 2, as in key_cache, got 3",
    ),
    "kv of 3": (
        "diffkv", {"layout": "KV_NHD", "kv_cache": array((3, 6, 4, 3, 16))}, ValueError,
        "kv_cache axis kv must have size 2, got 3",
    ),
    "odd interleaved heads": (
        "diffkv", {"layout": "INTERLEAVED", "kv_cache": array((6, 4, 7, 16))}, ValueError,
        "kv_cache axis (head kv) must have an even size, got 7",
    ),
    # layers
    "layer without an axis": (
        "flash", {"layout": "NHD", "layer": 0}, ValueError,
        "layer must be None for layout 'block slot head dim', which has no axis layer, got 0",
    ),
    "layer array without an axis": (
        "diffkv", {"layout": "PACKED_NHD", "layer": array((), "int32")}, ValueError,
        "layer must be None for layout 'block slot head k+v', which has no axis layer, "
        "got an array of shape ()",
    ),
    "layer left out": (
        "flash", stacked, ValueError, "layer must be given for layout 'layer block slot head dim', got None",
    ),
    "layer too large": (
        "flash", stacked | {"layer": 2}, ValueError, "layer must be at least 0 and below 2, got 2",
    ),
    "layer in memory, of none": (
        "flash", {"layout": STACKED} | caches((0, 6, 4, 3, 16)) | {"layer": array((), "int32")}, ValueError,
        "layer must be that of a cache, and the caches have 0 layers, got an array of shape ()",
    ),
    "layer below 0": (
        "flash", stacked | {"layer": -1}, ValueError, "layer must be at least 0 and below 2, got -1",
    ),
    "layer too large, one array": (
        "diffkv", {"kv_cache": array((3, 6, 4, 3, 40)), "layer": 7}, ValueError,
        "layer must be at least 0 and below 3, got 7",
    ),
    "NumPy layer too large": (
        "flash", stacked | {"layer": np.int64(2)}, ValueError, "layer must be at least 0 and below 2, got 2",
    ),
    "float layer": (
        "flash", stacked | {"layer": 1.0}, TypeError, "layer must be an int or an integer scalar, got 1.0",
    ),
    "bool layer": (
        "flash", stacked | {"layer": True}, TypeError, "layer must be an int or an integer scalar, got True",
    ),
    "layer by name": (
        "flash", stacked | {"layer": "0"}, TypeError, "layer must be an int or an integer scalar, got '0'",
    ),
    "two layers": (
        "flash", stacked | {"layer": array((2,), "int32")}, ValueError,
        "layer must have shape () or (1,), got (2,)",
    ),
    "layer array of floats": (
        "flash", stacked | {"layer": array((), "float32")}, TypeError,
        "layer must have dtype int32 or int64, got float32",
    ),
    "layer array of int8": (
        "diffkv", {"kv_cache": array((3, 6, 4, 3, 40)), "layer": array((1,), "int8")}, TypeError,
        "layer must have dtype int32 or int64, got int8",
    ),
}  # fmt: skip


OVERLAP = "key_cache and value_cache must not overlap in memory"
