"""Bad calls with quantised caches: the same text from both frameworks, and no byte of any cache changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
import torchkv
from tests.cases.arrays import bits, from_torch, random_bits, to_torch

RNG = np.random.default_rng(0)


def floats(*shape):
    return np.ones(shape, np.float32)


def memory(*shape, dtype="uint8"):
    return random_bits(RNG, shape, dtype)


SLOTS = np.array([3, 1], np.int32)
CALLS = {
    "reshape_and_cache_flash": {
        "key": floats(2, 3, 32), "value": floats(2, 3, 32), "key_cache": memory(4, 4, 3, 32),
        "value_cache": memory(4, 4, 3, 32), "slot_mapping": SLOTS, "kv_cache_dtype": "int8",
    },
    "reshape_and_cache_flash_per_token_head_quant": {
        "key": floats(2, 3, 32), "value": floats(2, 3, 32), "key_cache": memory(4, 4, 3, 32),
        "value_cache": memory(4, 4, 3, 32), "k_scale_cache": memory(4, 4, 3, dtype="float32"),
        "v_scale_cache": memory(4, 4, 3, dtype="float32"), "slot_mapping": SLOTS, "kv_cache_dtype": "int8",
    },
    "reshape_and_cache_flash_diffkv_per_token_head_quant": {
        "key": floats(2, 3, 32), "value": floats(2, 3, 16), "kv_cache": memory(4, 4, 3, 48),
        "k_scale_cache": memory(4, 4, 3, dtype="float32"), "v_scale_cache": memory(4, 4, 3, dtype="float32"),
        "slot_mapping": SLOTS, "kv_cache_dtype": "fp8",
    },
    "concat_and_cache_mla": {
        "kv_c": floats(2, 512), "k_pe": floats(2, 64), "kv_cache": memory(4, 4, 656), "slot_mapping": SLOTS,
        "kv_cache_dtype": "fp8_ds_mla",
    },
    "gather_kv": {
        "caches": [memory(4, 4, 3, 32), memory(4, 4, 3, 32)], "block_tables": np.zeros((1, 2), np.int32),
        "seq_lens": np.array([5], np.int32), "max_len": 5, "kv_cache_dtype": "int8",
    },
    "kv_scales": {"key": floats(5, 3, 16), "value": floats(5, 3, 16), "kv_cache_dtype": "int8"},
}  # fmt: skip
FLASH, TOKEN_HEAD, DIFFKV, MLA, GATHER, SCALES = CALLS
DYNAMIC = "'fp8', 'fp8_e4m3', 'fp8_e5m2', 'fp8_e4m3fnuz', 'fp8_e5m2fnuz', 'int8' or 'int4'"


OF_LAYERS = {
    "key_cache": memory(2, 4, 4, 3, 32), "value_cache": memory(2, 4, 4, 3, 32), "layout": "layer block slot head dim",
    "layer": 1,
}  # fmt: skip


def halves(size, **more):
    return {"key_cache": memory(4, 4, 3, size), "value_cache": memory(4, 4, 3, size)} | more


def both(size):
    return {"key": floats(2, 3, size), "value": floats(2, 3, size)}


# name: op, what differs from a good call, type, message
BAD = {
    "odd head size for int4": (
        FLASH, both(33) | halves(16, kv_cache_dtype="int4"), ValueError,
        "key's head_size must be even for kv_cache_dtype 'int4', got 33",
    ),
    "odd head size of value for int4": (
        DIFFKV, {"kv_cache_dtype": "int4", "value": floats(2, 3, 15)}, ValueError,
        "value's head_size must be even for kv_cache_dtype 'int4', got 15",
    ),
    "head size that nvfp4 does not divide": (
        FLASH, both(40) | halves(22, kv_cache_dtype="nvfp4"), ValueError,
        "key's head_size must be a multiple of 16 for kv_cache_dtype 'nvfp4', got 40",
    ),
    "nvfp4 without a place for its scales": (
        FLASH, halves(16, kv_cache_dtype="nvfp4"), ValueError,
        "key_cache axis dim must be a multiple of 9, head_size / 2 elements and head_size / 16 scales, for "
        "kv_cache_dtype 'nvfp4', got 16",
    ),
    "nvfp4 in a layout without regions": (
        FLASH, {"kv_cache_dtype": "nvfp4", "layout": "block head dim slot"} | halves(18), ValueError,
        "layout must end with axis dim for kv_cache_dtype 'nvfp4', got 'block head dim slot'",
    ),
    "int4 in a cache of as many bytes as elements": (
        FLASH, {"kv_cache_dtype": "int4"}, ValueError, "key must have shape (num_tokens, 3, 64), got (2, 3, 32)",
    ),
    "int8 in a cache of bfloat16": (
        FLASH,
        {"key_cache": memory(4, 4, 3, 32, dtype="bfloat16"), "value_cache": memory(4, 4, 3, 32, dtype="bfloat16")},
        TypeError, "key_cache must have dtype int8 or uint8 for kv_cache_dtype 'int8', got bfloat16",
    ),
    "int4 in a cache of int8": (
        FLASH,
        {"kv_cache_dtype": "int4", "key_cache": memory(4, 4, 3, 16, dtype="int8"),
         "value_cache": memory(4, 4, 3, 16, dtype="int8")},
        TypeError, "key_cache must have dtype uint8 for kv_cache_dtype 'int4', got int8",
    ),
    "scales for another number of heads": (
        FLASH, {"k_scale": floats(4)}, ValueError, "k_scale must have shape (), (1,) or (3,), got (4,)",
    ),
    "scales of heads in a matrix": (
        FLASH, {"v_scale": floats(3, 1)}, ValueError, "v_scale must have shape (), (1,) or (3,), got (3, 1)",
    ),
    "scales of heads of another dtype": (
        FLASH, {"v_scale": np.ones(3, np.float16)}, TypeError, "v_scale must have dtype float32, got float16",
    ),
    "scales of other layers": (
        FLASH, OF_LAYERS | {"k_scale": floats(3, 3)}, ValueError,
        "k_scale must have shape (), (1,), (3,), (2, 1) or (2, 3), got (3, 3)",
    ),
    "scales of layers without an axis": (
        FLASH, OF_LAYERS | {"v_scale": floats(2)}, ValueError,
        "v_scale must have shape (), (1,), (3,), (2, 1) or (2, 3), got (2,)",
    ),
    "scales of layers of another dtype": (
        FLASH, OF_LAYERS | {"v_scale": np.ones((2, 3), np.float16)}, TypeError,
        "v_scale must have dtype float32, got float16",
    ),
    "scales of layers of a cache without any": (
        FLASH, {"k_scale": floats(1, 1)}, ValueError, "k_scale must have shape (), (1,) or (3,), got (1, 1)",
    ),
    "scales of layers that there are none of": (
        FLASH, {"key_cache": memory(0, 4, 4, 3, 32), "value_cache": memory(0, 4, 4, 3, 32), "k_scale": floats(0, 1),
                "layout": "layer block slot head dim", "layer": np.array([0], np.int32)},
        ValueError, "k_scale must have shape (), (1,) or (3,), got (0, 1)",
    ),
    "fp8_ds_mla for keys and values": (
        FLASH, {"kv_cache_dtype": "fp8_ds_mla"}, ValueError,
        "layout must have an axis latent for kv_cache_dtype 'fp8_ds_mla', got 'block slot head dim'",
    ),
    # scales for each token and head
    "format without scales": (
        TOKEN_HEAD, {"kv_cache_dtype": "auto"}, ValueError,
        f"kv_cache_dtype must be {DYNAMIC} with scales for each token and head, got 'auto'",
    ),
    "nvfp4 with scale caches": (
        TOKEN_HEAD, {"kv_cache_dtype": "nvfp4"}, ValueError,
        f"kv_cache_dtype must be {DYNAMIC} with scales for each token and head, got 'nvfp4'",
    ),
    "scale cache of another shape": (
        TOKEN_HEAD, {"k_scale_cache": memory(4, 3, 4, dtype="float32")}, ValueError,
        "k_scale_cache must have shape (4, 4, 3), got (4, 3, 4)",
    ),
    "scale cache of another dtype": (
        DIFFKV, {"v_scale_cache": memory(4, 4, 3, dtype="float16")}, TypeError,
        "v_scale_cache must have dtype float32, got float16",
    ),
    "scale layout without an axis": (
        TOKEN_HEAD, {"scale_layout": "block slot"}, ValueError,
        "scale_layout must name axes block, head, slot once each, got 'block slot'",
    ),
    "scale layout of another type": (
        TOKEN_HEAD, {"scale_layout": 3}, TypeError, "scale_layout must be a pattern string, got 3",
    ),
    "fp8 keys that want scales": (
        DIFFKV, {"key": memory(2, 3, 32, dtype="float8_e4m3fn"), "value": memory(2, 3, 16, dtype="float8_e4m3fn")},
        TypeError, "key must have dtype float32, bfloat16 or float16 to be given scales, got float8_e4m3fn",
    ),
    # MLA
    "MLA row of another size": (
        MLA, {"kv_cache": memory(4, 4, 576)}, ValueError,
        "kv_cache must have shape (num_blocks, block_size, 656), got (4, 4, 576)",
    ),
    "MLA columns of another number": (
        MLA, {"kv_c": floats(2, 256)}, ValueError,
        "kv_c must have 512 columns, and k_pe 64 or none, for kv_cache_dtype 'fp8_ds_mla', got 256 and 64",
    ),
    "MLA rotary columns of another number": (
        MLA, {"k_pe": floats(2, 32)}, ValueError,
        "kv_c must have 512 columns, and k_pe 64 or none, for kv_cache_dtype 'fp8_ds_mla', got 512 and 32",
    ),
    "no rotary columns, of other tokens": (
        MLA, {"k_pe": floats(3, 0)}, ValueError, "k_pe must have shape (2, 0), got (3, 0)",
    ),
    "scales of MLA's heads": (MLA, {"scale": floats(3)}, ValueError, "scale must have shape () or (1,), got (3,)"),
    "scales of other layers of MLA": (
        MLA, {"kv_cache": memory(2, 4, 4, 656), "layer": 1, "scale": floats(4, 1)}, ValueError,
        "scale must have shape (), (1,) or (2, 1), got (4, 1)",
    ),
    "k_pe of other tokens": (MLA, {"k_pe": floats(3, 64)}, ValueError, "k_pe must have shape (2, 64), got (3, 64)"),
    "k_pe of another dtype": (
        MLA, {"k_pe": np.ones((2, 64), np.float16)}, TypeError, "k_pe must have dtype float32, as kv_c, got float16",
    ),
    # reading
    "scale caches for one side": (
        GATHER, {"k_scale": floats(4, 4, 3)}, ValueError,
        "v_scale must be given where the other one has scales for each token and head",
    ),
    "scale caches of another shape": (
        GATHER, {"k_scale": floats(4, 4, 3), "v_scale": floats(4, 3, 3)}, ValueError,
        "v_scale must have shape (4, 4, 3), got (4, 3, 3)",
    ),
    "scale of two heads of three": (
        GATHER, {"k_scale": floats(2)}, ValueError, "k_scale must have shape (), (1,) or (3,), got (2,)",
    ),
    "scales of layers and two heads of three": (
        GATHER, {"caches": [memory(2, 4, 4, 3, 32)] * 2, "layout": "layer block slot head dim", "layer": 1,
                 "v_scale": floats(2, 2)},
        ValueError, "v_scale must have shape (), (1,), (3,), (2, 1) or (2, 3), got (2, 2)",
    ),
    # calibration
    "no format to calibrate": (
        SCALES, {"kv_cache_dtype": "auto"}, ValueError,
        f"kv_cache_dtype must be {DYNAMIC.replace(' or ', ', ')} or 'nvfp4', got 'auto'",
    ),
    "granularity": (
        SCALES, {"granularity": "token"}, ValueError, "granularity must be 'tensor' or 'head', got 'token'",
    ),
    "nothing to calibrate with": (
        SCALES, {"key": floats(0, 3, 16)}, ValueError, "key must have at least one element, got shape (0, 3, 16)",
    ),
}  # fmt: skip


def call(module, op, arguments, convert):
    converted = {}
    for name, argument in arguments.items():
        if isinstance(argument, list):
            converted[name] = [convert(a) for a in argument]
        else:
            converted[name] = convert(argument) if isinstance(argument, np.ndarray) else argument
    return converted, lambda: getattr(module, op)(**converted)


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name, framework):
    op, changes, kind, message = BAD[name]
    arguments = CALLS[op] | changes
    module, convert = (jaxkv, jnp.asarray) if framework == "jax" else (torchkv, lambda a: to_torch(a.copy()))
    with jax.enable_x64(True):
        converted, run = call(module, op, arguments, convert)
        with pytest.raises(kind) as error:
            run()
    assert type(error.value) is kind
    assert str(error.value) == message
    for cache in (n for n in arguments if "cache" in n and isinstance(arguments[n], np.ndarray)):
        left = from_torch(converted[cache]) if framework == "torch" else np.asarray(converted[cache])
        np.testing.assert_array_equal(bits(left), bits(arguments[cache]))


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("op", CALLS)
def test_the_calls_that_bad_ones_differ_from_are_good(op, framework):
    module, convert = (jaxkv, jnp.asarray) if framework == "jax" else (torchkv, lambda a: to_torch(a.copy()))
    _, run = call(module, op, CALLS[op], convert)
    run()


CREATE = {"num_blocks": 4, "block_size": 4, "num_heads": 2, "head_size": 32}
BAD_CREATE = {
    "scales that are computed": (
        {"kv_cache_dtype": "int8", "per_token_head": True, "k_scale": 0.5}, ValueError,
        "k_scale must be None with per_token_head, which computes scales, got 0.5",
    ),
    "nothing to scale": (
        {"per_token_head": True}, ValueError,
        f"per_token_head needs kv_cache_dtype {DYNAMIC} and a layout with a place for K and for V, got 'auto' and "
        "'block slot head dim'",
    ),
    "scale layout without scales": (
        {"kv_cache_dtype": "int8", "scale_layout": "block head slot"}, ValueError,
        "scale_layout must be None without per_token_head, got 'block head slot'",
    ),
    "odd heads": (
        {"kv_cache_dtype": "int4", "head_size": 31}, ValueError,
        "head_size must be even for kv_cache_dtype 'int4', got 31",
    ),
    "nvfp4 in a layout without regions": (
        {"kv_cache_dtype": "nvfp4", "layout": "HEAD_MAJOR"}, ValueError,
        "layout must end with axis dim for kv_cache_dtype 'nvfp4', got 'block head dim/x slot x, block head dim slot'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", [jaxkv, torchkv], ids=["jax", "torch"])
@pytest.mark.parametrize("name", BAD_CREATE)
def test_bad_caches(name, module):
    changes, kind, message = BAD_CREATE[name]
    with pytest.raises(kind) as error:
        module.PagedKVCache.create(**CREATE | changes)
    assert str(error.value) == message
