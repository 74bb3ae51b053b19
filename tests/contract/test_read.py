"""Bad calls of paged_attention, gather_kv and PagedKVCache: one text from both frameworks, and nothing launched."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jaxkv
import torchkv
from kvcore.run import interpreter
from tests.cases.arrays import DTYPES, random_normal, to_torch
from tests.cases.bad_writes import FORMATS
from tests.cases.reads import CPU_IMPLEMENTATIONS, attend_jax, attend_torch, make_read
from tests.cases.torch_ops import attention_arguments


def array(*shape, dtype="bfloat16"):
    return random_normal(np.random.default_rng(0), shape, dtype) if dtype in DTYPES else np.ones(shape, dtype)


def integers(*shape, dtype="int32"):
    return np.zeros(shape, dtype)


CACHE = (6, 4, 2, 16)
FLOATS = "float32, bfloat16 or float16"
CACHES = "float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz or float8_e5m2fnuz"
ATTEND = {
    "query": array(3, 6, 16),
    "caches": (array(*CACHE), array(*CACHE)),
    "block_tables": integers(3, 5),
    "seq_lens": integers(3),
}
GATHER = {name: ATTEND[name] for name in ("caches", "block_tables", "seq_lens")} | {"max_len": 7}
PACKED = {"caches": array(6, 4, 2, 40)}
LATENT = {"caches": array(6, 4, 16)}

# name: op, what differs from a valid call, type, message
BAD = {
    "query of rank 2": (
        "attend", {"query": array(3, 96)}, ValueError,
        "query must have shape (num_tokens, num_q_heads, head_size), got (3, 96)",
    ),
    "head size of query": (
        "attend", {"query": array(3, 6, 17)}, ValueError,
        "query must have shape (num_tokens, num_q_heads, 16), got (3, 6, 17)",
    ),
    "heads of query": (
        "attend", {"query": array(3, 5, 16)}, ValueError,
        "query must have a multiple of 2 heads, as the cache has, got 5",
    ),
    "dtype of query": (
        "attend", {"query": array(3, 6, 16, dtype="float64")}, TypeError,
        f"query must have dtype {FLOATS}, got float64",
    ),
    "tokens without starts": (
        "attend", {"query": array(4, 6, 16)}, ValueError,
        "query_start_loc must be given unless query has one token for each of 3 sequences, got None and 4 tokens",
    ),
    "starts of as many": (
        "attend", {"query_start_loc": integers(3)}, ValueError,
        "query_start_loc must have shape (4,), got (3,)",
    ),
    "dtype of starts": (
        "attend", {"query_start_loc": integers(4, dtype="float32")}, TypeError,
        "query_start_loc must have dtype int32 or int64, got float32",
    ),
    "tables of rank 1": (
        "attend", {"block_tables": integers(3)}, ValueError,
        "block_tables must have shape (num_seqs, max_blocks), got (3,)",
    ),
    "dtype of tables": (
        "gather", {"block_tables": integers(3, 5, dtype="bool")}, TypeError,
        "block_tables must have dtype int32 or int64, got bool",
    ),
    "number of lengths": (
        "gather", {"seq_lens": integers(4)}, ValueError, "seq_lens must have shape (3,), got (4,)",
    ),
    "dtype of lengths": (
        "attend", {"seq_lens": integers(3, dtype="bool")}, TypeError,
        "seq_lens must have dtype int32 or int64, got bool",
    ),
    "number of sinks": ("attend", {"sinks": array(2)}, ValueError, "sinks must have shape (6,), got (2,)"),
    "dtype of sinks": (
        "attend", {"sinks": np.zeros(6, np.int32)}, TypeError, f"sinks must have dtype {FLOATS}, got int32",
    ),
    "causal": ("attend", {"causal": 1}, TypeError, "causal must be True or False, got 1"),
    "scale": ("attend", {"scale": "big"}, TypeError, "scale must be None or a number, got 'big'"),
    "infinite scale": ("attend", {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    "cap": ("attend", {"soft_cap": True}, TypeError, "soft_cap must be None or a number, got True"),
    "negative cap": ("attend", {"soft_cap": -1}, ValueError, "soft_cap must be finite and at least 0, got -1"),
    "truth of NumPy as a cap": (
        "attend", {"soft_cap": np.True_}, TypeError, f"soft_cap must be None or a number, got {np.True_!r}",
    ),
    "truth of NumPy as a window": (
        "attend", {"sliding_window": np.True_}, TypeError,
        f"sliding_window must be None or an int, got {np.True_!r}",
    ),
    "list as a scale": ("attend", {"scale": [1.0]}, TypeError, "scale must be None or a number, got [1.0]"),
    "long window without causal": (
        "attend", {"sliding_window": 2**40, "causal": False}, ValueError,
        "sliding_window must be None where causal is False, got 1099511627776",
    ),
    "truth as a scale of keys": (
        "attend", {"k_scale": True}, TypeError, "k_scale must be a number or an array of float32, got True",
    ),
    "truth of NumPy as a scale of values": (
        "gather", {"v_scale": np.False_}, TypeError,
        f"v_scale must be a number or an array of float32, got {np.False_!r}",
    ),
    "window": ("attend", {"sliding_window": 2.0}, TypeError, "sliding_window must be None or an int, got 2.0"),
    "window of zero": ("attend", {"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0"),
    "window without causal": (
        "attend", {"sliding_window": 3, "causal": False}, ValueError,
        "sliding_window must be None where causal is False, got 3",
    ),
    "three caches": (
        "attend", {"caches": (array(*CACHE),) * 3}, ValueError,
        "caches must be (key_cache, value_cache) or one array, got 3 arrays",
    ),
    "one cache for two": (
        "attend", {"caches": array(*CACHE), "layout": "NHD"}, ValueError,
        "caches must be (key_cache, value_cache) for layout 'block slot head dim', got 1 arrays",
    ),
    "two caches for one": (
        "gather", {"layout": "KV_NHD"}, ValueError,
        "caches must be one array for layout 'kv block slot head dim', got 2 arrays",
    ),
    "rank of a cache": (
        "attend", {"caches": (array(6, 4, 32),) * 2}, ValueError,
        "key_cache must have 4 axes (block slot head dim), got shape (6, 4, 32)",
    ),
    "extents that differ": (
        "attend", {"caches": (array(*CACHE), array(6, 4, 3, 16))}, ValueError,
        "value_cache axis head must have size 2, as in key_cache, got 3",
    ),
    "dtypes that differ": (
        "gather", {"caches": (array(*CACHE), array(*CACHE, dtype="float16"))}, TypeError,
        "value_cache must have dtype bfloat16, as key_cache, got float16",
    ),
    "uint8 without a format": (
        "attend", {"caches": (np.zeros(CACHE, np.uint8),) * 2}, TypeError,
        f"key_cache must have dtype {CACHES} for kv_cache_dtype 'auto', got uint8",
    ),
    "bfloat16 for fp8": (
        "gather", {"kv_cache_dtype": "fp8"}, TypeError,
        "key_cache must have dtype float8_e4m3fn or uint8 for kv_cache_dtype 'fp8', got bfloat16",
    ),
    "format": (
        "attend", {"kv_cache_dtype": "int3"}, ValueError,
        f"kv_cache_dtype must be {FORMATS}, got 'int3'",
    ),
    "shape of a scale": (
        "attend", {"k_scale": np.ones(3, np.float32)}, ValueError,
        "k_scale must have shape (), (1,) or (2,), got (3,)",
    ),
    "dtype of a scale": (
        "gather", {"v_scale": np.ones(1, np.int32)}, TypeError, "v_scale must have dtype float32, got int32",
    ),
    "layer of no axis": (
        "attend", {"layer": 1, "layout": "NHD"}, ValueError,
        "layer must be None for layout 'block slot head dim', which has no axis layer, got 1",
    ),
    "layer beyond": (
        "gather", {"caches": (array(2, *CACHE),) * 2, "layer": 2}, ValueError,
        "layer must be at least 0 and below 2, got 2",
    ),
    "no head_size_v": (
        "attend", LATENT, ValueError,
        "layout 'block slot latent' needs head_size_v, the part of axis latent that is V, got None",
    ),
    "large head_size_v": (
        "attend", LATENT | {"head_size_v": 17}, ValueError,
        "head_size_v must be from 1 to 16, kv_cache's axis latent, got 17",
    ),
    "another head_size_v": (
        "attend", {"head_size_v": 15}, ValueError, "head_size_v must be 16, as in the cache, got 15",
    ),
    "no head_size": (
        "gather", PACKED, ValueError, "layout 'block slot head k+v' needs head_size to split axis k+v, got None",
    ),
    "max_len": ("gather", {"max_len": -1}, ValueError, "max_len must be at least 0, got -1"),
    "dtype of results": (
        "gather", {"dtype": "int8"}, TypeError, f"dtype must be {FLOATS}, got int8",
    ),
    "backend": ("attend", {"backend": "cuda"}, ValueError, None),
}  # fmt: skip

CHOICES = {"jaxkv": "'triton', 'xla' or 'interpret'", "torchkv": "'triton', 'torch' or 'interpret'"}


def convert(arguments, one):
    return {
        name: tuple(map(one, x)) if isinstance(x, tuple) else one(x) if isinstance(x, np.ndarray) else x
        for name, x in arguments.items()
    }


def jax_call(op, arguments, **more):
    function = jaxkv.paged_attention if op == "attend" else jaxkv.gather_kv
    # JAX would make float32 of float64.
    return function(**(convert(arguments, lambda a: a if a.dtype == np.float64 else jnp.asarray(a)) | more))


def torch_call(op, arguments, **more):
    function = torchkv.paged_attention if op == "attend" else torchkv.gather_kv
    return function(**(convert(arguments, to_torch) | more))


def torch_fake(op, arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = convert(arguments, lambda a: mode.from_tensor(to_torch(a)))
        return (torchkv.paged_attention if op == "attend" else torchkv.gather_kv)(**fake)


def jax_jit(op, arguments):
    function = jaxkv.paged_attention if op == "attend" else jaxkv.gather_kv
    arrays = {n: x for n, x in arguments.items() if isinstance(x, (np.ndarray, tuple))}
    static = {n: x for n, x in arguments.items() if n not in arrays}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    with jax.enable_x64(True):
        return jax.jit(lambda x: function(**x, **static)).lower(shapes)


WAYS = {
    "jaxkv": jax_call,
    "jaxkv interpret": lambda op, x: jax_call(op, x, **({} if "backend" in x else {"backend": "interpret"})),
    "jaxkv jit": jax_jit,
    "torchkv": torch_call,
    "torchkv interpret": lambda op, x: torch_call(op, x, **({} if "backend" in x else {"backend": "interpret"})),
    "torchkv fake": torch_fake,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_calls(monkeypatch, bad, way):
    def launched(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(interpreter, "run", launched)
    monkeypatch.setattr(jaxkv._read, "read", launched)
    op, differs, kind, message = BAD[bad]
    arguments = (ATTEND if op == "attend" else GATHER) | differs
    with pytest.raises(kind) as error:
        WAYS[way](op, arguments)
    if message is None:
        message = f"backend must be None, {CHOICES[way.split()[0]]}, got 'cuda'"
    assert str(error.value) == message


NOTHING = [
    {"sliding_window": 2**31 - 1}, {"sliding_window": 2**31}, {"sliding_window": 2**63 - 1}, {"sliding_window": 2**70},
    {"soft_cap": 0}, {"soft_cap": 0.0}, {"soft_cap": -0.0}, {"soft_cap": np.float32(0)},
]  # fmt: skip


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("option", NOTHING, ids=str)
def test_windows_longer_than_any_sequence_and_caps_of_zero_have_no_effect(option, implementation):
    plain = make_read(np.random.default_rng(0), seq_lens=(5, 9), query_lens=(2, 3))
    case = replace(plain, options=plain.options | option)
    want, got = (CPU_IMPLEMENTATIONS[implementation](c) for c in (plain, case))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_has_no_effect_is_left_out_of_calls_through_torch_ops_too():
    case = make_read(np.random.default_rng(1), seq_lens=(5, 9))
    tensors = [to_torch(a) for a in (case.query, case.block_tables, case.seq_lens)]
    caches = [to_torch(c) for c in case.caches]

    def attend(window, cap):
        return torch.ops.torchkv.paged_attention(
            tensors[0], caches, *tensors[1:], None, None, True, window, cap, None, "auto", *(None,) * 7
        )[0]

    assert torch.equal(attend(2**40, 0.0), attend(None, None))


@pytest.mark.parametrize("run", [attend_jax, attend_torch])
def test_scalars_of_numpy_count_as_numbers(run):
    options = dict(scale=0.7, causal=True, sliding_window=4, soft_cap=2.0)
    kinds = dict(scale=np.float64, causal=np.bool_, sliding_window=np.uint8, soft_cap=np.float32)
    plain = make_read(np.random.default_rng(2), kv_cache_dtype="fp8", scales=(0.5, 2.0), **options)
    scalars = {n: kinds[n](v) for n, v in options.items()} | {"k_scale": np.float16(0.5), "v_scale": np.int64(2)}
    want, got = (run(c) for c in (plain, replace(plain, options=plain.options | scalars)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("op", ["attend", "gather"])
def test_triton_needs_a_gpu(op):
    arguments = (ATTEND if op == "attend" else GATHER) | {"backend": "triton"}
    for call in (jax_call, torch_call):
        with pytest.raises(ValueError, match="backend 'triton' needs a CUDA or ROCm device, got cpu"):
            call(op, arguments)


def test_devices():
    given = convert(ATTEND, to_torch)
    elsewhere = torch.zeros(3, dtype=torch.int32, device="meta")
    arguments = attention_arguments(given["query"], given["caches"], given["block_tables"], elsewhere)
    with pytest.raises(ValueError, match="seq_lens must be on device cpu, as key_cache, got meta"):
        torchkv._call.AttentionCall(*arguments).check()


def test_no_gradients():
    arguments = convert(ATTEND, jnp.asarray)

    def loss(query):
        return jaxkv.paged_attention(**(arguments | {"query": query})).sum()

    with pytest.raises(NotImplementedError, match="paged_attention is not differentiable"):
        jax.grad(loss)(arguments["query"])


# name: arguments that differ from a valid call, type, message
BAD_CACHES = {
    "blocks": ({"num_blocks": 0}, ValueError, "axis block must have a positive size, got 0"),
    "dtype": ({"dtype": "int32"}, TypeError, f"dtype must be {FLOATS}, the type of elements, got int32"),
    "format": (
        {"kv_cache_dtype": "int3"}, ValueError,
        f"kv_cache_dtype must be {FORMATS}, got 'int3'",
    ),
    "layers": (
        {"layout": "layer block slot head dim", "num_layers": None}, ValueError,
        "num_layers must be given for layout 'layer block slot head dim', got None",
    ),
    "layout": ({"layout": 5}, TypeError, "layout must be a pattern string or a CacheLayout, got 5"),
    "heads of MLA": (
        {"layout": "MLA"}, ValueError,
        "layout 'layer block slot latent' needs num_heads = 1 and head_size_v of at most head_size = 16 along axis "
        "latent, got 2 and 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", [jaxkv, torchkv], ids=["jax", "torch"])
@pytest.mark.parametrize("bad", BAD_CACHES)
def test_bad_caches(bad, module):
    differs, kind, message = BAD_CACHES[bad]
    arguments = dict(num_layers=2, num_blocks=6, block_size=4, num_heads=2, head_size=16) | differs
    with pytest.raises(kind) as error:
        module.PagedKVCache.create(**arguments)
    assert str(error.value) == message
