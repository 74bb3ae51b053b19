"""slot_mapping: both frameworks, portable and interpreted kernel, against the oracle, and the oracle against tables."""

import numpy as np
import pytest
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.run import interpreter
from kvcore.slots import check_tables
from tests.cases.slots import CPU_IMPLEMENTATIONS, SlotCase, assert_maps, make_slots

PORTABLE = {name: run for name, run in CPU_IMPLEMENTATIONS.items() if "interpret" not in name}
INTERPRETED = {name: run for name, run in CPU_IMPLEMENTATIONS.items() if "interpret" in name}


def test_what_is_right():
    """The oracle itself, counted out by hand: blocks of 4 slots."""
    case = SlotCase(np.array([[2, 7], [5, -1]]), np.array([0, 3, 4]), np.array([6, 2]), 4)
    assert case.wanted.tolist() == [11, 28, 29, 21]
    case.num_tokens = 6
    assert case.wanted.tolist() == [11, 28, 29, 21, -1, -1]
    case.query_start_loc, case.num_tokens = None, None
    assert case.wanted.tolist() == [29, 21]
    assert_maps(case)


def test_what_it_gives_is_what_check_tables_wants():
    """Tables whose blocks are one sequence's each, as a server has them."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(24).reshape(4, 6).astype(np.int32)
    starts, lens = np.array([0, 0, 1, 4, 11], np.int32), np.array([0, 1, 5, 19], np.int32)
    case = SlotCase(tables, starts, lens, 4, 13)
    assert_maps(case)
    assert (case.wanted[:11] >= 0).all()
    check_tables(tables, lens, case.wanted, starts, num_blocks=24, block_size=4)
    decode = SlotCase(tables, None, lens, 4)
    check_tables(tables, lens, decode.wanted, num_blocks=24, block_size=4)


CASES = {
    "mixed": {},
    "padded": dict(padding=5),
    "decode": dict(query_lens=None),
    "padded decode": dict(query_lens=None, padding=3),
    "prefill": dict(seq_lens=(40, 75), query_lens=(33, 75), padding=1),
    "left padding": dict(seq_lens=(2, 0, 5), query_lens=(5, 2, 5)),
    "left padding, decode": dict(seq_lens=(2, 0, 5, 0), query_lens=None),
    "odd blocks": dict(block_size=7),
    "blocks of one": dict(block_size=1),
    "one sequence": dict(seq_lens=(9,), query_lens=(4,)),
    "no sequence": dict(seq_lens=(), query_lens=(), padding=3),
    "no sequence, decode": dict(seq_lens=(), query_lens=None),
    "no token": dict(seq_lens=(3, 4), query_lens=(0, 0)),
    "no block": dict(seq_lens=(0, 0), query_lens=(1, 2), spare=0),
}


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_cases(options, dtype):
    assert_maps(make_slots(np.random.default_rng(1), dtype=dtype, **options))


STARTS = {  # for three sequences and six tokens
    "begins late": [2, 3, 4, 6],
    "ends early": [0, 1, 1, 3],
    "ends far beyond": [0, 2, 4, 2**31 - 1],
    "lies beyond": [7, 9, 12, 20],
    "begins below zero": [-3, -1, 2, 6],
    "all below zero": [-9, -7, -5, -1],
    "padded with zeros": [0, 2, 0, 0],
    "padded with the last": [0, 5, 5, 5],
    "falls and rises": [0, 4, 2, 6],
    "falls from the first": [5, 2, 6, 6],
    "falls to the end": [6, 4, 2, 0],
    "rises past and back": [0, 9, 3, 6],
}


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_starts_have_the_meaning_that_attention_gives_them(starts, dtype):
    options = dict(seq_lens=(5, 9, 19), query_lens=(2, 2, 2), starts=starts, dtype=dtype)
    case = make_slots(np.random.default_rng(2), **options)
    assert_maps(case)
    if max(starts) < 100:  # the furthest start says how many tokens there are
        case.num_tokens = None
        assert_maps(case)
        assert len(case.wanted) == max(0, *starts)


def test_no_sequence_reads_past_its_row():
    """What is behind a row are the next one's blocks, which exist."""
    case = make_slots(np.random.default_rng(3), seq_lens=(30, 9, 40), query_lens=(9, 3, 20), spare=0)
    case.block_tables = np.abs(case.block_tables[:, :4])
    assert (case.wanted == -1).sum() == 9 + 20
    assert_maps(case)
    case.block_tables = case.block_tables[:, :0]
    assert (case.wanted == -1).all()
    assert_maps(case)


def test_blocks_that_are_not_mapped():
    case = make_slots(np.random.default_rng(4), seq_lens=(9, 19), query_lens=(9, 10))
    case.block_tables[0, 1], case.block_tables[1, 3] = -1, -(2**31)
    assert (case.wanted == -1).sum() == 8
    assert_maps(case)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 2**31 - 1])
def test_slots_that_int32_cannot_hold(block_size):
    """Some caches have 2³¹ slots or more. The first slots of a block may fit where the last ones do not."""
    largest = 2**31 - 1
    blocks = [largest // block_size + more for more in (-1, 0, 1)]
    tables = np.array([blocks, blocks[::-1]], np.int64)
    if block_size > 1:
        tables[1] = [2**62, 2**32 + 1, -(2**63)]
    case = SlotCase(tables, np.array([0, 40, 80]), np.array([3 * min(block_size, 16)] * 2), block_size, 80)
    assert (case.wanted >= 0).any()
    assert (case.wanted == -1).any()
    assert_maps(case)
    case.block_tables = np.clip(tables, -(2**31), largest).astype(np.int32)
    assert_maps(case)


def test_lengths_and_starts_of_any_size():
    tables = np.arange(6).reshape(2, 3)
    for starts, lens in (
        ([0, 3, 2**62], [2**62, 2**62]),
        ([0, 3, 6], [-(2**63), 2**31 + 5]),
        ([-(2**63), 3, 6], [4, 2**31]),
        ([0, 2**40, 2**40 + 6], [2**40, 12]),
    ):
        assert_maps(SlotCase(tables, np.array(starts), np.array(lens), 4, 6))
    # Lengths and starts count as 2³¹ - 1 at most, and int32 holds positions up to there.
    case = SlotCase(np.array([[0]]), np.array([0, 2]), np.array([2**40]), 2**31 - 1, 2)
    assert case.wanted.tolist() == [2**31 - 3, 2**31 - 2]
    assert_maps(case)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_call(data):
    num_seqs, columns = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 4))
    block_size = data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    starts = None
    if data.draw(st.booleans()):
        starts = rng.integers(-3, 40, num_seqs + 1)
        starts = np.sort(starts) if data.draw(st.booleans()) else starts
    case = SlotCase(
        rng.integers(-2, 9, (num_seqs, columns)), starts, rng.integers(-2, columns * block_size + 4, num_seqs),
        block_size, data.draw(st.integers(0, 40)),
    )  # fmt: skip
    assert_maps(case, {name: CPU_IMPLEMENTATIONS[name] for name in ("torch", "torch interpret", "jax interpret")})


# ---- more tokens and sequences than a program looks at in one piece


def many(num_seqs, num_tokens, seed=5, changes=()):
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.integers(0, num_tokens, num_seqs + 1))
    for at, start in changes:
        starts[at] = start
    return SlotCase(
        rng.integers(0, 99, (num_seqs, 8)), starts, rng.integers(0, 8 * 16, num_seqs), 16, num_tokens + 5
    )  # fmt: skip


MANY = [many(1100, 900), many(2500, 2500, changes=[(5, 2400), (1030, 7)]), many(3, 20000), many(70, 70000)]


@pytest.mark.parametrize("case", MANY, ids=lambda case: f"{len(case.seq_lens)} sequences, {case.num_tokens} tokens")
def test_many(case):
    assert_maps(case, PORTABLE)


@pytest.mark.parametrize("case", [many(40, 200), many(75, 90, changes=[(5, 80), (33, 7)]), many(2, 300)])
def test_many_interpreted(monkeypatch, case):
    """Programs look at 16 starts in one piece, in place of 1,024, so that few sequences are many."""
    monkeypatch.setattr(interpreter._interpreted("slots"), "CHUNK", tl.constexpr(16))
    assert_maps(case, INTERPRETED)


def test_large_tiles_interpreted():
    """From 8,193 tokens on, a program takes more than 32: here 256, mostly of one sequence or of none."""
    case = many(3, 20000)
    case.query_start_loc[:] = [0, 100, 300, 19990]
    case.num_tokens = 70000
    assert_maps(case, {"torch interpret": CPU_IMPLEMENTATIONS["torch interpret"]})
