"""Sequence: its slots, what it shares, and how it goes on after forks and rejected tokens."""

import re

import numpy as np
import pytest

from kvcore.pool import BlockPool, OutOfBlocks
from kvcore.sequence import Sequence

PROMPT = [5, 3, 8, 1, 2, 9, 4, 7, 6]  # two blocks of four, and one token


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def written(pool, tokens, **options):
    """A sequence with all these tokens."""
    sequence = Sequence(pool, tokens, **options)
    sequence.append(len(tokens) - sequence.length)
    sequence.commit(tokens[sequence.num_shared :])
    return sequence


def test_slots_of_the_next_tokens():
    pool = BlockPool(8, 4)
    pool.free(pool.allocate(3)[::-1])  # so that blocks are out of order
    sequence = Sequence(pool)
    assert sequence.append(3) == ([8, 9, 10], [])
    assert sequence.append() == ([11], [])
    assert sequence.append(6) == ([4, 5, 6, 7, 0, 1], [])
    assert sequence.append(0) == ([], [])
    assert (sequence.table, sequence.length, sequence.tokens) == ([2, 1, 0], 10, [])
    assert sequence.slots() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1]
    assert sequence.slots(3, 5) == [11, 4]
    assert sequence.slots(4, 4) == []
    assert repr(sequence) == "Sequence(10 tokens, 0 of them shared, blocks [2, 1, 0])"


def test_chunks_of_a_prompt():
    pool = BlockPool(8, 4)
    sequence, slots = Sequence(pool, PROMPT), []
    while sequence.length < len(PROMPT):
        chunk = PROMPT[sequence.length :][:2]
        slots += sequence.append(len(chunk))[0]
        sequence.commit(np.array(chunk))
    assert slots == list(range(9))
    assert sequence.tokens == PROMPT
    assert {type(token) for token in sequence.tokens} == {int}


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_the_last_token_of_a_prompt_is_left_to_compute(length):
    pool = BlockPool(8, 4)
    first = written(pool, PROMPT)
    second = Sequence(pool, PROMPT[:length])
    assert second.num_shared == second.length == (length - 1) // 4 * 4
    assert second.table == first.table[: second.num_shared // 4]
    assert second.tokens == PROMPT[: second.num_shared]


def test_a_block_that_is_not_full_is_not_shared():
    pool = BlockPool(8, 4)
    first = written(pool, PROMPT[:7])
    assert Sequence(pool, PROMPT).num_shared == 4
    first.append(3)  # full, of tokens that are not known yet
    assert Sequence(pool, PROMPT).num_shared == 4
    first.commit(PROMPT[7:8])
    assert Sequence(pool, PROMPT).num_shared == 8


def test_sequences_that_fill_the_same_block_at_the_same_time_keep_both():
    pool = BlockPool(8, 4)
    first, second = Sequence(pool, PROMPT), Sequence(pool, PROMPT)
    for sequence in (first, second):
        sequence.append(9)
    for sequence in (second, first):
        sequence.commit(PROMPT)
    assert not {*first.table} & {*second.table}
    assert Sequence(pool, PROMPT).table == second.table[:2]


def test_what_was_freed_is_shared_until_it_is_evicted():
    pool = BlockPool(4, 4)
    first = written(pool, PROMPT)
    table = first.table
    first.free()
    assert pool.statistics[:4] == (4, 0, 2, 2)
    second = Sequence(pool, PROMPT)
    assert second.table == table[:2]
    second.free()
    pool.allocate(3)  # the end of the text is taken
    assert Sequence(pool, PROMPT).table == table[:1]


def test_preempted_and_taken_up_again():
    pool = BlockPool(4, 4)
    first = written(pool, PROMPT)
    first.append()
    first.free()
    assert (first.tokens, first.length, first.table) == (PROMPT, 0, [])
    again = Sequence(pool, [*first.tokens, 0])
    assert again.num_shared == 8


def test_salts_keep_texts_apart():
    pool = BlockPool(8, 4)
    first = written(pool, PROMPT, salt="adapter")
    assert Sequence(pool, PROMPT).num_shared == 0
    assert Sequence(pool, PROMPT, salt="other").num_shared == 0
    assert Sequence(pool, PROMPT, salt="adapter").num_shared == 8
    child = first.fork()
    child.append(3)
    child.commit([1, 1, 1])
    assert Sequence(pool, [*PROMPT, 1, 1, 1, 1], salt="adapter").num_shared == 12


def test_forks_go_on_in_copies():
    pool = BlockPool(8, 4)
    first = written(pool, PROMPT[:6])
    second, third = first.fork(), first.fork()
    assert first.table == second.table == third.table == [0, 1]
    assert second.num_shared == 6
    assert second.append(3) == ([2 * 4 + 2, 2 * 4 + 3, 3 * 4], [(1, 2)])
    assert third.append() == ([4 * 4 + 2], [(1, 4)])
    assert first.append() == ([1 * 4 + 2], [])
    for sequence, token in ((first, 1), (second, 2), (third, 3)):
        sequence.commit([token])
    assert [s.tokens[-1] for s in (first, second, third)] == [1, 2, 3]
    for sequence in (first, second, third):
        sequence.free()
    assert pool.num_free == 8


def test_a_fork_has_what_was_committed():
    pool = BlockPool(8, 4)
    first = written(pool, PROMPT[:3])
    first.append(4)
    second = first.fork()
    assert (second.length, second.table, second.tokens) == (3, [0], PROMPT[:3])
    assert second.append(1) == ([2 * 4 + 3], [(0, 2)])
    first.commit([1, 1, 1, 1])
    assert Sequence(pool, [*PROMPT[:3], 1, 1]).table == [0]


def test_copies_of_one_step_are_read_before_they_are_written():
    """A block may be copied, given back, and be where another copy goes, before the caller copies any."""
    pool = BlockPool(4, 4)
    a, b = written(pool, [1, 2]), written(pool, [3, 4])
    cache = {a.table[0]: "a", b.table[0]: "b"}
    c, d = a.fork(), b.fork()
    _, copies = c.append()
    a.free()
    _, more = d.append()
    cache |= {destination: cache[source] for source, destination in copies + more}
    assert more[0][1] == copies[0][0]
    assert (cache[c.table[0]], cache[d.table[0]]) == ("a", "b")


def test_rejected_tokens():
    pool = BlockPool(8, 4)
    sequence = written(pool, PROMPT[:6])
    sequence.append(5)  # drafts
    sequence.commit(PROMPT[6:8])  # accepted
    sequence.truncate(8)
    assert (sequence.length, sequence.table, sequence.tokens) == (8, [0, 1], PROMPT[:8])
    assert pool.num_free == 6
    assert Sequence(pool, PROMPT).num_shared == 8


def test_tokens_that_are_taken_back_are_not_shared_once_they_are_overwritten():
    pool = BlockPool(8, 4)
    sequence = written(pool, PROMPT[:8])
    sequence.truncate(6)
    assert Sequence(pool, PROMPT).num_shared == 8  # nothing is overwritten yet
    pool = BlockPool(8, 4)
    sequence = written(pool, PROMPT[:8])
    sequence.truncate(6)
    assert sequence.append(2) == ([6, 7], [])
    assert Sequence(pool, PROMPT).num_shared == 4
    sequence.commit([1, 1])
    assert Sequence(pool, PROMPT).num_shared == 4
    assert Sequence(pool, [*PROMPT[:6], 1, 1, 1]).num_shared == 8


def test_truncated_into_what_is_shared():
    pool = BlockPool(8, 4)
    first, second = written(pool, PROMPT), Sequence(pool, PROMPT)
    second.truncate(6)
    assert second.num_shared == 6
    assert second.append(2) == ([3 * 4 + 2, 3 * 4 + 3], [(1, 3)])
    assert first.table == [0, 1, 2]
    second.truncate(0)
    assert (second.table, second.tokens, second.num_shared) == ([], [], 0)


def test_a_sequence_of_before_is_not_shared_after_forgetting():
    pool = BlockPool(8, 4)
    old = written(pool, PROMPT[:3])
    pool.forget()
    old.append(5)
    old.commit(PROMPT[3:8])
    child = old.fork()
    child.append(4)
    child.commit([1, 1, 1, 1])
    assert Sequence(pool, PROMPT).num_shared == 0
    written(pool, PROMPT)
    assert Sequence(pool, PROMPT).num_shared == 8


def test_a_new_sequence_leaves_the_watermark_and_one_that_runs_does_not():
    pool = BlockPool(4, 4, watermark=2)
    sequence = Sequence(pool, PROMPT)
    with says(OutOfBlocks, "3 blocks were asked for, 4 are free, 2 of them kept by the watermark"):
        sequence.append(9)
    assert (sequence.length, sequence.table, pool.num_free) == (0, [], 4)
    assert pool.statistics.prompt_tokens == 0
    sequence.append(8)
    sequence.append(8)
    assert pool.num_free == 0
    with says(OutOfBlocks, "1 block was asked for, 0 are free"):
        sequence.append()
    assert sequence.length == 16


def test_hit_rate():
    pool = BlockPool(8, 4)
    assert pool.statistics.hit_rate == 0
    written(pool, PROMPT)
    second = Sequence(pool, PROMPT)
    assert pool.statistics.prompt_tokens == 9  # it does not run yet
    second.append()
    second.append()
    second.fork().append()
    assert pool.statistics[4:] == (0, 18, 8, 8 / 18)


# ---- what is refused

FREED = "sequence must not be freed, got one that is"
BAD = {
    "append, negative": (lambda s: s.append(-1), ValueError, "n must be at least 0, got -1"),
    "append, float": (lambda s: s.append(1.0), TypeError, "n must be an int, got 1.0"),
    "commit, too many": (lambda s: s.commit([1, 2]), ValueError, "tokens must be at most 1, which have slots, got 2"),
    "commit, float": (
        lambda s: s.commit([1.5]), TypeError,
        "tokens must hold integers: 'float' object cannot be interpreted as an integer",
    ),
    "commit, number": (lambda s: s.commit(1), TypeError, "tokens must hold integers: 'int' object is not iterable"),
    "truncate, longer": (lambda s: s.truncate(11), ValueError, "length must be at most 10, the sequence's, got 11"),
    "truncate, negative": (lambda s: s.truncate(-1), ValueError, "length must be at least 0, got -1"),
    "truncate, float": (lambda s: s.truncate(2.0), TypeError, "length must be an int, got 2.0"),
    "slots, past the end": (
        lambda s: s.slots(9, 11), ValueError, "stop must be at most 10, the sequence's length, got 11",
    ),
    "slots, negative": (lambda s: s.slots(-1), ValueError, "start must be at least 0, got -1"),
    "slots, backwards": (lambda s: s.slots(5, 3), ValueError, "start must be at most stop, 3, got 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name):
    call, error, text = BAD[name]
    pool = BlockPool(8, 4)
    sequence = written(pool, PROMPT)
    sequence.append()
    before = pool.statistics, list(sequence.table), sequence.length, list(sequence.tokens)
    with says(error, text):
        call(sequence)
    assert (pool.statistics, sequence.table, sequence.length, sequence.tokens) == before


@pytest.mark.parametrize("call", [
    lambda s: s.append(0), lambda s: s.commit([]), lambda s: s.fork(), lambda s: s.truncate(0), lambda s: s.free(),
])  # fmt: skip
def test_a_freed_sequence_does_nothing(call):
    pool = BlockPool(8, 4)
    sequence = written(pool, PROMPT)
    sequence.free()
    with says(ValueError, FREED):
        call(sequence)
    assert pool.num_free == 8


def test_no_sequence():
    pool = BlockPool(8, 4)
    with says(TypeError, "pool must be a BlockPool, got 8"):
        Sequence(8)
    with says(TypeError, "prompt must hold integers: 'str' object cannot be interpreted as an integer"):
        Sequence(pool, ["a"])
    with says(TypeError, "salt must be hashable, got [1]"):
        Sequence(pool, salt=[1])


def test_an_admission_that_fails_holds_what_it_found_until_it_is_freed():
    pool = BlockPool(4, 4)
    written(pool, PROMPT).free()
    others = pool.allocate(1)  # an empty one; two of the three free ones are cached
    sequence = Sequence(pool, PROMPT)
    with pytest.raises(OutOfBlocks):
        sequence.append(9)
    assert (sequence.length, sequence.table, pool.num_free) == (8, [0, 1], 1)
    sequence.free()
    assert pool.num_free == 3
    pool.free(others)
