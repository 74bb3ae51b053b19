"""On a GPU, FlashInfer's wrappers on torchkv's kernels, and in CUDA graphs that a later plan changes."""

import math

import pytest
import torch

import torchkv
from tests.cases.flashinfer import DIM, GROUP, HEADS, LENS, PAGE, PAGES, Batch, close, wanted
from tests.cases.gpu import DEVICE, captured, params
from torchkv.integrations import flashinfer

pytestmark = pytest.mark.gpu
WORKSPACE = torch.empty(0, device=DEVICE)
HALVES = [(torch.float16,), (torch.bfloat16,)]


def here(*tensors):
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def query(batch, rows, dtype, dim=DIM):
    """Random rows: those that run is given, and the same numbers on the CPU."""
    q = batch.random(rows, HEADS * GROUP, dim).to(dtype)
    return q.to(DEVICE), q


def near(got, want):
    close([x.cpu() for x in got], want, 2e-2)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", params(HALVES, smoke=HALVES[1:]))
def test_decode(dtype, kv_layout):
    batch = Batch(dtype=dtype, kv_layout=kv_layout)
    q, same = query(batch, len(LENS), dtype)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, kv_layout)
    wrapper.plan(*here(*batch.pages), *batch.sizes, q_data_type=dtype, window_left=4, logits_soft_cap=0.7)
    want = wanted(batch, same, range(len(LENS) + 1), window=5, cap=0.7)
    near(wrapper.run(q, here(*batch.caches), return_lse=True), want)
    near(wrapper.run(q, here(torch.stack(batch.caches, 1))[0], return_lse=True), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", params(HALVES))
def test_prefill(dtype, causal):
    batch, starts = Batch(dtype=dtype), [0, 3, 3, 4, 8, 9]
    q, same = query(batch, 9, dtype)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(
        *here(torch.tensor(starts, dtype=torch.int32), *batch.pages), *batch.sizes, causal=causal, q_data_type=dtype
    )
    near(wrapper.run(q, here(*batch.caches), return_lse=True), wanted(batch, same, starts, causal=causal))


def test_append_is_what_decode_reads():
    batch = Batch(dtype=torch.bfloat16)
    caches = [torch.full_like(x, math.nan) for x in here(*batch.caches)]
    rows = [(page, i) for table, n in zip(batch.tables, LENS, strict=True) for page, i in zip(
        [table[i // PAGE] for i in range(n)], [i % PAGE for i in range(n)], strict=True
    )]  # fmt: skip
    key, value = (torch.stack([x[at] for at in rows]).to(DEVICE) for x in (batch.key, batch.value))
    lens = torch.tensor(LENS, dtype=torch.int32)
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0).int()]).to(DEVICE)
    seq, positions = flashinfer.get_batch_indices_positions(starts, lens.to(DEVICE), len(rows))
    indptr, indices, last = here(*batch.pages)
    flashinfer.append_paged_kv_cache(key, value, seq, positions, tuple(caches), indices, indptr, last)
    for got, want in zip(caches, batch.caches, strict=True):
        assert torch.equal(got.cpu().nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("wrapper", ["decode", "prefill"])
def test_a_graph_is_right_for_what_is_planned_later(wrapper):
    dtype = torch.bfloat16
    first, second = Batch((5, 3, 9), dtype, seed=1), Batch((2, 12, 4), dtype, seed=2)
    buffers = [torch.full((n,), -7, dtype=torch.int32, device=DEVICE) for n in (4, 12, 3)]
    caches = here(*first.caches)
    if wrapper == "decode":
        wrapper, starts = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(WORKSPACE, *buffers), ()
    else:
        at = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            WORKSPACE, "NHD", True, at, *buffers, max_pages_per_seq=5
        )
        starts = (torch.arange(4, dtype=torch.int32),)
    options = {"q_data_type": dtype, **({"causal": True} if starts else {})}
    q, same = query(first, 3, dtype)
    wrapper.plan(*here(*starts, *first.pages), *first.sizes, **options)
    out, replay = captured(lambda: wrapper.run(q, caches))
    replay()
    near([out], wanted(first, same, range(4))[:1])
    wrapper.plan(*here(*starts, *second.pages), *second.sizes, **options)
    for cache, new in zip(caches, second.caches, strict=True):
        cache.copy_(new)
    out.fill_(math.nan)
    replay()
    near([out], wanted(second, same, range(4))[:1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("latent", "rope"), [(16, 8), (512, 64)])
def test_latent_caches(latent, rope, causal):
    batch, dtype = Batch(), torch.bfloat16
    cache = batch.random(PAGES, PAGE, latent + rope).to(dtype)
    q, starts = batch.random(7, 4, latent + rope).to(dtype), torch.tensor([0, 2, 2, 3, 6, 7], dtype=torch.int32)
    lens = torch.tensor(LENS, dtype=torch.int32)
    indptr, indices, _ = batch.pages
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(WORKSPACE)
    wrapper.plan(*here(starts, indptr, indices, lens), 4, latent, rope, PAGE, causal, 0.05, dtype, dtype)
    there, kept = here(q, cache)
    parts = there[..., :latent], there[..., latent:], kept[..., :latent], kept[..., latent:]
    want, natural = torchkv.paged_attention(
        q.float(), cache.float(), flashinfer.block_tables(indptr, indices), lens, query_start_loc=starts,
        causal=causal, scale=0.05, layout="MLA", head_size_v=latent, return_lse=True,
    )  # fmt: skip
    near(wrapper.run(*parts, return_lse=True), (want.double(), natural.double() / math.log(2)))
