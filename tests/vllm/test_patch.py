"""What torchkv lacks goes to vLLM's own functions, or is refused; never ignored."""

import enum
import inspect
import sys
import types

import pytest
import torch

import torchkv
from tests.cases.vllm import (
    BLOCK_SIZE,
    BLOCKS,
    FUNCTIONS,
    HEAD_SIZE,
    HEADS,
    SLOTS,
    KVQuantMode,
    assert_bytes,
    attention_arguments,
    bytes_of,
    filled_cache,
    halves,
    layer_cache,
    oracle,
    rows,
    states,
)
from torchkv.integrations import vllm

LACKING = {
    "alibi_slopes": (torch.ones(4), "alibi_slopes must be None, got a tensor of shape (4,)"),
    "qq_bias": (torch.ones(4, 4), "qq_bias must be None, got a tensor of shape (4, 4)"),
    "output_scale": (torch.ones(1), "output_scale must be None, got a tensor of shape (1,)"),
    "q": (
        torch.ones(8, 4, HEAD_SIZE).to(torch.float8_e4m3fn),  # as vLLM's layers quantise it on CUDA
        "q must have dtype float32, bfloat16 or float16, got float8_e4m3fn",
    ),
    "out": (
        torch.ones(8, 4, HEAD_SIZE).to(torch.float8_e4m3fn),
        "out must have dtype float32, bfloat16 or float16, got float8_e4m3fn",
    ),
    "q_descale": (torch.ones(1), "q_descale must be None, got a tensor of shape (1,)"),
    "mm_prefix_range": (torch.ones(4, 1, 2), "mm_prefix_range must be None, got a tensor of shape (4, 1, 2)"),
    "causal": (torch.ones(4), "causal must be True or False, got a tensor of shape (4,)"),
    "window_size": ((3, 3), "window_size must be (left, 0) or (-1, -1), got (3, 3)"),
    "kv_quant_mode": (
        KVQuantMode.INT4_PER_TOKEN_HEAD,
        "kv_quant_mode must be INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD, got INT4_PER_TOKEN_HEAD: vLLM's int4 is "
        "rotated and has zero points, which torchkv's has not",
    ),
    "k_descale": (
        torch.rand(4, HEADS), "k_descale must be one row, expanded to all sequences, got strides (2, 1)",
    ),
}  # fmt: skip


TOGETHER = {
    "rswa": (
        {"rswa_window": 4, "rswa_prefix_lens": torch.ones(4)},
        "rswa_window must be None where rswa_prefix_lens is given, got 4",
    ),
    "chunks": ({"window_size": (7, 0), "chunk_lookback": 1}, "chunk_lookback must be -1 with a window, got 1"),
    "two sides": ({"window_size": (7, 0), "causal": False}, "causal must be True with a window, got False"),
    "another window": ({"window_size": (-1, 0)}, "window_size must be (left, 0) or (-1, -1), got (-1, 0)"),
    "another mode": (
        {"kv_quant_mode": KVQuantMode.NVFP4},
        "kv_quant_mode must be INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD, got NVFP4",
    ),
}


def lacking_attention():
    yield from (({name: argument}, message) for name, (argument, message) in LACKING.items())
    yield from TOGETHER.values()


def lacking_calls():
    """Functions, arguments that they lack something for, and what they say."""
    _, key, value, _ = filled_cache()
    k, v = (torch.zeros(BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE) for _ in range(2))
    arguments = attention_arguments(torch.float32)
    for changes, message in lacking_attention():
        more = {"kv_quant_mode": KVQuantMode.FP8_PER_TENSOR} if "k_descale" in changes else {}
        yield "unified_attention", {"k": k, "v": v, **arguments, **more, **changes}, message
    one = torch.ones(())
    write = {
        "key": key, "value": value, "key_cache": k, "value_cache": v, "slot_mapping": SLOTS, "kv_cache_dtype": "auto",
        "k_scale": one, "v_scale": one,
    }  # fmt: skip
    yield (
        "triton_reshape_and_cache_flash",
        write | {"interleaved_v_pack_factor": 8},
        "interleaved_v_pack_factor must be 0, got 8",
    )
    for name in ("reshape_and_cache_flash", "triton_reshape_and_cache_flash"):
        message = "kv_cache_dtype must be a format of torchkv, got 'turboquant_4bit_nc'"
        yield name, write | {"kv_cache_dtype": "turboquant_4bit_nc"}, message
        yield (
            name,
            {n: a.to("meta") if n == "key_cache" else a for n, a in write.items()},
            ("tensors must be on a CPU, CUDA or ROCm device, got meta"),
        )
    yield (
        "triton_reshape_and_cache_flash",
        write | {"kv_cache_dtype": "fp8_e5m2", "key_cache": k.to(torch.uint8)},
        (
            "kv_cache_dtype must not be 'fp8_e5m2' for caches of uint8, where vLLM's kernel stores e4m3; "
            "got a cache of uint8"
        ),
    )
    scaled = {
        "key": key, "value": value, "key_cache": k.to(torch.uint8), "value_cache": v.to(torch.uint8),
        "k_scale_cache": k[..., 0], "v_scale_cache": v[..., 0], "slot_mapping": SLOTS,
    }  # fmt: skip
    name = "triton_reshape_and_cache_flash_per_token_head_quant"
    for mode in (KVQuantMode.INT4_PER_TOKEN_HEAD, 4, "int4_per_token_head"):
        said = mode.name if isinstance(mode, enum.Enum) else mode
        yield (
            name,
            scaled | {"kv_quant_mode": mode},
            (
                f"kv_quant_mode must be INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD, got {said}: vLLM's int4 is rotated "
                "and has zero points, which torchkv's has not"
            ),
        )
    latent = {
        "kv_c": torch.ones(6, 512), "k_pe": torch.ones(6, 64), "kv_cache": torch.zeros(2, 8, 432, dtype=torch.uint8),
        "slot_mapping": SLOTS, "kv_cache_dtype": "nvfp4_ds_mla", "scale": one,
    }  # fmt: skip
    yield "concat_and_cache_mla", latent, "kv_cache_dtype must be a format of torchkv, got 'nvfp4_ds_mla'"
    names = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse")
    merge = dict(zip(names, states(), strict=True)) | {"output": torch.zeros(6, 4, 16), "output_scale": one}
    yield "merge_attn_states", merge, "output_scale must be None, got a tensor of shape ()"
    merge |= {"output": torch.zeros(6, 4, 16).to(torch.float8_e4m3fn), "output_scale": None}
    yield "merge_attn_states", merge, "output must have dtype float32, bfloat16 or float16, got float8_e4m3fn"


def test_what_is_lacking_is_refused_and_nothing_is_written():
    for name, arguments, message in lacking_calls():
        before = {n: a.clone() for n, a in arguments.items() if isinstance(a, torch.Tensor) and not a.is_meta}
        with pytest.raises(vllm.UnsupportedError) as error:
            getattr(vllm, name)(**arguments)
        assert str(error.value) == message
        assert isinstance(error.value, ValueError)
        for n, a in before.items():
            assert torch.equal(*(bytes_of(x.flatten()) for x in (arguments[n], a))), n


def test_names_of_dtypes_must_be_the_caches():
    key, value = rows()
    caches = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    with pytest.raises(TypeError) as error:
        torchkv.reshape_and_cache_flash(key, value, *caches, SLOTS, "half")
    assert str(error.value) == "key_cache must have dtype float16 for kv_cache_dtype 'half', got bfloat16"
    with pytest.raises(ValueError, match=r"^kv_cache_dtype must be 'auto', .*, got \['half'\]$"):
        torchkv.reshape_and_cache_flash(key, value, *caches, SLOTS, ["half"])  # type: ignore[arg-type]
    with pytest.raises(TypeError) as error:
        torchkv.concat_and_cache_mla(key[:, 0], value[:, 0], caches[0, ..., 0, :], SLOTS, "float")
    assert str(error.value) == "kv_cache must have dtype float32 for kv_cache_dtype 'float', got bfloat16"


def test_patching(stand_in):
    homes = {name: f"vllm.{where.rpartition('.')[0]}" for name, where in FUNCTIONS.items()}
    theirs = {name: getattr(stand_in.backend, name) for name in FUNCTIONS}
    undo = vllm.patch()
    for name, home in homes.items():
        patched = getattr(stand_in.modules[home], name)
        assert patched is not theirs[name]
        assert getattr(stand_in.backend, name) is patched
        assert inspect.signature(patched) == inspect.signature(theirs[name])
    assert stand_in.backend.renamed is stand_in.backend.unified_attention

    with vllm.patch():  # once more is nothing new
        assert stand_in.backend.unified_attention.__wrapped__ is theirs["unified_attention"]
    assert stand_in.backend.unified_attention is not theirs["unified_attention"]

    key, value = rows()
    cache = layer_cache(2 * HEAD_SIZE)
    want = oracle(key, value, cache)
    one = torch.ones(())
    stand_in.backend.triton_reshape_and_cache_flash(key, value, *halves(cache), SLOTS, "auto", one, one)
    assert_bytes(halves(cache), want)
    k, v = halves(filled_cache()[0].zero_())
    arguments = attention_arguments()
    assert stand_in.backend.unified_attention(k=k, v=v, **arguments) is None
    assert not (arguments["out"] == 7).any()
    assert stand_in.calls == []

    undo.close()
    assert {name: getattr(stand_in.backend, name) for name in FUNCTIONS} == theirs
    assert stand_in.backend.renamed is theirs["unified_attention"]
    assert all(getattr(stand_in.modules[home], name) is theirs[name] for name, home in homes.items())


def test_undoing_a_patch_in_modules_that_came_later(stand_in, monkeypatch):
    theirs = stand_in.backend.unified_attention
    undo = vllm.patch()
    later = types.ModuleType("vllm.later")
    later.attention = stand_in.backend.unified_attention  # from … import unified_attention as attention
    monkeypatch.setitem(sys.modules, "vllm.later", later)
    monkeypatch.setitem(sys.modules, "vllm.absent", None)
    assert later.attention is not theirs
    undo.close()
    assert later.attention is theirs


def test_a_patched_vllm_calls_its_own_function_where_torchkv_lacks_something(stand_in):
    with vllm.patch():
        for name, arguments, _ in lacking_calls():
            assert getattr(stand_in.backend, name)(**arguments) == "from vLLM"
            called, given = stand_in.calls.pop()
            assert called == name
            assert all(given[n] is a for n, a in arguments.items())
        # What is wrong is wrong with both.
        k, v = halves(filled_cache()[0])
        with pytest.raises(ValueError, match=r"^query must have shape"):
            stand_in.backend.unified_attention(k=k[..., :16], v=v[..., :16], **attention_arguments())
    assert stand_in.calls == []


def test_another_vllm_is_not_patched(stand_in):
    home = stand_in.modules["vllm.v1.attention.ops.merge_attn_states"]
    theirs = {name: getattr(stand_in.backend, name) for name in FUNCTIONS}
    home.merge_attn_states = lambda output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None: None
    with pytest.raises(RuntimeError) as error:
        vllm.patch()
    assert str(error.value) == (
        "vllm.v1.attention.ops.merge_attn_states.merge_attn_states must have the parameters of vLLM 0.33, output, "
        "prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, prefill_tokens_with_context, output_scale; "
        "got output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse"
    )
    assert {name: getattr(stand_in.backend, name) for name in FUNCTIONS} == theirs


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError):
        vllm.patch()
