"""FlashInfer's wrappers on torchkv's kernels, beside attention of one row at a time."""

import math

import pytest
import torch

import torchkv
from tests.cases.flashinfer import CPU, DIM, GROUP, HEADS, LENS, PAGE, PAGES, Batch, close, wanted
from torchkv.integrations import flashinfer


def test_pages_of_one_slot_may_lack_the_axis():
    cache = torch.randn(6, 2, HEADS, DIM)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    indptr, ones = torch.tensor([0, 4], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    wrapper.plan(indptr, torch.tensor([3, 1, 0, 5]), ones, 4, HEADS, DIM, 1, q_data_type="float32")
    q = torch.randn(1, 4, DIM)
    got = wrapper.run(q, cache)
    assert torch.equal(got, wrapper.run(q, (cache[:, 0], cache[:, 1])))
    assert torch.equal(got, wrapper.run(q, cache.unsqueeze(2)))


# ---- wrappers


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("options", "also"),
    [
        ({}, {}),
        ({"window_left": 2}, {"window": 3}),
        ({"logits_soft_cap": 0.7, "sm_scale": 0.5}, {"cap": 0.7, "scale": 0.5}),
        ({"q_len_per_req": 1, "window_left": -1, "logits_soft_cap": 0.0}, {}),
    ],
)
def test_decode(options, also, kv_layout, torch_backend):
    batch = Batch(kv_layout=kv_layout)
    q = batch.random(len(LENS), HEADS * GROUP, DIM)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU, kv_layout)
    wrapper.plan(*batch.pages, *batch.sizes, q_data_type=torch.float32, **options)
    want = wanted(batch, q, range(len(LENS) + 1), **also)
    close(wrapper.run(q, batch.caches, return_lse=True), want)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    got = wrapper.run_return_lse(q, torch.stack(batch.caches, 1), out=out, lse=lse)
    assert got[0] is out
    close((out, lse), want)
    assert torch.equal(wrapper.run(q, batch.caches), out)
    lse.fill_(7)
    wrapper.run(q, batch.caches, lse=lse)
    close((out, lse), want)


def test_decode_of_several_tokens_each():
    batch = Batch((5, 2, 9))
    q = batch.random(6, HEADS * GROUP, DIM)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    wrapper.plan(*batch.pages, *batch.sizes, q_data_type="float32", q_len_per_req=2)
    close(wrapper.run(q, batch.caches, return_lse=True, q_len_per_req=2), wanted(batch, q, [0, 2, 4, 6]))
    with pytest.raises(ValueError, match="q must have the 6 rows that plan was told"):
        wrapper.run(q[:3], batch.caches)
    with pytest.raises(ValueError, match="q_len_per_req must be plan's, 6 rows of 3 sequences, got 1"):
        wrapper.run(q, batch.caches, q_len_per_req=1)


@pytest.mark.parametrize("head_size_v", [DIM, 8])
@pytest.mark.parametrize(
    ("options", "also"),
    [
        ({}, {"causal": False}),
        ({"causal": True}, {}),
        ({"causal": True, "window_left": 0}, {"window": 1}),
        ({"causal": True, "logits_soft_cap": 0.7, "sm_scale": 0.5}, {"cap": 0.7, "scale": 0.5}),
    ],
)
def test_prefill(options, also, head_size_v, torch_backend):
    batch = Batch(kv_layout="HND", head_size_v=head_size_v)
    starts = [0, 3, 3, 4, 8, 9]
    q = batch.random(9, HEADS * GROUP, DIM)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU, "HND")
    wrapper.plan(torch.tensor(starts, dtype=torch.int32), *batch.pages, *batch.sizes, q_data_type="float32", **options)
    close(wrapper.run(q, batch.caches, return_lse=True), wanted(batch, q, starts, **also))


def test_sinks():
    batch = Batch()
    q, sinks = batch.random(len(LENS), HEADS * GROUP, DIM), batch.random(HEADS * GROUP)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    wrapper.plan(*batch.pages, *batch.sizes, q_data_type="float32")
    want = wanted(batch, q, range(len(LENS) + 1), sinks=sinks)
    close([wrapper.run(q, batch.caches, sinks=sinks)], want[:1])


def test_a_window_in_the_place_of_plan_s():
    batch = Batch()
    q = batch.random(len(LENS), HEADS * GROUP, DIM)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    wrapper.plan(*batch.pages, *batch.sizes, q_data_type="float32", window_left=5)
    close([wrapper.run(q, batch.caches, window_left=1)], wanted(batch, q, range(len(LENS) + 1), window=2)[:1])


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_forward_says_again_what_plan_said(kind):
    batch = Batch()
    q = batch.random(len(LENS), HEADS * GROUP, DIM)
    each = torch.arange(len(LENS) + 1, dtype=torch.int32)
    if kind == "decode":
        wrapper, more = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU), {}
        wrapper.begin_forward(*batch.pages, *batch.sizes, "NONE", 1, 9.0, "float32")
    else:
        wrapper, more = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU), {"causal": True}
        wrapper.begin_forward(each, *batch.pages, *batch.sizes, q_data_type="float32")
    got = wrapper.forward_return_lse(q, batch.caches, window_left=2, sm_scale=0.3, v_scale=2.0, **more)
    out, lse = wanted(batch, q, each, window=3, scale=0.3)
    close(got, (out * 2, lse))
    assert torch.equal(wrapper.forward(q, batch.caches, window_left=2, sm_scale=0.3, v_scale=2.0, **more), got[0])
    wrapper.end_forward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scales", ["numbers", "tensors", "heads"])
def test_scales(scales, dtype, torch_backend):
    batch = Batch(dtype=torch.float32)
    if dtype != torch.float32:
        batch.key, batch.value = (x.nan_to_num(3).to(dtype) for x in (batch.key, batch.value))
    q = batch.random(len(LENS), HEADS * GROUP, DIM)
    k_scale, v_scale = (torch.tensor([0.5, 0.25]), torch.tensor([2.0, 3.0])) if scales == "heads" else (0.5, 2.0)
    if scales == "tensors":
        k_scale, v_scale = torch.tensor(k_scale), torch.tensor(v_scale)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    wrapper.plan(*batch.pages, *batch.sizes, q_data_type="float32", kv_data_type=dtype)
    if dtype == torch.float32 and scales != "numbers":
        with pytest.raises(flashinfer.UnsupportedError, match="k_scale must be a number for a cache of float32"):
            wrapper.run(q, batch.caches, k_scale=k_scale)
        return
    got = wrapper.run(q, batch.caches, q_scale=0.5, k_scale=k_scale, v_scale=v_scale)
    batch.key, batch.value = (
        x.float() * (s[:, None] if scales == "heads" else s) for x, s in ((batch.key, k_scale), (batch.value, v_scale))
    )
    close([got], wanted(batch, q, range(len(LENS) + 1), scale=0.5 * DIM**-0.5)[:1])


def test_what_graphs_capture_stays_where_it_is():
    """A later plan changes the contents of what run launched with."""
    first, second = Batch((5, 3, 9), seed=1), Batch((2, 20, 4), seed=2)
    q = first.random(3, HEADS * GROUP, DIM)
    buffers = [torch.full((n,), -7, dtype=torch.int32) for n in (4, 12, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(CPU, *buffers)
    wrapper.plan(*first.pages, *first.sizes, q_data_type="float32")
    close([wrapper.run(q, first.caches)], wanted(first, q, range(4))[:1])
    planned = wrapper._planned
    kept = planned.tables, planned.seq_lens
    wrapper.plan(*second.pages, *second.sizes, q_data_type="float32")
    assert (planned.tables, planned.seq_lens)[0] is kept[0]
    assert planned.seq_lens is kept[1]
    assert planned.tables.shape == (3, 12)
    close([wrapper.run(q, second.caches)], wanted(second, q, range(4))[:1])
    assert torch.equal(buffers[0], second.indptr)
    assert torch.equal(buffers[1][: len(second.indices)], second.indices)
    assert torch.equal(buffers[2], second.last)


def test_graphs_of_prefill():
    first, second = Batch((5, 3, 9), seed=1), Batch((2, 6, 4), seed=2)
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (4, 4, 12, 3)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU, "NHD", True, *buffers, max_pages_per_seq=3)
    q = first.random(6, HEADS * GROUP, DIM)
    for batch, starts in ((first, [0, 2, 3, 6]), (second, [0, 1, 2, 4])):
        indptr = torch.tensor(starts, dtype=torch.int32)
        wrapper.plan(indptr, *batch.pages, *batch.sizes, causal=True, q_data_type="float32")
        close([wrapper.run(q[: starts[-1]], batch.caches)], wanted(batch, q, starts)[:1])
        assert torch.equal(buffers[0], indptr)
    assert wrapper._planned.tables.shape == (3, 3)
    with pytest.raises(ValueError, match="at most the 6 rows of the first one, got 7"):
        wrapper.plan(torch.tensor([0, 3, 4, 7]), *first.pages, *first.sizes, q_data_type="float32")
    with pytest.raises(ValueError, match="at most max_pages_per_seq = 3 pages, got 4"):
        wrapper.plan(torch.tensor(starts), *Batch((16, 1, 1)).pages, *first.sizes, q_data_type="float32")
    with pytest.raises(ValueError, match="must have 3 sequences with use_cuda_graph, got 5"):
        wrapper.plan(torch.arange(6), *Batch((1,) * 5).pages, *first.sizes, q_data_type="float32")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_latent_caches(dtype, causal):
    batch = Batch()
    cache = batch.random(PAGES, PAGE, 24).to(dtype)
    q, starts = batch.random(7, 4, 24), torch.tensor([0, 2, 2, 3, 6, 7], dtype=torch.int32)
    lens = torch.tensor(LENS, dtype=torch.int32)
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(CPU)
    wrapper.plan(starts, *batch.pages[:2], lens, 4, 16, 8, PAGE, causal, 0.3, torch.float32, dtype)
    scales = {} if dtype == torch.float32 else {"ckv_scale": 0.5, "kpe_scale": 0.5}
    parts = q[..., :16], q[..., 16:], cache[..., :16], cache[..., 16:]
    out, lse = wrapper.run(*parts, return_lse=True, **scales)
    want, natural = torchkv.paged_attention(
        q, cache.float() * (0.5 if scales else 1), flashinfer.block_tables(*batch.pages[:2]), lens,
        query_start_loc=starts, causal=causal, scale=0.3, layout="MLA", head_size_v=16, return_lse=True,
    )  # fmt: skip
    close((out, lse), (want.double(), natural.double() / math.log(2)))
    base_e = wrapper.run(*parts, return_lse=True, return_lse_base_on_e=True, **scales)[1]
    torch.testing.assert_close(base_e, natural)
    with pytest.raises(flashinfer.UnsupportedError, match="ckv_cache and kpe_cache must be parts of the same rows"):
        wrapper.run(*parts[:3], cache[..., 15:23], **scales)
    with pytest.raises(flashinfer.UnsupportedError, match="ckv_cache and kpe_cache must be parts of the same rows"):
        wrapper.run(*parts[:3], cache.clone()[..., 16:], **scales)
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=r"kpe_scale must be None for a cache of float32, got 0\.5"):
            wrapper.run(*parts, kpe_scale=0.5)
        return
    both = torch.cat([q[..., :16], q[..., 16:] * 3], -1)
    want = wrapper.run(both[..., :16], both[..., 16:], *parts[2:], ckv_scale=0.25, kpe_scale=0.25)
    torch.testing.assert_close(wrapper.run(*parts, ckv_scale=0.25, kpe_scale=0.75), want)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pos_encoding_mode": "ROPE_LLAMA"}, "pos_encoding_mode must be 'NONE', got 'ROPE_LLAMA': .*rope_and_cache"),
        ({"custom_mask": torch.ones(3)}, r"custom_mask must be None, got a tensor of shape \(3,\)"),
        ({"packed_custom_mask": torch.ones(3)}, "packed_custom_mask must be None"),
        ({"prefix_len_ptr": torch.ones(3)}, "prefix_len_ptr must be None"),
        ({"token_pos_in_items_ptr": torch.ones(3)}, "token_pos_in_items_ptr must be None"),
        ({"max_item_len_ptr": torch.ones(3)}, "max_item_len_ptr must be None"),
        ({"q_data_type": torch.float8_e4m3fn}, "q_data_type must be float16, bfloat16 or float32, got torch.float8"),
        ({"o_data_type": torch.float32}, "o_data_type must be q_data_type, torch.float16, got torch.float32"),
    ],
)
def test_what_plan_does_not_take(options, message):
    batch, starts = Batch(), torch.arange(len(LENS) + 1)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU)
    with pytest.raises(flashinfer.UnsupportedError, match=message):
        wrapper.plan(starts, *batch.pages, *batch.sizes, **options)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    if set(options) <= {"pos_encoding_mode", "q_data_type", "o_data_type"}:
        with pytest.raises(flashinfer.UnsupportedError, match=message):
            decode.plan(*batch.pages, *batch.sizes, **options)
    with pytest.raises(flashinfer.UnsupportedError, match="window_right must be 0, got 1"):
        decode.plan(*batch.pages, *batch.sizes, window_right=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_cache_sf": torch.ones(1)}, flashinfer.UnsupportedError, "kv_cache_sf must be None"),
        ({"skip_softmax_threshold_scale_factor": 1.0}, flashinfer.UnsupportedError, "skip_softmax.* must be None"),
        ({"q_scale": torch.ones(1)}, flashinfer.UnsupportedError, "q_scale must be a number, got a tensor"),
        ({"k_scale": "1"}, TypeError, "k_scale must be a number or a tensor, got '1'"),
    ],
)
def test_what_run_does_not_take(options, error, message):
    batch = Batch()
    q = batch.random(len(LENS), HEADS * GROUP, DIM)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU)
    with pytest.raises(ValueError, match="plan must be called before run"):
        decode.run(q, batch.caches)
    decode.plan(*batch.pages, *batch.sizes, q_data_type="float32")
    prefill.plan(torch.arange(len(LENS) + 1), *batch.pages, *batch.sizes, q_data_type="float32", window_left=3)
    for wrapper in (decode, prefill):
        with pytest.raises(error, match=message):
            wrapper.run(q, batch.caches, **({"window_left": -1} if wrapper is prefill else {}), **options)
        with pytest.raises(flashinfer.UnsupportedError, match="no arguments of customised kernels, got 1"):
            wrapper.run(q, batch.caches, 1.0)
        with pytest.raises(ValueError, match="q must have the dtype that plan was given as q_data_type"):
            wrapper.run(q.half(), batch.caches)
        with pytest.raises(ValueError, match="paged_kv_cache must have the dtype that plan was given as kv_data_type"):
            wrapper.run(q, [x.half() for x in batch.caches])
        with pytest.raises(ValueError, match=r"paged_kv_cache must have shape \(num_pages, 2, …\), got"):
            wrapper.run(q, batch.caches[0])
    with pytest.raises(flashinfer.UnsupportedError, match="window_left must be -1 where causal is False, got 3"):
        prefill.run(q, batch.caches)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_layout": "DHN"}, ValueError, "kv_layout must be 'NHD' or 'HND', got 'DHN'"),
        ({"backend": "cudnn"}, flashinfer.UnsupportedError, "backend must be one of 'auto', .* got 'cudnn'"),
        ({"jit_args": [1]}, flashinfer.UnsupportedError, r"jit_args must be None, got \[1\]"),
        ({"use_cuda_graph": True}, ValueError, "must be a tensor where use_cuda_graph is True, got None"),
    ],
)
@pytest.mark.parametrize(
    "kind", [flashinfer.BatchDecodeWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper]
)
def test_what_wrappers_do_not_take(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(CPU, **options)


def test_buffers_that_do_not_fit():
    small, large = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32).expand(2**24)
    with pytest.raises(ValueError, match=r"paged_kv_indptr_buffer must have batch_size \+ 1 = 4 elements, got 3"):
        flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(CPU, small, large, small)
    with pytest.raises(ValueError, match="max_pages_per_seq must be given for block tables of 2 sequences"):
        flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(CPU, small, large, small[:2])
    flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(CPU, small, large, small[:2], max_pages_per_seq=8)
