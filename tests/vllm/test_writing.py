"""torchkv.integrations.vllm: called as vLLM 0.33 calls its own functions, alone and put into a stand-in for vLLM."""

import inspect

import numpy as np
import pytest
import torch

import torchkv
from kvcore.oracle import write as reference
from tests.cases.arrays import from_torch
from tests.cases.vllm import (
    BLOCK_SIZE,
    BLOCKS,
    FUNCTIONS,
    HEAD_SIZE,
    HEADS,
    MODES,
    SIGNATURES,
    SLOTS,
    assert_bytes,
    halves,
    layer_cache,
    oracle,
    rows,
    scale_views,
    states,
    written_per_token_head,
)
from torchkv.integrations import vllm

BACKENDS = ("torch", "interpret")


# ---- what vLLM's call sites hand over


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_vllms(name):
    scope = {}
    exec(f"def {name}({SIGNATURES[FUNCTIONS[name]]}): pass", scope)
    wanted, got = (inspect.signature(f).parameters.values() for f in (scope[name], getattr(vllm, name)))
    assert [(p.name, p.default, p.kind) for p in got] == [(p.name, p.default, p.kind) for p in wanted]
    if name not in ("reshape_and_cache_flash", "concat_and_cache_mla"):  # torchkv's own, which can do more
        assert getattr(torchkv, name) is getattr(vllm, name)


# ---- writing


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_inc", "fp8_e5m2"])
def test_writing_into_halves_of_a_layers_cache(kv_cache_dtype, order, backend):
    dtype = torch.bfloat16
    if kv_cache_dtype.startswith("fp8"):
        dtype = torch.float8_e5m2 if "e5m2" in kv_cache_dtype else torch.float8_e4m3fn
    key, value = rows()
    scales = torch.tensor(0.37), torch.tensor(0.25)
    names = {"bfloat16": "auto", "fp8_inc": "fp8"}
    for function in (
        vllm.triton_reshape_and_cache_flash,
        vllm.reshape_and_cache_flash,
        torchkv.reshape_and_cache_flash,
    ):
        cache = layer_cache(2 * HEAD_SIZE, dtype, order)
        want = oracle(key, value, cache, names.get(kv_cache_dtype, kv_cache_dtype), (0.37, 0.25))
        function(key, value, *halves(cache), SLOTS, kv_cache_dtype, *scales)
        assert_bytes(halves(cache), want)
    if dtype != torch.bfloat16:
        cache = layer_cache(2 * HEAD_SIZE, dtype, order).view(torch.uint8)
        vllm.reshape_and_cache_flash(key, value, *halves(cache), SLOTS, kv_cache_dtype, *scales)
        assert_bytes(halves(cache), want)


def test_writing_head_major(backend):
    key, value = rows()
    key_cache = torch.full((BLOCKS, HEADS, HEAD_SIZE // 8, BLOCK_SIZE, 8), 7.0, dtype=torch.bfloat16)
    value_cache = torch.full((BLOCKS, HEADS, HEAD_SIZE, BLOCK_SIZE), 7.0, dtype=torch.bfloat16)
    want = [from_torch(c).copy() for c in (key_cache, value_cache)]
    reference.reshape_and_cache_flash(from_torch(key), from_torch(value), *want, SLOTS.numpy(), layout="HEAD_MAJOR")
    one = torch.ones(())
    vllm.triton_reshape_and_cache_flash(key, value, key_cache, value_cache, SLOTS, "auto", one, one, 0)
    assert_bytes((key_cache, value_cache), [w.view(np.uint8) for w in want])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "float16", "half", "fp8"])
def test_writing_different_head_sizes(kv_cache_dtype, backend):
    key, value = rows(torch.float16, head_size_v=16)
    dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8" else torch.float16
    one = torch.ones(1)
    for function in (vllm.triton_reshape_and_cache_flash_diffkv, torchkv.reshape_and_cache_flash_diffkv):
        cache = layer_cache(HEAD_SIZE + 16, dtype)
        want = from_torch(cache.transpose(1, 2)).copy()
        reference.reshape_and_cache_flash_diffkv(
            from_torch(key), from_torch(value), want, SLOTS.numpy(), "fp8" if kv_cache_dtype == "fp8" else "auto"
        )
        function(key, value, cache.transpose(1, 2), SLOTS, kv_cache_dtype, one, one)
        assert_bytes([cache.transpose(1, 2)], [want.view(np.uint8)])


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("name", MODES)
def test_writing_scales_into_the_padding(name, order, backend):
    key, value, cache, _ = written_per_token_head(name, order)
    caches = [np.full((BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE), 0x55, np.uint8) for _ in range(2)]
    wanted_scales = [np.ones((BLOCKS, BLOCK_SIZE, HEADS), np.float32) for _ in range(2)]
    reference.reshape_and_cache_flash_per_token_head_quant(
        from_torch(key), from_torch(value), *caches, *wanted_scales, SLOTS.numpy(), name
    )
    for half, elements, scale in zip(halves(cache), caches, wanted_scales, strict=True):
        np.testing.assert_array_equal(half[..., :HEAD_SIZE].contiguous().view(torch.uint8).numpy(), elements)
        np.testing.assert_array_equal(half[..., HEAD_SIZE:].contiguous().view(torch.float32)[..., 0].numpy(), scale)


@pytest.mark.parametrize(("name", "mode"), [
    ("int8", "int8_per_token_head"), ("fp8", "fp8_per_token_head"), ("int8", 2), ("fp8", 3),
])  # fmt: skip
def test_the_mode_by_other_names(name, mode):
    *_, want, _ = written_per_token_head(name)
    *_, cache, _ = written_per_token_head(name, mode=mode)
    assert torch.equal(cache, want)
    cache = layer_cache(2 * (HEAD_SIZE + 4), torch.int8)
    scales = scale_views(cache)
    for s in scales:
        s.fill_(1.0)
    vllm.triton_reshape_and_cache_flash_per_token_head_quant(
        *rows(), *halves(cache, MODES[name][1]), *scales, SLOTS, None
    )
    assert torch.equal(cache, want)
    plain = [torch.full((BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE), 0x55, dtype=torch.uint8) for _ in range(2)]
    scale_caches = [torch.ones(BLOCKS, BLOCK_SIZE, HEADS) for _ in range(2)]
    torchkv.reshape_and_cache_flash_per_token_head_quant(
        *rows(), *plain, *scale_caches, SLOTS, f"{name}_per_token_head"
    )
    for half, elements in zip(halves(want), plain, strict=True):
        assert torch.equal(half[..., :HEAD_SIZE].view(torch.uint8), elements)


def test_vllms_own_bytes_are_near():
    """vLLM's arithmetic: what it would write reads as the same numbers, but for rounding."""
    key, _, cache, (k_scales, _) = written_per_token_head("int8")
    k = halves(cache)[0][..., :HEAD_SIZE].float()
    x = key[: len(SLOTS)].float()
    scale = (x.abs().amax(-1) / 127).clamp_min(1e-6)
    stored = x * (1 / scale)[..., None]
    theirs = (stored + torch.where(stored >= 0, 0.5, -0.5)).trunc().clamp(-128, 127)
    for token, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            at = divmod(slot, BLOCK_SIZE)
            torch.testing.assert_close(k_scales[at], scale[token])
            assert (k[at] - theirs[token]).abs().max() <= 1


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("skip_scale", [False, True])
def test_writing_latent_rows(kv_cache_dtype, skip_scale, backend):
    torch.manual_seed(2)
    kv_c, k_pe = torch.randn(8, 512, dtype=torch.bfloat16), torch.randn(8, 1, 64, dtype=torch.bfloat16)
    names = {"bfloat16": "auto"}
    units = 656 if kv_cache_dtype == "fp8_ds_mla" else 576
    dtype = torch.uint8 if "fp8" in kv_cache_dtype else torch.bfloat16
    for function in (vllm.concat_and_cache_mla, torchkv.concat_and_cache_mla):
        for rope in (k_pe.squeeze(1), k_pe.squeeze(1)[:, :0]):
            width = units if "ds" in kv_cache_dtype else 512 + rope.shape[1]
            cache = torch.full((BLOCKS, BLOCK_SIZE, width), 0x55, dtype=dtype)
            want = from_torch(cache).copy()
            reference.concat_and_cache_mla(
                from_torch(kv_c)[:6], from_torch(rope)[:6], want, SLOTS.numpy(),
                names.get(kv_cache_dtype, kv_cache_dtype), None if skip_scale or "ds" in kv_cache_dtype else 0.37,
            )  # fmt: skip
            function(
                kv_c, rope, cache, SLOTS.flatten(), kv_cache_dtype=kv_cache_dtype,
                scale=torch.tensor(torch.nan if skip_scale else 0.37), skip_scale=skip_scale,
            )  # fmt: skip
            assert_bytes([cache], [want.view(np.uint8)])


# ---- merging


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tokens", [None, 6, 4, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging(dtype, tokens, in_place):
    prefix, prefix_lse, suffix, suffix_lse = states(dtype)
    n = 6 if tokens is None else tokens
    want, want_lse = torchkv.merge_attention(
        torch.stack([prefix, suffix])[:, :n], torch.stack([prefix_lse.T, suffix_lse.T])[:, :n]
    )
    output = prefix if in_place else torch.full_like(suffix, 7)
    output_lse = prefix_lse if in_place else torch.full((4, 6), 7.0)
    result = vllm.merge_attn_states(
        output=output, output_lse=output_lse, prefix_output=prefix, prefix_lse=prefix_lse, suffix_output=suffix,
        suffix_lse=suffix_lse, prefill_tokens_with_context=tokens,
    )  # fmt: skip
    assert result is None
    assert torch.equal(output, torch.cat([want, suffix[n:]]))
    assert torch.equal(output_lse, torch.cat([want_lse.T, suffix_lse[:, n:]], dim=1))
    prefix, prefix_lse, suffix, suffix_lse = states(dtype)
    output = torch.empty(6, 4, 16)
    vllm.merge_attn_states(output, prefix, prefix_lse, suffix, suffix_lse, None, tokens)
    torch.testing.assert_close(output.to(dtype), torch.cat([want, suffix[n:]]))


@pytest.mark.parametrize("name", ["prefix_output", "prefix_lse", "suffix_output", "suffix_lse"])
def test_parts_that_do_not_fit_are_refused_and_nothing_is_written(name):
    names = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse")
    parts = dict(zip(names, states(torch.float32), strict=True))
    parts[name] = parts[name].transpose(0, 1).contiguous()
    output = torch.full((6, 4, 16), 7.0)
    with pytest.raises(ValueError, match=f"{name} must have shape .* as output, got"):
        vllm.merge_attn_states(output, **parts, prefill_tokens_with_context=4)
    assert (output == 7).all()
