"""vLLM's attention, as its backends call it."""

import numpy as np
import pytest
import torch

import torchkv
from kvcore.oracle import write as reference
from tests.cases.arrays import from_torch
from tests.cases.gpu import DEVICE
from tests.cases.vllm import (
    BLOCK_SIZE,
    BLOCKS,
    GROUP,
    HEAD_SIZE,
    HEADS,
    MODES,
    KVQuantMode,
    attend,
    attention_arguments,
    filled_cache,
    halves,
    scale_views,
    written_per_token_head,
)
from torchkv.integrations import vllm

WINDOWS = [((-1, -1), None), (None, None), ((5, 0), 6), ((0, 0), 1)]


@pytest.mark.parametrize(("window_size", "sliding_window"), WINDOWS)
def test_attention_as_a_backend_calls_it(window_size, sliding_window, backend):
    cache, key, value, slots = filled_cache()
    k, v = halves(cache)
    torchkv.reshape_and_cache_flash(key.bfloat16(), value.bfloat16(), k, v, slots)
    arguments = attention_arguments() | {"window_size": window_size}
    scale = torch.tensor(3.0).expand(4, HEADS)  # not read: there is no quantisation
    arguments |= {"k_descale": scale, "v_descale": scale}
    sinks = torch.randn(HEADS * GROUP)
    hints = {"seq_threshold_3D": 128, "num_par_softmax_segments": 16, "softmax_segm_output": torch.empty(1)}
    result = vllm.unified_attention(
        k=k, v=v, **arguments, **hints, alibi_slopes=None, use_alibi_sqrt=False, sinks=sinks, output_scale=None,
        mm_prefix_range=None, rswa_prefix_lens=None, rswa_window=None, kv_quant_mode=KVQuantMode.NONE,
        k_scale_cache=None, v_scale_cache=None, chunk_lookback=-1, use_td=False, mm_prefix_clamp_sliding_window=False,
    )  # fmt: skip
    assert result is None
    want = attend(arguments, k, v, sliding_window=sliding_window, sinks=sinks)
    assert torch.equal(arguments["out"], want)
    assert want[:6].abs().sum() > 1
    assert (arguments["out"]._base[8 * HEADS * GROUP * HEAD_SIZE // arguments["out"]._base.shape[-1] :] == 7).all()


@pytest.mark.parametrize("expanded", ["one element", "a head each", "rows", "none"])
def test_attention_over_fp8(expanded, backend):
    cache, key, value, slots = filled_cache(torch.float8_e4m3fn)
    k, v = halves(cache)
    scales = [torch.tensor(0.05), torch.tensor(0.04)] if expanded == "one element" else [
        torch.tensor([0.05, 0.02]), torch.tensor([0.04, 0.03]),
    ]  # fmt: skip
    scales = [None, None] if expanded == "none" else scales
    torchkv.reshape_and_cache_flash(key, value, k, v, slots, "fp8", *scales)
    arguments = attention_arguments()
    given = [None if s is None else s.reshape(1, -1).expand(4, HEADS) for s in scales]
    if expanded == "rows":
        given = [None if s is None else s[:1] for s in given]
    arguments |= {"k_descale": given[0], "v_descale": given[1]}
    vllm.unified_attention(k=k, v=v, **arguments, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    want = attend(arguments, k, v, kv_cache_dtype="fp8", k_scale=scales[0], v_scale=scales[1])
    assert torch.equal(arguments["out"], want)
    assert want[:6].abs().sum() > 1


@pytest.mark.parametrize("name", MODES)
def test_attention_over_scales_in_the_padding(name, backend):
    mode, dtype = MODES[name]
    cache, key, value, slots = filled_cache(padding=4)
    scales = scale_views(cache)
    k, v = halves(cache, dtype)
    vllm.triton_reshape_and_cache_flash_per_token_head_quant(key, value, k, v, *scales, slots, mode)
    arguments = attention_arguments()
    vllm.unified_attention(k=k, v=v, **arguments, kv_quant_mode=mode, k_scale_cache=scales[0], v_scale_cache=scales[1])
    want = attend(
        arguments, k[..., :HEAD_SIZE], v[..., :HEAD_SIZE], kv_cache_dtype=name, k_scale=scales[0], v_scale=scales[1]
    )
    assert torch.equal(arguments["out"], want)
    plain = torch.empty(2, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    torchkv.reshape_and_cache_flash(key.bfloat16(), value.bfloat16(), *plain, slots)
    torch.testing.assert_close(want, attend(arguments, *plain), rtol=0.1, atol=0.1)


def test_attention_into_tensors_with_gaps_and_of_another_dtype(backend):
    cache, key, value, slots = filled_cache()
    k, v = halves(cache)
    torchkv.reshape_and_cache_flash(key.bfloat16(), value.bfloat16(), k, v, slots)
    arguments = attention_arguments()
    want = attend(arguments, k, v, causal=False, soft_cap=4.0)
    memory = torch.full((8, HEADS * GROUP, 2 * HEAD_SIZE), 7.0)
    for out in (memory[..., :HEAD_SIZE], memory.bfloat16()[..., :HEAD_SIZE], torch.empty(want.shape)):
        vllm.unified_attention(k=k, v=v, **arguments | {"out": out, "causal": False, "softcap": 4.0})
        assert torch.equal(out.bfloat16(), want)
    assert (memory[..., HEAD_SIZE:] == 7).all()
    longer = torch.cat([arguments["block_table"], torch.full((3, 4), 99, dtype=torch.int32)])
    vllm.unified_attention(k=k, v=v, **arguments | {"block_table": longer, "causal": False, "softcap": 4.0})
    assert torch.equal(arguments["out"], want)


@pytest.mark.parametrize("name", MODES)
def test_attention_needs_both_scale_caches_and_takes_names_of_modes(name):
    _, _, cache, (k_scales, v_scales) = written_per_token_head(name)
    k, v = halves(cache, MODES[name][1])
    arguments = attention_arguments()
    for scales, missing in (((None, v_scales), "k_scale_cache"), ((k_scales, None), "v_scale_cache")):
        with pytest.raises(ValueError, match=f"^{missing} must be given with the scales of tokens and heads"):
            vllm.unified_attention(
                k=k, v=v, **arguments, kv_quant_mode=MODES[name][0], k_scale_cache=scales[0], v_scale_cache=scales[1]
            )
    assert (arguments["out"] == 7).all()
    outs = []
    for mode in (MODES[name][0], f"{name}_per_token_head"):
        arguments = attention_arguments()
        vllm.unified_attention(
            k=k, v=v, **arguments, kv_quant_mode=mode, k_scale_cache=k_scales, v_scale_cache=v_scales
        )
        outs.append(arguments["out"])
    assert torch.equal(*outs)
    with pytest.raises(vllm.UnsupportedError, match="got int4_per_token_head: vLLM's int4 is rotated"):
        vllm.unified_attention(k=k, v=v, **attention_arguments(), kv_quant_mode="int4_per_token_head")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODES)
def test_a_padded_cache_on_a_gpu(name):
    mode, dtype = MODES[name]
    cache, key, value, slots = filled_cache(padding=4)
    there = cache.to(DEVICE)
    for c, device in ((cache, "cpu"), (there, DEVICE)):
        vllm.triton_reshape_and_cache_flash_per_token_head_quant(
            key.to(device), value.to(device), *halves(c, dtype), *scale_views(c), slots.to(device), mode
        )
    assert torch.equal(there.cpu(), cache)
    arguments = attention_arguments()
    on_gpu = {n: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    for c, given in ((cache, arguments), (there, on_gpu)):
        k, v = halves(c, dtype)
        scales = scale_views(c)
        vllm.unified_attention(k=k, v=v, **given, kv_quant_mode=mode, k_scale_cache=scales[0], v_scale_cache=scales[1])
    assert not (on_gpu["out"] == 7).any()
    torch.testing.assert_close(on_gpu["out"].cpu(), arguments["out"], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_rows_of_fp8_ds_mla_on_a_gpu():
    torch.manual_seed(2)
    kv_c = torch.randn(8, 512, dtype=torch.bfloat16) * torch.logspace(-6, 6, 8).bfloat16()[:, None]
    kv_c[3, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 1])
    kv_c[4, 128] = torch.nan
    for width in (64, 0):
        k_pe = torch.randn(8, 64, dtype=torch.bfloat16)[:, :width]
        want = np.full((2, BLOCK_SIZE, 656), 0x55, np.uint8)
        slots = torch.tensor([3, 9, 0, 15, 4, 5, 11, 12])
        reference.concat_and_cache_mla(from_torch(kv_c), from_torch(k_pe), want, slots.numpy(), "fp8_ds_mla")
        cache = torch.full((2, BLOCK_SIZE, 656), 0x55, dtype=torch.uint8, device=DEVICE)
        scale = torch.ones((), device=DEVICE)
        vllm.concat_and_cache_mla(
            kv_c.to(DEVICE), k_pe.to(DEVICE), cache, slots.to(DEVICE), kv_cache_dtype="fp8_ds_mla", scale=scale
        )
        np.testing.assert_array_equal(cache.cpu().numpy(), want)
