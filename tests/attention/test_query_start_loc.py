"""Starts that do not fit the query: one meaning for oracle, kernels, XLA and torch, and no row is left unwritten."""

import numpy as np
import pytest
import triton.language as tl

from kvcore.run import interpreter
from tests.cases.gpu_reads import assert_kernels
from tests.cases.reads import CPU_IMPLEMENTATIONS, assert_near_oracle, make_read, oracle

NUM_TOKENS = 6
STARTS = {  # for three sequences
    "fits": [0, 2, 4, 6],
    "begins late": [2, 3, 4, 6],
    "ends early": [0, 1, 1, 3],
    "ends far beyond the query": [0, 2, 4, 2**31 - 1],
    "lies beyond the query": [7, 9, 12, 20],
    "one row for two queries": [0, 4, 8, 12],
    "begins below zero": [-3, -1, 2, 6],
    "all below zero": [-9, -7, -5, -1],
    "padded with zeros": [0, 2, 0, 0],
    "falls and rises": [0, 4, 2, 6],
    "falls from the first": [5, 2, 6, 6],
    "falls to the end": [6, 4, 2, 0],
    "rises past and back": [0, 9, 3, 6],
}


def case_of(starts, integers=np.int32, **options):
    options = dict(seq_lens=(5, 9, 19), query_lens=(2, 2, 2), num_heads=1, head_size=16) | options
    case = make_read(np.random.default_rng(0), **options)
    assert len(case.query) == NUM_TOKENS
    case.query_start_loc = np.array(starts, integers)
    return case


@pytest.mark.parametrize("integers", [np.int32, np.int64])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_every_path_has_one_meaning(starts, integers):
    case = case_of(starts, integers)
    case.options["sinks"] = np.array([0.5, -1.0], np.float32)
    assert_near_oracle(case)
    del case.options["sinks"]
    assert_near_oracle(case)


@pytest.mark.gpu
@pytest.mark.gpu_smoke
@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_every_path_has_one_meaning_on_a_gpu(integers):
    for starts in STARTS.values():  # for one kernel
        assert_kernels(case_of(starts, integers, dtype="bfloat16", head_size=64))


def test_rows_of_nobody_are_zero_and_rows_outside_the_query_count():
    """The oracle itself: numbers of queries are differences of starts, whatever of them exists."""
    case = case_of([2, 4, 6, 6])
    out, lse = oracle(case)
    assert not out[:2].any()
    assert np.isneginf(lse[:2]).all()
    whole = case_of([0, 2, 4, 6])
    np.testing.assert_array_equal(lse[3, :], oracle(case_of([2, 4, 9, 9]))[1][3, :])
    # Sequence 0 has two queries either way; the first stands at position 3, the last at position 4.
    whole.query[:2] = case.query[2:4]
    np.testing.assert_array_equal(out[2:4], oracle(whole)[0][:2])
    # Only the last of four queries is left of [-3, 1): it stands at position 4 of 5.
    cut = case_of([-3, 1, 1, 1])
    last = case_of([0, 1, 1, 1])
    np.testing.assert_array_equal(oracle(cut)[0], oracle(last)[0])


def many_sequences(count, starts, **options):
    case = make_read(
        np.random.default_rng(1), seq_lens=(3,) * count, query_lens=(1,) * count, num_heads=1, group=1, **options
    )
    case.query_start_loc[[*starts]] = [*starts.values()]
    return case


MANY = 1100, {0: 3, 5: 2, 1030: 7, 1100: 1050}  # more than the kernel looks at in one piece


def test_many_sequences_of_which_some_fall():
    portable = {name: run for name, run in CPU_IMPLEMENTATIONS.items() if "interpret" not in name}
    assert_near_oracle(many_sequences(*MANY, head_size=16), portable)


def test_many_sequences_of_which_some_fall_interpreted(monkeypatch):
    """A thousand programs would take half a minute: here they are 70, and look at 16 sequences in one piece."""
    for module in ("sequences", "attention"):
        monkeypatch.setattr(interpreter._interpreted(module), "CHUNK", tl.constexpr(16))
    case = many_sequences(35, {0: 3, 5: 2, 18: 7, 33: 30, 35: 31}, head_size=16)
    assert_near_oracle(case, {name: run for name, run in CPU_IMPLEMENTATIONS.items() if "interpret" in name})


@pytest.mark.gpu
def test_many_sequences_of_which_some_fall_on_a_gpu():
    assert_kernels(many_sequences(*MANY, dtype="bfloat16", head_size=64))


@pytest.mark.parametrize("group", [1, 3, 20])
def test_groups_that_do_not_divide_a_tile(group):
    for starts in ([1, 3, 2, 5], [0, 2, 0, 0]):
        assert_near_oracle(case_of(starts, group=group))
