"""FlashInfer's pages: as block tables and back, appended to; and its merge of partial results."""

import doctest
import math

import pytest
import torch

from tests.cases.flashinfer import DIM, GROUP, HEADS, LENS, PAGE, PAGES, Batch, close, wanted
from torchkv.integrations import flashinfer

# ---- pages


def test_tables_of_pages_and_back():
    batch = Batch()
    tables = flashinfer.block_tables(batch.indptr, batch.indices)
    assert tables.dtype == torch.int32
    assert tables.tolist() == [[*table, -1, -1, -1][:3] for table in batch.tables]
    lens = flashinfer.get_seq_lens(batch.indptr, batch.last, PAGE)
    assert lens.tolist() == list(LENS)
    assert flashinfer.block_tables(batch.indptr, batch.indices, 2).tolist() == tables[:, :2].tolist()
    indptr, indices, last = flashinfer.page_indices(tables, lens, PAGE)
    assert torch.equal(indptr, batch.indptr)
    assert torch.equal(last, batch.last)
    assert indices.shape == (15,)
    assert torch.equal(indices[: indptr[-1]], batch.indices)
    assert (indices[indptr[-1] :] == -1).all()


@pytest.mark.parametrize("sequences", [0, 2])
def test_pages_of_nothing(sequences):
    indptr, none = torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    assert flashinfer.block_tables(indptr, none).shape == (sequences, 0)
    assert flashinfer.block_tables(indptr, none, 3).tolist() == [[-1] * 3] * sequences
    whose, positions = flashinfer.get_batch_indices_positions(indptr, indptr[:-1], 2)
    assert whose.tolist() == [-1, -1]
    assert flashinfer.slot_mapping(whose, positions, none, indptr, PAGE).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("lens", "want"),
    [
        ([100, 3], ([0, 2, 3], [7, 5, 1, -1], [4, 3])),
        ([3, 100], ([0, 1, 3], [7, 1, 2, -1], [3, 4])),
        ([-3, 8], ([0, 0, 2], [1, 2, -1, -1], [0, 4])),
    ],
)
def test_pages_of_lengths_beyond_the_tables(lens, want):
    tables = torch.tensor([[7, 5], [1, 2]], dtype=torch.int32)
    found = flashinfer.page_indices(tables, torch.tensor(lens), 4)
    assert tuple(x.tolist() for x in found) == want


def test_positions_of_new_tokens():
    starts, lens = torch.tensor([0, 2, 2, 5]), torch.tensor([9, 4, 3])
    buffers = [torch.full((7,), 9, dtype=torch.int32) for _ in range(2)]
    got = flashinfer.get_batch_indices_positions(starts, lens, 7, *buffers)
    assert [x.tolist() for x in got] == [[0, 0, 2, 2, 2, -1, -1], [7, 8, 0, 1, 2, 0, 0]]
    assert got[0] is buffers[0]
    assert got[1] is buffers[1]
    with pytest.raises(ValueError, match=r"positions must be int32 of shape \(7,\), got torch.int64 of \(7,\)"):
        flashinfer.get_batch_indices_positions(starts, lens, 7, None, torch.zeros(7, dtype=torch.int64))


@pytest.mark.parametrize("form", ["two", "one", "slices"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_append(kv_layout, form, torch_backend):
    batch = Batch()
    whose = torch.tensor([4, 0, 2, -1, 2, 3], dtype=torch.int32)
    positions = torch.tensor([11, 4, 0, 0, 12, 3], dtype=torch.int32)  # 12: beyond sequence 2's pages
    key, value = batch.random(2, 6, HEADS, DIM)
    shape = (PAGE, HEADS) if kv_layout == "NHD" else (HEADS, PAGE)
    cache = torch.full((PAGES, 2, *shape, DIM * 2), 7.0)[..., ::2]
    cache = cache.contiguous() if form != "slices" else cache
    given = cache if form == "one" else (cache[:, 0], cache[:, 1])
    flashinfer.append_paged_kv_cache(key, value, whose, positions, given, batch.indices, batch.indptr, None, kv_layout)
    for i in (0, 1, 2, 5):
        page, place = batch.tables[whose[i]][positions[i] // PAGE], positions[i] % PAGE
        slot = cache[page] if kv_layout == "NHD" else cache[page].transpose(1, 2)
        assert torch.equal(slot[0, place], key[i])
        assert torch.equal(slot[1, place], value[i])
    assert (cache != 7).sum() == 4 * 2 * HEADS * DIM


@pytest.mark.parametrize("apart", [False, True])
def test_append_to_latent_caches(apart):
    batch = Batch()
    cache = torch.full((PAGES, PAGE, 24), 7.0)
    ckv, kpe = cache[..., :16], cache[..., 16:]
    if apart:
        ckv, kpe = ckv.clone(), kpe.clone()
    rows = batch.random(3, 24)
    whose, positions = torch.tensor([0, -1, 2]), torch.tensor([4, 0, 8])
    flashinfer.append_paged_mla_kv_cache(
        rows[:, :16], rows[:, 16:], whose, positions, ckv, kpe, batch.indices, batch.indptr, batch.last
    )
    both = torch.cat([ckv, kpe], -1)
    for i in (0, 2):
        assert torch.equal(both[batch.tables[whose[i]][positions[i] // PAGE], positions[i] % PAGE], rows[i])
    assert (both != 7).sum() == 2 * 24


# ---- merge


def test_merge_of_parts():
    """Attention over the first positions and over the rest is that over all."""
    batch = Batch((9, 12))
    q, all_of = batch.random(2, HEADS * GROUP, DIM), [0, 1, 2]
    first, last = ([batch.row(q[s], s, *at) for s in range(2)] for at in ((4,), (batch.lens[0], 4)))
    last = [batch.row(q[s], s, batch.lens[s], 4) for s in range(2)]
    (v_a, s_a), (v_b, s_b) = ([torch.stack(x).float() for x in zip(*part, strict=True)] for part in (first, last))
    want = wanted(batch, q, all_of)
    close(flashinfer.merge_state(v_a, s_a, v_b, s_b), want)
    close(flashinfer.merge_states(torch.stack([v_a, v_b], 1), torch.stack([s_a, s_b], 1)), want)
    v, s = v_a.clone(), s_a.clone()
    flashinfer.merge_state_in_place(v, s, v_b, s_b, torch.tensor([True, False]))
    close((v[:1], s[:1]), [x[:1] for x in want])
    assert torch.equal(v[1], v_a[1])
    assert torch.equal(s[1], s_a[1])
    flashinfer.merge_state_in_place(v_a, s_a, v_b, s_b)
    close((v_a, s_a), want)
    with pytest.raises(ValueError, match="and s its first three sizes, got"):
        flashinfer.merge_states(v[:, None], s)


@pytest.mark.parametrize("place", [2, 1, 3])
def test_parts_of_other_shapes_are_refused(place):
    parts = [torch.zeros(3, 2, 8), torch.zeros(3, 2), torch.zeros(3, 2, 8), torch.zeros(3, 2)]
    parts[place] = parts[place][1:]
    name = ("v_a", "s_a", "v_b", "s_b")[place]
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3, 2.*\), as v_a, got \(2, 2"):
        flashinfer.merge_state(*parts)


def test_bases_of_the_log_sum_exp():
    lse = torch.tensor([0.0, 1.0, -math.inf])
    assert flashinfer.lse_to_base_2(lse).tolist() == pytest.approx([0, 1 / math.log(2), -math.inf])
    torch.testing.assert_close(flashinfer.lse_to_base_e(flashinfer.lse_to_base_2(lse)), lse)


# ---- examples


@pytest.mark.parametrize("name", ["block_tables", "page_indices", "get_batch_indices_positions", "slot_mapping"])
def test_examples(name):
    names = {"flashinfer": flashinfer, "torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(flashinfer, name), name, globs=names)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted
    assert not results.failed
