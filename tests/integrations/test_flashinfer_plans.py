"""What FlashInfer's wrappers keep of a plan: copies, where they were, and nothing that does not fit."""

import re

import pytest
import torch

from tests.cases.flashinfer import CPU, DIM, GROUP, HEADS, PAGE, PAGES, Batch
from torchkv.integrations import flashinfer

FIRST, SECOND, THIRD = ([0, 2, 3, 6], (5, 3, 9)), ([0, 1, 2, 3], (2, 6, 4)), ([0, 0, 3, 4], (1, 7, 2))
"""Where each sequence's rows begin, and how many tokens it has."""


def buffers(graph, count):
    return [torch.zeros(n, dtype=torch.int32) for n in (4, 4, 12, 3)][4 - count :] if graph else []


def prefill(graph):
    """A wrapper's plan, by name, and its run."""
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU, "NHD", graph, *buffers(graph, 4))
    batch = Batch((12, 12, 12))
    q = batch.random(6, HEADS * GROUP, DIM)

    def plan(starts, batch):
        given = torch.tensor(starts, dtype=torch.int32), *batch.pages
        wrapper.plan(*given, *batch.sizes, causal=True, q_data_type="float32")
        return given

    return plan, lambda starts: wrapper.run(q[: starts[-1]], (batch.key.nan_to_num(1), batch.value.nan_to_num(1)))


def latent(graph):
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(CPU, graph, *buffers(graph, 4))
    batch = Batch()
    cache, q = batch.random(PAGES, PAGE, 24), batch.random(6, 4, 24)

    def plan(starts, batch):
        given = torch.tensor(starts, dtype=torch.int32), *batch.pages[:2], torch.tensor(batch.lens, dtype=torch.int32)
        wrapper.plan(*given, 4, 16, 8, PAGE, True, 0.3, torch.float32, torch.float32)
        return given

    def run(starts):
        rows = q[: starts[-1]]
        return wrapper.run(rows[..., :16], rows[..., 16:], cache[..., :16], cache[..., 16:])

    return plan, run


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", [prefill, latent])
def test_what_was_planned_is_a_copy(kind, graph):
    """A server changes its lengths between plan and run; and a later plan must not change what the first was given."""
    plan, run = kind(graph)
    starts, lens = FIRST
    given = plan(starts, Batch(lens))
    want = run(starts)
    for tensor in given:
        tensor.zero_()
    assert torch.equal(run(starts), want)
    for starts, lens in (SECOND, THIRD):
        plan(starts, Batch(lens))
        assert not any(tensor.any() for tensor in given)


def test_starts_stay_where_they_are_beside_plans_without():
    batch = Batch((5, 3, 9))
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(CPU, *buffers(True, 3))
    places = []
    for tokens in (2, 1, 2):
        wrapper.plan(*batch.pages, *batch.sizes, q_data_type="float32", q_len_per_req=tokens)
        places.append(wrapper._planned.starts)
    assert places[1] is None
    assert places[2] is places[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": slice(3)}, "indptr must have 4 elements, one more than last_page_len, got 3"),
        ({"last": slice(2)}, "indptr must have 3 elements, one more than last_page_len, got 4"),
        ({"indices": slice(5)}, "indices must have the 6 pages that indptr names, got 5"),
    ],
)
def test_pages_that_do_not_fit_each_other(change, message):
    batch = Batch((5, 3, 9))
    for name, part in change.items():
        setattr(batch, name, getattr(batch, name)[part])
    decode, prefill = (
        kind(CPU)
        for kind in (flashinfer.BatchDecodeWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper)
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        decode.plan(*batch.pages, *batch.sizes)
    starts = torch.arange(len(batch.last) + 1)
    with pytest.raises(ValueError, match=re.escape(message.replace("last_page_len", "paged_kv_last_page_len"))):
        prefill.plan(starts, *batch.pages, *batch.sizes)


def test_rows_and_lengths_that_do_not_fit_each_other():
    batch = Batch((5, 3, 9))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU)
    with pytest.raises(ValueError, match="qo_indptr must have 4 elements, one more than paged_kv_last_page_len, got 3"):
        wrapper.plan(torch.arange(3), *batch.pages, *batch.sizes)
    latent = flashinfer.BatchMLAPagedAttentionWrapper(CPU)
    lens = torch.tensor(batch.lens, dtype=torch.int32)
    rest = (4, 16, 8, PAGE, True, 0.3, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="qo_indptr must have 3 elements, one more than kv_len_arr, got 4"):
        latent.plan(torch.arange(4), *batch.pages[:2], lens[:2], *rest)
    with pytest.raises(ValueError, match="kv_indptr must have 4 elements, one more than kv_len_arr, got 3"):
        latent.plan(torch.arange(4), batch.indptr[:3], batch.indices, lens, *rest)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_pages_of_another_size_than_planned(kv_layout):
    """Lengths are made with it, and were wrong."""
    batch = Batch((5, 3, 9), kv_layout=kv_layout)
    q = batch.random(3, HEADS * GROUP, DIM)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(CPU, kv_layout)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(CPU, kv_layout)
    decode.plan(*batch.pages, *batch.sizes[:-1], 16, q_data_type="float32")
    prefill.plan(torch.arange(4), *batch.pages, *batch.sizes[:-1], 16, q_data_type="float32")
    for wrapper in (decode, prefill):
        with pytest.raises(ValueError, match="must have pages of plan's page_size, 16 slots, got 4"):
            wrapper.run(q, batch.caches)
