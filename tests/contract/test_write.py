import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import jaxkv
import torchkv
from jaxkv._primitive.write import write_p
from kvcore.layout import CacheLayout
from kvcore.oracle import write as reference
from kvcore.run import interpreter
from tests.cases.arrays import DTYPES, bits, from_torch, make_case, random_bits, run_oracle, to_torch
from tests.cases.bad_writes import FORMATS
from torchkv._memory import share_elements

# ---- one table of bad calls, and five ways to make them


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


def function(module, op):
    return module.reshape_and_cache_flash if op == "flash" else module.reshape_and_cache_flash_diffkv


def split(arguments):
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def cache_names(op):
    return ["key_cache", "value_cache"] if op == "flash" else ["kv_cache"]


# Each way calls an op with NumPy arrays and gives what the caches hold afterwards, also if the call raises.


def in_jax(op, arguments, left):
    arrays, rest = split(arguments)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    left |= {name: arrays[name] for name in cache_names(op)}
    new = function(jaxkv, op)(**arrays, **rest)
    left |= zip(cache_names(op), new if op == "flash" else [new], strict=True)


def in_jax_tracing(op, arguments, left):
    arrays, rest = split(arguments)
    left |= {name: arrays[name] for name in cache_names(op)}
    jax.jit(lambda arrays: function(jaxkv, op)(**arrays, **rest)).trace(arrays)


def in_jax_refs(op, arguments, left):
    arrays, rest = split(arguments)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    refs = {name: jax.new_ref(arrays.pop(name)) for name in cache_names(op)}
    try:
        assert function(jaxkv, op)(**arrays, **refs, **rest) is None
    finally:
        left |= {name: ref[...] for name, ref in refs.items()}


def in_torch(op, arguments, left, backend=None):
    arrays, rest = split(arguments)
    tensors = {name: to_torch(x.copy()) for name, x in arrays.items()}
    try:
        assert function(torchkv, op)(**tensors, **rest, backend=backend) is None
    finally:
        left |= {name: from_torch(tensors[name]) for name in cache_names(op)}


def in_torch_interpreted(op, arguments, left):
    in_torch(op, arguments, left, backend="interpret")


def in_torch_tracing(op, arguments, left):
    arrays, rest = split(arguments)
    left |= {name: arrays[name] for name in cache_names(op)}
    mode = FakeTensorMode()
    tensors = {name: mode.from_tensor(to_torch(x)) for name, x in arrays.items()}
    with mode:
        assert function(torchkv, op)(**tensors, **rest) is None


WAYS = {
    "jax": in_jax,
    "jax, tracing": in_jax_tracing,
    "jax, Refs": in_jax_refs,
    "torch": in_torch,
    "torch, interpreted": in_torch_interpreted,
    "torch, tracing": in_torch_tracing,
}


def assert_caches(left, want):
    for name, cache in want.items():
        np.testing.assert_array_equal(bits(np.asarray(left[name])), bits(cache))


@pytest.fixture
def launches(monkeypatch):
    """What began to write."""
    seen = []

    def record(owner, name):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(write_p, "bind")
    record(torchkv._torch.write, "bits_of")
    record(interpreter, "run")
    return seen


# JAX converts integers of other widths: see test_jax_arguments.py.
TORCH_ONLY = ("int16 slots", "uint32 slots", "layer array of int8")


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in BAD for way in WAYS if name not in TORCH_ONLY or "torch" in way]
)
def test_bad_input(name, way, launches):
    op, changes, kind, message = BAD[name]
    arguments, left = valid(op) | changes, {}
    with jax.enable_x64(True), pytest.raises(kind) as error:
        WAYS[way](op, arguments, left)
    assert type(error.value) is kind
    assert str(error.value) == message
    assert not launches
    assert_caches(left, {name: arguments[name] for name in cache_names(op)})


def assert_writes(way, op, arguments):
    """The call is a good one: it leaves the oracle's caches, or, where it is traced only, raises nothing."""
    left = {}
    with jax.enable_x64(True):
        WAYS[way](op, arguments, left)
    if "tracing" not in way:
        arrays = [arguments[name].copy() for name in cache_names(op)]
        layer = arguments.get("layer")
        function(reference, op)(
            arguments["key"],
            arguments["value"],
            *arrays,
            arguments["slot_mapping"],
            layout=arguments.get("layout", "NHD" if op == "flash" else "PACKED_NHD"),
            layer=None if layer is None else int(np.reshape(layer, ())),
        )
        assert_caches(left, dict(zip(cache_names(op), arrays, strict=True)))
        assert any((bits(a) != bits(arguments[n])).any() for n, a in zip(cache_names(op), arrays, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["flash", "diffkv"])
def test_the_calls_that_bad_ones_differ_from_are_good(op, way):
    assert_writes(way, op, valid(op))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", [0, 1, np.int32(1), np.int64(1), np.array(1, np.int32), np.array([1])], ids=repr)
def test_layers_of_every_type(layer, way):
    assert_writes(way, "flash", valid("flash") | stacked | {"layer": layer})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "layout", [None, "NHD", "block slot head dim", " block  slot head dim", CacheLayout.NHD], ids=repr
)
def test_layouts_of_every_type(layout, way):
    assert_writes(way, "flash", valid("flash") | ({} if layout is None else {"layout": layout}))


# ---- what only one framework has


@pytest.mark.parametrize("op", ["flash", "diffkv"])
@pytest.mark.parametrize("backend", ["xla", "cuda", ""])
def test_backends_of_torch(op, backend):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        in_torch(op, valid(op), {}, backend)
    assert str(error.value) == f"backend must be None, 'triton', 'torch' or 'interpret', got {backend!r}"


@pytest.mark.parametrize("way", ["jax", "jax, tracing", "jax, Refs"])
@pytest.mark.parametrize("op", ["flash", "diffkv"])
@pytest.mark.parametrize("backend", ["torch", "cuda", ""])
def test_backends_of_jax(op, way, backend):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        WAYS[way](op, valid(op) | {"backend": backend}, {})
    assert str(error.value) == f"backend must be None, 'triton', 'xla' or 'interpret', got {backend!r}"


@pytest.mark.parametrize("op", ["flash", "diffkv"])
def test_triton_needs_a_gpu(op):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        in_torch(op, valid(op), {}, "triton")
    assert str(error.value) == "backend 'triton' needs a CUDA or ROCm device, got cpu"
    with jax.default_device("cpu"), pytest.raises(ValueError) as error:  # noqa: PT011
        in_jax(op, valid(op) | {"backend": "triton"}, {})
    assert str(error.value) == "backend 'triton' needs a CUDA or ROCm device, got cpu"


def test_one_ref_and_one_array():
    arguments = {name: jnp.asarray(x) for name, x in valid("flash").items()}
    for name in ("key_cache", "value_cache"):
        with pytest.raises(TypeError) as error:
            jaxkv.reshape_and_cache_flash(**arguments | {name: jax.new_ref(arguments[name])})
        assert str(error.value) == "key_cache and value_cache must be two jax.Refs or two arrays, got one of each"


@pytest.mark.parametrize("layer", [2**32, -(2**32) + 1])
def test_numpy_layers_that_int32_would_wrap_write_nothing(layer):
    arguments = valid("flash") | stacked
    new = jaxkv.reshape_and_cache_flash(**arguments, layer=np.array(layer))
    left = dict(zip(cache_names("flash"), new, strict=True))
    assert_caches(left, {name: arguments[name] for name in left})


OVERLAP = "key_cache and value_cache must not overlap in memory"


def test_one_ref_as_both_caches(launches):
    arguments = {name: jnp.asarray(x) for name, x in valid("flash").items()}
    cache = jax.new_ref(arguments["key_cache"])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jaxkv.reshape_and_cache_flash(**arguments | {"key_cache": cache, "value_cache": cache})
    assert str(error.value) == OVERLAP
    assert not launches


def test_one_ref_as_both_caches_under_jit():
    arguments = {name: jnp.asarray(x) for name, x in valid("flash").items()}
    cache = jax.new_ref(arguments.pop("key_cache"))
    del arguments["value_cache"]
    step = jax.jit(lambda cache, rest: jaxkv.reshape_and_cache_flash(key_cache=cache, value_cache=cache, **rest))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        step(cache, arguments)
    assert str(error.value) == OVERLAP


ELSEWHERE = ["key", "value", "value_cache", "slot_mapping", "k_scale", "v_scale", "layer"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_another_device(name, launches):
    arguments = valid("flash") | stacked | {"layer": array((1,), "int64")}
    arguments |= {"k_scale": array((1,), "float32"), "v_scale": array((), "float32")}
    arrays, rest = split(arguments)
    tensors = {key: to_torch(x) for key, x in arrays.items()}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        torchkv.reshape_and_cache_flash(**tensors, **rest)
    assert str(error.value) == f"{name} must be on device cpu, as key_cache, got meta"
    assert not launches
    for cache in ("key_cache", "value_cache"):
        if cache != name:
            np.testing.assert_array_equal(bits(from_torch(tensors[cache])), bits(arrays[cache]))


def test_a_cache_on_another_device():
    tensors = {key: to_torch(x) for key, x in valid("diffkv").items()}
    tensors["kv_cache"] = tensors["kv_cache"].to("meta")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        torchkv.reshape_and_cache_flash_diffkv(**tensors)
    assert str(error.value) == "key must be on device meta, as kv_cache, got cpu"


def test_fake_cuda_tensors_on_another_device():
    with FakeTensorMode():
        tensors = {key: torch.empty(x.shape, dtype=torch.float32) for key, x in valid("flash").items()}
        tensors["slot_mapping"] = torch.empty(5, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError) as error:  # noqa: PT011
            torchkv.reshape_and_cache_flash(**tensors)
    assert str(error.value) == "slot_mapping must be on device cpu, as key_cache, got cuda:0"


# ---- overlap, which strides make possible


def poison(*shape):
    return to_torch(random_bits(np.random.default_rng(7), shape, "bfloat16"))


def overlapping_caches():
    buffer = poison(10, 4, 3, 16)
    flat = poison(2 * 6 * 4 * 3 * 16).flatten()
    wide = poison(6, 4, 4, 16)
    return {
        "the same": (buffer[:6], buffer[:6]),
        "a view": (buffer[:6], buffer[:6].view(6, 4, 3, 16)),
        "two blocks": (buffer[0:6], buffer[4:10]),
        "value first": (buffer[1:7], buffer[0:6]),
        "one element": (flat[:1152].view(6, 4, 3, 16), flat[1151:2303].view(6, 4, 3, 16)),
        "two heads": (wide[:, :, :3], wide[:, :, 1:]),
        "one block of every other": (
            torch.as_strided(flat, (6, 4, 3, 16), (384, 48, 16, 1), 0)[:3],
            torch.as_strided(flat, (6, 4, 3, 16), (192, 48, 16, 1), 384 + 191)[:3],
        ),
    }


def separate_caches():
    buffer = poison(12, 4, 3, 16)
    return {
        "halves": (buffer[:6], buffer[6:]),
        "halves, value first": (buffer[6:], buffer[:6]),
        "unbind(0)": poison(2, 6, 4, 3, 16).unbind(0),
        "unbind(1)": poison(6, 2, 4, 3, 16).unbind(1),
        "every other block": (buffer[::2], buffer[1::2]),
        "every other head": (poison(6, 4, 6, 16)).unflatten(2, (3, 2)).unbind(3),
        "every other element": poison(6, 4, 3, 16, 2).unbind(4),
        "side by side": poison(6, 4, 3, 32).split(16, dim=3),
    }


def call_with(key_cache, value_cache, backend):
    tensors = {name: to_torch(x) for name, x in valid("flash").items() if "cache" not in name}
    extra = {"key_cache": key_cache, "value_cache": value_cache, "backend": backend}
    size = key_cache.shape[0] * 4
    slots = torch.tensor([3, size - 1, -1, 0, 9])
    return torchkv.reshape_and_cache_flash(**tensors | extra | {"slot_mapping": slots})


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", overlapping_caches())
def test_overlapping_caches(name, backend, launches):
    key_cache, value_cache = overlapping_caches()[name]
    before = key_cache.clone(), value_cache.clone()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call_with(key_cache, value_cache, backend)
    assert str(error.value) == OVERLAP
    assert not launches
    for cache, old in zip((key_cache, value_cache), before, strict=True):
        np.testing.assert_array_equal(bits(from_torch(cache)), bits(from_torch(old)))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", separate_caches())
def test_caches_of_one_buffer_that_do_not_overlap(name, backend):
    key_cache, value_cache = separate_caches()[name]
    case = make_case(np.random.default_rng(1), num_tokens=5, num_heads=3, head_size=16, num_blocks=6, block_size=4)
    case.caches = [from_torch(key_cache).copy(), from_torch(value_cache).copy()]
    assert key_cache.untyped_storage().data_ptr() == value_cache.untyped_storage().data_ptr()
    arguments = (
        to_torch(case.key),
        to_torch(case.value),
        key_cache,
        value_cache,
        to_torch(case.slot_mapping),
    )
    torchkv.reshape_and_cache_flash(*arguments, backend=backend)
    for cache, want in zip((key_cache, value_cache), run_oracle(case), strict=True):
        np.testing.assert_array_equal(bits(from_torch(cache)), bits(want))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            lambda: poison(1, 4, 3, 16).expand(6, -1, -1, -1),
            "value_cache axis block with stride 0 puts its 6 elements in one place",
        ),
        (
            lambda: poison(6, 4, 1, 16).expand(-1, -1, 3, -1),
            "value_cache axis head with stride 0 puts its 3 elements in one place",
        ),
        (
            lambda: poison(6, 4, 3, 16).as_strided((6, 4, 3, 16), (96, 48, 16, 1)),
            "value_cache axis block with stride 96 overlaps the axes inside it, which reach 192 elements",
        ),
    ],
    ids=["expanded blocks", "expanded heads", "blocks half over each other"],
)
def test_a_cache_that_overlaps_itself(view, message, backend, launches):
    cache = view()
    before = bits(from_torch(cache))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call_with(poison(6, 4, 3, 16), cache, backend)
    assert str(error.value) == message
    assert not launches
    np.testing.assert_array_equal(bits(from_torch(cache)), before)


@st.composite
def strided_views(draw):
    """Two views of one buffer, of up to three axes, any strides, any offsets."""
    views = []
    buffer = torch.zeros(400)
    for _ in range(2):
        shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        strides = [draw(st.integers(0, 24)) for _ in shape]
        views.append(buffer.as_strided(shape, strides, draw(st.integers(0, 100))))
    return views


def places(view):
    grids = np.indices(tuple(view.shape)).reshape(view.dim(), math.prod(view.shape))
    return set((view.storage_offset() + np.array(view.stride()) @ grids).tolist())


@settings(max_examples=500, deadline=None)
@given(strided_views())
def test_share_elements(views):
    a, b = views
    assert share_elements(a, b) == share_elements(b, a) == bool(places(a) & places(b))


def test_elements_that_lie_half_over_each_other():
    memory = bytearray(64)
    a = torch.frombuffer(memory, dtype=torch.bfloat16, count=8)
    b = torch.frombuffer(memory, dtype=torch.bfloat16, count=8, offset=15)
    c = torch.frombuffer(memory, dtype=torch.bfloat16, count=8, offset=17)
    assert share_elements(a, b)
    assert share_elements(b, a)
    assert not share_elements(a, c)
    assert not share_elements(c, a)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"kv_cache_dtype": None}, ValueError,
         f"kv_cache_dtype must be {FORMATS}, got None"),
        ({"kv_cache_dtype": ["fp8"]}, ValueError,
         f"kv_cache_dtype must be {FORMATS}, got ['fp8']"),
        ({"k_scale": "1"}, TypeError, "k_scale must be a number or an array of float32, got '1'"),
        ({"v_scale": False}, TypeError, "v_scale must be a number or an array of float32, got False"),
        ({"layer": 1.5}, TypeError, "layer must be an int or an integer scalar, got 1.5"),
        ({"layer": True}, TypeError, "layer must be an int or an integer scalar, got True"),
        ({"layout": 3}, TypeError, "layout must be a pattern string or a CacheLayout, got 3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("run", [in_jax, in_torch])
def test_arguments_of_wrong_types(run, options, kind, message):
    with pytest.raises(kind) as error:
        run("flash", valid("flash") | options, {})
    assert str(error.value) == message
