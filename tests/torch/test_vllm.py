"""torchkv.integrations.vllm: called as vLLM 0.33 calls its own functions, alone and put into a stand-in for vLLM."""

import enum
import inspect
import sys
import types

import numpy as np
import pytest
import torch

import torchkv
from kvcore.oracle import write as reference
from tests.cases.arrays import from_torch
from tests.cases.gpu import DEVICE
from torchkv import mla, quantize, read, write
from torchkv.integrations import vllm

BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, GROUP = 7, 8, 2, 32, 2
SLOTS = torch.tensor([3, -1, 40, 41, 55, 0])


class KVQuantMode(enum.IntEnum):
    """vLLM's, as far as it goes here."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5


SIGNATURES = {  # where vLLM 0.33 has a function, and its parameters
    "_custom_ops.reshape_and_cache_flash": (
        "key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale"
    ),
    "_custom_ops.concat_and_cache_mla": "kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False",
    "v1.attention.ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash": (
        "key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale, "
        "interleaved_v_pack_factor=0"
    ),
    "v1.attention.ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash_diffkv": (
        "key, value, kv_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale"
    ),
    "v1.attention.ops.triton_reshape_and_cache_flash.triton_reshape_and_cache_flash_per_token_head_quant": (
        "key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, kv_quant_mode"
    ),
    "v1.attention.ops.triton_unified_attention.unified_attention": (
        "q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size, "
        "block_table, softcap, q_descale, k_descale, v_descale, seq_threshold_3D=None, num_par_softmax_segments=None, "
        "softmax_segm_output=None, softmax_segm_max=None, softmax_segm_expsum=None, alibi_slopes=None, "
        "output_scale=None, qq_bias=None, sinks=None, mm_prefix_range=None, rswa_prefix_lens=None, rswa_window=None, "
        "use_alibi_sqrt=False, kv_quant_mode=0, k_scale_cache=None, v_scale_cache=None, chunk_lookback=-1, "
        "use_td=False, mm_prefix_clamp_sliding_window=False"
    ),
    "v1.attention.ops.merge_attn_states.merge_attn_states": (
        "output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None, "
        "prefill_tokens_with_context=None, output_scale=None"
    ),
}
FUNCTIONS = {where.rpartition(".")[2]: where for where in SIGNATURES}
BACKENDS = ("torch", "interpret")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs what the functions call with this backend, though vLLM's parameters have no place for it."""
    for module in (write, quantize, mla, read):
        for name in vars(module).keys() & {*torchkv.__all__} - {"CacheLayout"}:
            whole = getattr(module, name)

            def with_backend(*args, _whole=whole, **options):
                return _whole(*args, **options, backend=request.param)

            monkeypatch.setattr(module, name, with_backend)
    return request.param


@pytest.fixture
def stand_in(monkeypatch):
    """A vLLM of nothing but functions that note their calls, and a backend that has imported them."""
    calls = []

    def function(name, parameters):
        scope = {"calls": calls, "name": name}
        names = [p.strip().partition("=")[0] for p in parameters.split(",")]
        body = f"calls.append((name, dict({', '.join(f'{n}={n}' for n in names)})))"
        exec(f"def {name}({parameters}):\n    {body}\n    return 'from vLLM'", scope)
        return scope[name]

    modules = {"vllm": types.ModuleType("vllm"), "vllm.v1.attention.backends.triton_attn": types.ModuleType("backend")}
    for where, parameters in SIGNATURES.items():
        home, _, name = where.rpartition(".")
        module = modules.setdefault(f"vllm.{home}", types.ModuleType(f"vllm.{home}"))
        setattr(module, name, function(name, parameters))
    backend = modules["vllm.v1.attention.backends.triton_attn"]
    for where in SIGNATURES:
        home, _, name = where.rpartition(".")
        setattr(backend, name, getattr(modules[f"vllm.{home}"], name))
    backend.renamed = backend.unified_attention  # from … import unified_attention as renamed
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(modules=modules, backend=backend, calls=calls)


# ---- what vLLM's call sites hand over


def rows(dtype=torch.bfloat16, tokens=8, head_size_v=HEAD_SIZE):
    """Slices of a fused projection, with more rows than slots."""
    torch.manual_seed(1)
    fused = torch.randn(tokens, HEADS * (HEAD_SIZE + head_size_v), dtype=dtype)
    key, value = fused.split([HEADS * HEAD_SIZE, HEADS * head_size_v], dim=-1)
    return key.view(tokens, HEADS, HEAD_SIZE), value.view(tokens, HEADS, head_size_v)


def layer_cache(content, dtype=torch.bfloat16, order="HND"):
    """A layer's cache as vLLM has it: `[blocks, heads, slots, content]`, in memory also `[blocks, slots, heads, …]`."""
    if order == "HND":
        cache = torch.empty(BLOCKS, HEADS, BLOCK_SIZE, content, dtype=torch.uint8 if dtype.itemsize == 1 else dtype)
    else:
        cache = torch.empty(
            BLOCKS, BLOCK_SIZE, HEADS, content, dtype=torch.uint8 if dtype.itemsize == 1 else dtype
        ).transpose(1, 2)
    cache.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).fill_(0x55)
    return cache.view(dtype) if dtype.itemsize == 1 else cache


def halves(cache, dtype=None):
    """K's and V's half, `[blocks, slots, heads, dim]`, as views of fp8 where they hold that."""
    k, v = cache.transpose(1, 2).split(cache.shape[-1] // 2, dim=-1)
    return (k, v) if dtype is None else (k.view(dtype), v.view(dtype))


def scale_views(cache):
    """float32 views of the padding of 4 bytes after each head's elements."""
    half = cache.shape[-1] // 2
    words = torch.tensor([], dtype=torch.float32, device=cache.device).set_(cache.untyped_storage())
    block, head, slot, _ = (s * cache.element_size() // 4 for s in cache.stride())
    first = cache.storage_offset() * cache.element_size() // 4
    return tuple(
        torch.as_strided(words, (BLOCKS, BLOCK_SIZE, HEADS), (block, slot, head), first + (i * half + half - 4) // 4)
        for i in range(2)
    )


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def oracle(key, value, cache, kv_cache_dtype="auto", scales=(None, None)):
    """What cache holds after the write: the oracle's answer, in the order `[blocks, slots, heads, …]`."""
    caches = [from_torch(c).copy() for c in halves(cache)]
    reference.reshape_and_cache_flash(
        from_torch(key), from_torch(value), *caches, SLOTS.numpy(), kv_cache_dtype, *scales, layout="NHD"
    )
    return [c.view(np.uint8) for c in caches]


def assert_bytes(tensors, want):
    for got, w in zip(tensors, want, strict=True):
        np.testing.assert_array_equal(bytes_of(got).numpy(), w)


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


MODES = {
    "int8": (KVQuantMode.INT8_PER_TOKEN_HEAD, torch.int8),
    "fp8": (KVQuantMode.FP8_PER_TOKEN_HEAD, torch.float8_e4m3fn),
}


def written_per_token_head(name, order="HND", mode=None):
    """A padded cache with its scales in the padding, and its halves."""
    key, value = rows()
    cache = layer_cache(2 * (HEAD_SIZE + 4), torch.int8, order)
    scales = scale_views(cache)
    for s in scales:
        s.fill_(1.0)
    vllm.triton_reshape_and_cache_flash_per_token_head_quant(
        key,
        value,
        *halves(cache, MODES[name][1]),
        *scales,
        SLOTS,
        kv_quant_mode=MODES[name][0] if mode is None else mode,
    )
    return key, value, cache, scales


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


# ---- reading


def attention_arguments(dtype=torch.bfloat16, query_lens=(1, 3, 0, 2), lengths=(9, 17, 4, 3)):
    """What a forward pass hands over, padded as for a CUDA graph: rows after the last sequence's, blocks of -1."""
    torch.manual_seed(3)
    tokens = sum(query_lens) + 2
    order = iter(torch.randperm(BLOCKS).tolist())
    table = torch.full((len(lengths), 4), -1, dtype=torch.int32)
    for i, length in enumerate(lengths):
        for j in range(-(-length // BLOCK_SIZE)):
            table[i, j] = next(order)
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    query = torch.randn(tokens, HEADS * GROUP * HEAD_SIZE, dtype=dtype).view(tokens, HEADS * GROUP, HEAD_SIZE)
    output = torch.full((tokens + 3, HEADS * GROUP * HEAD_SIZE), 7.0, dtype=dtype)
    output = output.view(tokens + 3, HEADS * GROUP, HEAD_SIZE)
    return {
        "q": query, "out": output[:tokens], "cu_seqlens_q": starts, "max_seqlen_q": max(query_lens),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32), "max_seqlen_k": max(lengths), "softmax_scale": 0.2,
        "causal": True, "window_size": (-1, -1), "block_table": table, "softcap": 0, "q_descale": None,
        "k_descale": None, "v_descale": None,
    }  # fmt: skip


def filled_cache(dtype=torch.bfloat16, padding=0):
    cache = layer_cache(2 * (HEAD_SIZE + padding), torch.int8 if padding else dtype)
    torch.manual_seed(4)
    key, value = torch.randn(2, BLOCKS * BLOCK_SIZE, HEADS, HEAD_SIZE)
    slots = torch.arange(BLOCKS * BLOCK_SIZE)
    return cache, key, value, slots


def attend(arguments, k, v, **options):
    """The same by torchkv's own names, with the same backend."""
    a = arguments
    return read.paged_attention(
        a["q"], (k, v), a["block_table"], a["seqused_k"], query_start_loc=a["cu_seqlens_q"], scale=a["softmax_scale"],
        **options,
    )  # fmt: skip


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


# ---- merging


def states(dtype=torch.bfloat16, tokens=6, heads=4, dim=16):
    torch.manual_seed(5)
    prefix, suffix = torch.randn(2, tokens, heads, 2 * dim, dtype=dtype)[..., :dim]  # strided, as padded backends give
    prefix_lse, suffix_lse = torch.randn(heads, tokens), torch.randn(tokens, heads).T
    prefix_lse[1, 2] = torch.inf  # FlashAttention's, of no context
    return prefix, prefix_lse, suffix, suffix_lse


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


# ---- what torchkv lacks


LACKING = {
    "alibi_slopes": (torch.ones(4), "alibi_slopes must be None, got a tensor of shape (4,)"),
    "qq_bias": (torch.ones(4, 4), "qq_bias must be None, got a tensor of shape (4, 4)"),
    "output_scale": (torch.ones(1), "output_scale must be None, got a tensor of shape (1,)"),
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


def test_what_is_lacking_is_refused_and_nothing_is_written():
    for name, arguments, message in lacking_calls():
        before = {n: a.clone() for n, a in arguments.items() if isinstance(a, torch.Tensor) and not a.is_meta}
        with pytest.raises(vllm.UnsupportedError) as error:
            getattr(vllm, name)(**arguments)
        assert str(error.value) == message
        assert isinstance(error.value, ValueError)
        for n, a in before.items():
            assert torch.equal(arguments[n], a), n


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


# ---- a patched vLLM


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
