"""Bad calls of `rope_and_cache`, with their errors."""

import numpy as np

from kvcore.layout import CacheLayout
from tests.cases.bad_writes import FLOATS, FORMATS, array

MAX_POSITION, RANK, ROPE = 12, 32, 16


def valid(kind="two arrays", dtype="bfloat16"):
    """Arguments that fulfil the contract: 5 tokens, 6 query heads, 3 heads of 16, 6 blocks of 4 slots.

    "one array" has values of 24, "scales" a scale for each token's head, and "latent" rows of MLA, of 32 + 16.
    """
    arguments = {
        "query": array((5, 6, 16), dtype), "positions": np.array([0, 11, 3, -1, 4]),
        "cos_sin": array((MAX_POSITION, 16), "float32"), "slot_mapping": np.array([3, 23, -1, 0, 9]), "rope": "neox",
    }  # fmt: skip
    key, value, shapes = (5, 3, 16), (5, 3, 16), [(6, 4, 3, 16)] * 2
    if kind == "one array":
        value, shapes = (5, 3, 24), [(6, 4, 3, 40)]
    if kind == "latent":
        key, value, shapes = (5, RANK), (5, ROPE), [(6, 4, RANK + ROPE)]
    arguments |= {"key": array(key, dtype), "value": array(value, dtype)}
    if kind == "scales":
        caches = [*(array(shape, "int8") for shape in shapes), *(array((6, 4, 3), "float32") for _ in range(2))]
        return arguments | {"caches": caches, "kv_cache_dtype": "int8"}
    return arguments | {"caches": [array(shape, dtype) for shape in shapes]}


def all_of(dtype):
    """Query, key and value in a dtype."""
    return {"query": array((5, 6, 16), dtype), "key": array((5, 3, 16), dtype), "value": array((5, 3, 16), dtype)}


def table(*shape, dtype="float32"):
    return {"cos_sin": array(shape, dtype)}


# name: kind, what differs from a valid call, type, message
BAD = {
    # choices and numbers
    "rope": ("two arrays", {"rope": "llama"}, ValueError, "rope must be 'neox' or 'gptj', got 'llama'"),
    "rope by truth": ("two arrays", {"rope": True}, ValueError, "rope must be 'neox' or 'gptj', got True"),
    "odd rotary_dim": (
        "two arrays", {"rotary_dim": 7}, ValueError, "rotary_dim must be even and at least 2, got 7",
    ),
    "no rotary_dim": ("two arrays", {"rotary_dim": 0}, ValueError, "rotary_dim must be even and at least 2, got 0"),
    "float rotary_dim": ("two arrays", {"rotary_dim": 8.0}, TypeError, "rotary_dim must be None or an int, got 8.0"),
    "rotary_dim above head_size": (
        "two arrays", {"rotary_dim": 18} | table(12, 18), ValueError,
        "rotary_dim must be at most head_size = 16, got 18",
    ),
    "rotary_dim above qk_rope_head_dim": (
        "latent", {"rotary_dim": 18} | table(12, 18), ValueError, "rotary_dim must be at most head_size = 16, got 18",
    ),
    "odd head_size": (
        "two arrays",
        {"query": array((5, 6, 15)), "key": array((5, 3, 15)), "value": array((5, 3, 15))}
        | {"caches": [array((6, 4, 3, 15)), array((6, 4, 3, 15))]},
        ValueError, "rotary_dim must be given for an odd head_size, got None and 15",
    ),
    "two sections": (
        "two arrays", {"mrope_section": (4, 4)}, TypeError, "mrope_section must be None or three ints, got (4, 4)",
    ),
    "sections of floats": (
        "two arrays", {"mrope_section": (4, 2, 2.0)}, TypeError,
        "mrope_section must be None or three ints, got (4, 2, 2.0)",
    ),
    "negative section": (
        "two arrays", {"mrope_section": (9, 0, -1)}, ValueError,
        "mrope_section must not be negative, got (9, 0, -1)",
    ),
    "sum of sections": (
        "two arrays", {"mrope_section": [4, 2, 4], "positions": np.zeros((3, 5), np.int32)}, ValueError,
        "mrope_section must add up to rotary_dim / 2 = 8, got (4, 2, 4), which are 10",
    ),
    "eps below 0": ("two arrays", {"eps": -1e-6}, ValueError, "eps must be finite and at least 0, got -1e-06"),
    "infinite eps": ("two arrays", {"eps": float("inf")}, ValueError, "eps must be finite and at least 0, got inf"),
    "eps by name": ("two arrays", {"eps": "1e-6"}, TypeError, "eps must be a number, got '1e-6'"),
    # query, key, value
    "query of rank 2": (
        "two arrays", {"query": array((5, 96))}, ValueError,
        "query must have shape (5, num_q_heads, 16), got (5, 96)",
    ),
    "tokens of query": (
        "two arrays", {"query": array((6, 6, 16))}, ValueError,
        "query must have shape (5, num_q_heads, 16), got (6, 6, 16)",
    ),
    "no heads of query": (
        "two arrays", {"query": array((5, 0, 16))}, ValueError,
        "query must have shape (5, num_q_heads, 16), got (5, 0, 16)",
    ),
    "head size of query": (
        "one array", {"query": array((5, 6, 24))}, ValueError,
        "query must have shape (5, num_q_heads, 16), got (5, 6, 24)",
    ),
    "query like a row of MLA": (
        "latent", {"query": array((5, 6, 48))}, ValueError,
        "query must have shape (5, num_q_heads, 16), got (5, 6, 48)",
    ),
    "dtype of query": (
        "two arrays", {"query": array((5, 6, 16), "float16")}, TypeError,
        "query must have dtype bfloat16, as key, got float16",
    ),
    "key of rank 2": (
        "two arrays", {"key": array((5, 48))}, ValueError,
        "key must have shape (num_tokens, num_heads, head_size), got (5, 48)",
    ),
    "heads of key": (
        "one array", {"key": array((5, 2, 16))}, ValueError, "key must have shape (num_tokens, 3, 16), got (5, 2, 16)",
    ),
    "heads of value": (
        "two arrays", {"value": array((5, 4, 16))}, ValueError, "value must have shape (5, 3, 16), got (5, 4, 16)",
    ),
    "dtype of value": (
        "two arrays", {"value": array((5, 3, 16), "float32")}, TypeError,
        "value must have dtype bfloat16, as key, got float32",
    ),
    "fp8": (
        "two arrays", all_of("float8_e4m3fn") | {"caches": [array((6, 4, 3, 16), "float8_e4m3fn")] * 2}, TypeError,
        f"key must have dtype {FLOATS}, got float8_e4m3fn",
    ),
    "heads in rows of MLA": (
        "latent", {"key": array((5, 1, 32))}, ValueError,
        "key must have shape (num_tokens, kv_lora_rank), got (5, 1, 32)",
    ),
    "heads in the rotary part of MLA": (
        "latent", {"value": array((5, 1, 16))}, ValueError,
        "value must have shape (num_tokens, qk_rope_head_dim), got (5, 1, 16)",
    ),
    "no rotary part": (
        "latent", {"key": array((5, 48)), "value": array((5, 0))}, ValueError,
        "value must have at least 2 columns to be rotated, got shape (5, 0)",
    ),
    "tokens of the rotary part": (
        "latent", {"value": array((4, 16))}, ValueError, "value must have shape (5, 16), got (4, 16)",
    ),
    # positions, cos_sin, slot_mapping
    "positions of rank 2": (
        "two arrays", {"positions": np.zeros((1, 5), np.int32)}, ValueError,
        "positions must have shape (5,), got (1, 5)",
    ),
    "fewer positions than tokens": (
        "latent", {"positions": np.zeros(4, np.int32)}, ValueError, "positions must have shape (5,), got (4,)",
    ),
    "one row of positions for sections": (
        "two arrays", {"mrope_section": (4, 2, 2)}, ValueError, "positions must have shape (3, 5), got (5,)",
    ),
    "float positions": (
        "two arrays", {"positions": np.zeros(5, np.float32)}, TypeError,
        "positions must have dtype int32 or int64, got float32",
    ),
    "bool positions": (
        "two arrays", {"positions": np.zeros(5, bool)}, TypeError,
        "positions must have dtype int32 or int64, got bool",
    ),
    "table of rank 1": (
        "two arrays", table(16), ValueError, "cos_sin must have shape (max_position, 16), got (16,)",
    ),
    "columns of the table": (
        "two arrays", table(12, 8), ValueError, "cos_sin must have shape (max_position, 16), got (12, 8)",
    ),
    "columns of the table, for rotary_dim": (
        "two arrays", {"rotary_dim": 8}, ValueError, "cos_sin must have shape (max_position, 8), got (12, 16)",
    ),
    "table of float64": (
        "two arrays", table(12, 16, dtype="float64"), TypeError,
        "cos_sin must have dtype float32 or bfloat16, got float64",
    ),
    "table of another half": (
        "two arrays", table(12, 16, dtype="float16"), TypeError,
        "cos_sin must have dtype float32 or bfloat16, got float16",
    ),
    "more slots than tokens": (
        "two arrays", {"slot_mapping": np.arange(6)}, ValueError,
        "slot_mapping must have at most num_tokens = 5 entries, got 6",
    ),
    "slots of rank 2": (
        "latent", {"slot_mapping": np.zeros((5, 1), np.int64)}, ValueError,
        "slot_mapping must have shape (n,), got (5, 1)",
    ),
    "float slots": (
        "one array", {"slot_mapping": np.zeros(5, np.float32)}, TypeError,
        "slot_mapping must have dtype int32 or int64, got float32",
    ),
    # norms
    "size of q_norm": (
        "two arrays", {"q_norm": array((6,))}, ValueError, "q_norm must have shape (16,), got (6,)",
    ),
    "rank of k_norm": (
        "two arrays", {"k_norm": array((1, 16))}, ValueError, "k_norm must have shape (16,), got (1, 16)",
    ),
    "size of k_norm of MLA": (
        "latent", {"k_norm": array((16,))}, ValueError, "k_norm must have shape (32,), got (16,)",
    ),
    "dtype of q_norm": (
        "two arrays", {"q_norm": array((16,), "float16")}, TypeError,
        "q_norm must have dtype float32 or bfloat16, got float16",
    ),
    # caches
    "no caches": (
        "two arrays", {"caches": []}, ValueError,
        "caches must be (key_cache, value_cache) or (kv_cache,), followed by (k_scale_cache, v_scale_cache) where "
        "each token's head has a scale, got 0 arrays",
    ),
    "five caches": (
        "two arrays", {"caches": [array((6, 4, 3, 16))] * 5}, ValueError,
        "caches must be (key_cache, value_cache) or (kv_cache,), followed by (k_scale_cache, v_scale_cache) where "
        "each token's head has a scale, got 5 arrays",
    ),
    "dtype of the value cache": (
        "two arrays", {"caches": [array((6, 4, 3, 16)), array((6, 4, 3, 16), "float32")]}, TypeError,
        "value_cache must have dtype bfloat16, as key_cache, got float32",
    ),
    "rank of the caches": (
        "two arrays", {"caches": [array((24, 3, 16)), array((24, 3, 16))]}, ValueError,
        "key_cache must have 4 axes (block slot head dim), got shape (24, 3, 16)",
    ),
    "scale caches of another shape": (
        "scales", {"caches": [*valid("scales")["caches"][:3], array((6, 4, 2), "float32")]}, ValueError,
        "v_scale_cache must have shape (6, 4, 3), got (6, 4, 2)",
    ),
    "scale caches for auto": (
        "scales", {"kv_cache_dtype": "auto"}, ValueError,
        "kv_cache_dtype must be 'fp8', 'fp8_e4m3', 'fp8_e5m2', 'fp8_e4m3fnuz', 'fp8_e5m2fnuz', 'int8' or 'int4' with "
        "scales for each token and head, got 'auto'",
    ),
    "two arrays of MLA": (
        "two arrays", {"layout": "MLA", "key": array((5, 32)), "value": array((5, 16))}, ValueError,
        "caches must be one array for layout 'block slot latent', got 2",
    ),
    "scale caches of MLA": (
        "latent",
        {"layout": "MLA", "kv_cache_dtype": "int8"}
        | {"caches": [array((6, 4, 48), "int8"), *(array((6, 4, 1), "float32") for _ in range(2))]},
        ValueError, "caches must be one array for layout 'block slot latent', got 3",
    ),
    "columns of MLA's cache": (
        "latent", {"caches": [array((6, 4, 40))]}, ValueError,
        "kv_cache must have shape (num_blocks, block_size, 48), got (6, 4, 40)",
    ),
    "v_scale of MLA": (
        "latent", {"kv_cache_dtype": "fp8", "v_scale": 2.0, "caches": [array((6, 4, 48), "uint8")]}, ValueError,
        "v_scale must be None for rows of MLA, where k_scale is for the whole row",
    ),
    "fp8_ds_mla of another rank": (
        "latent", {"kv_cache_dtype": "fp8_ds_mla", "caches": [array((6, 4, 656), "uint8")]}, ValueError,
        "key must have 512 columns, and value 64 or none, for kv_cache_dtype 'fp8_ds_mla', got 32 and 16",
    ),
    # what all writers check
    "kv_cache_dtype": (
        "two arrays", {"kv_cache_dtype": "int3"}, ValueError, f"kv_cache_dtype must be {FORMATS}, got 'int3'",
    ),
    "fp8 in a cache of bfloat16": (
        "two arrays", {"kv_cache_dtype": "fp8"}, TypeError,
        "key_cache must have dtype float8_e4m3fn or uint8 for kv_cache_dtype 'fp8', got bfloat16",
    ),
    "a scale for another number of heads": (
        "two arrays",
        {"kv_cache_dtype": "fp8", "k_scale": array((4,), "float32"), "caches": [array((6, 4, 3, 16), "uint8")] * 2},
        ValueError, "k_scale must have shape (), (1,) or (3,), got (4,)",
    ),
    "layout of one array for two": (
        "two arrays", {"layout": "KV_NHD"}, ValueError,
        "layout must describe two arrays, a key and a value cache, got 'kv block slot head dim', which is for "
        "reshape_and_cache_flash_diffkv",
    ),
    "layout of two arrays for one": (
        "one array", {"layout": CacheLayout.HND}, ValueError,
        "layout must describe one array for K and V, got 'block head slot dim', which is for reshape_and_cache_flash",
    ),
    "layer without an axis": (
        "two arrays", {"layout": "NHD", "layer": 0}, ValueError,
        "layer must be None for layout 'block slot head dim', which has no axis layer, got 0",
    ),
    "layer too large": (
        "two arrays", {"caches": [array((2, 6, 4, 3, 16))] * 2, "layer": 2}, ValueError,
        "layer must be at least 0 and below 2, got 2",
    ),
    "layer of MLA too large": (
        "latent", {"caches": [array((2, 6, 4, 48))], "layer": 2}, ValueError,
        "layer must be at least 0 and below 2, got 2",
    ),
    "backend": ("two arrays", {"backend": "cuda"}, ValueError, None),  # the frameworks have backends of their own
}  # fmt: skip


# Positions that are known at the call: of a list, an array of NumPy, and in torch of tensors on a CPU.
BEYOND = {
    "the first position past the table": (
        {"positions": np.array([0, 12, 3, -1, 4])}, "cos_sin must have a row for position 12, got 12 rows",
    ),
    "a position of 64 bits": (
        {"positions": np.array([0, 2**40, 3, -1, 4])},
        "cos_sin must have a row for position 1099511627776, got 12 rows",
    ),
    "a position of a section": (
        {"positions": np.array([[0] * 5, [0] * 4 + [99], [1] * 5]), "mrope_section": (2, 2, 4)},
        "cos_sin must have a row for position 99, got 12 rows",
    ),
    "an empty table": (
        {"positions": np.zeros(5, np.int32), "cos_sin": array((0, 16), "float32")},
        "cos_sin must have a row for position 0, got 0 rows",
    ),
}  # fmt: skip
