"""What blocks hold: what is found, kept, evicted and told apart, in a BlockPool."""

import numpy as np
import pytest

from kvcore import contents
from kvcore.pool import BlockPool, OutOfBlocks
from tests.cases.pools import remembered


def test_what_was_remembered_is_found():
    pool = BlockPool(8, 2)
    (table,) = remembered(pool, [1, 2, 3, 4, 5, 6])
    assert pool.statistics[:4] == (8, 0, 3, 5)
    assert pool.num_free == 8
    for text, count in (
        ([1, 2, 3, 4, 5, 6], 3), ([1, 2, 3, 4, 5], 2), ([1, 2, 3, 4, 6, 5], 2), ([1, 2, 9, 9, 5, 6], 1),
        ([1], 0), ([], 0), ([3, 4], 0), ([9, 9, 3, 4], 0),
    ):  # fmt: skip
        assert pool.match(text) == table[:count]
        assert pool.statistics.used == count
        pool.free(table[:count])
    assert pool.match([1, 2], salt="adapter") == []
    assert pool.match(np.array([1, 2, 3])) == table[:1]


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(8, 2, prefix_caching=False)
    remembered(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4]) == []
    assert pool.statistics.cached == 0


def test_empty_blocks_are_taken_before_cached_ones_and_ends_of_texts_before_beginnings():
    pool = BlockPool(8, 2)
    first, second = remembered(pool, [1, 2, 3, 4], [5, 6, 7, 8, 9, 9])
    rest = pool.allocate(3)
    assert not {*first, *second} & {*rest}
    assert pool.allocate(4) == [first[1], first[0], second[2], second[1]]
    assert pool.statistics.evicted == 4
    assert pool.match([5, 6, 7, 8]) == second[:1]
    assert pool.match([1, 2]) == []


def test_the_least_recently_used_is_evicted_first():
    pool = BlockPool(4, 2)
    a, b, c, d = (table[0] for table in remembered(pool, [1, 1], [2, 2], [3, 3], [4, 4]))
    pool.free(pool.match([2, 2]))
    pool.free(pool.match([1, 1]))
    assert [pool.allocate(1) for _ in range(4)] == [[c], [d], [b], [a]]


def test_what_is_held_is_not_evicted():
    pool = BlockPool(3, 2)
    (table,) = remembered(pool, [1, 1, 2, 2])
    assert pool.match([1, 1]) == table[:1]
    assert sorted(pool.allocate(2)) == sorted({0, 1, 2} - {table[0]})
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


def test_two_blocks_with_one_content():
    """One is found. Where it is evicted first, the other takes its place as soon as it is given back."""
    pool = BlockPool(3, 2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.remember(first, [1, 1])
    pool.remember(second, [1, 1])
    assert pool.match([1, 1]) == first
    pool.free(first * 2)
    assert pool.statistics[:4] == (3, 1, 1, 1)
    pool.free(second)
    assert pool.statistics[:4] == (3, 0, 1, 2)
    assert pool.match([1, 1]) == first
    pool.free(first)
    assert {*first, *second} < {*pool.allocate(3)}
    pool.free(second)  # with something else in it
    assert pool.statistics[:4] == (3, 2, 0, 1)
    assert pool.match([1, 1]) == []

    pool = BlockPool(2, 2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.remember(first, [1, 1])
    pool.remember(second, [1, 1])
    pool.free(first)
    assert pool.allocate(1) == first
    assert pool.match([1, 1]) == []
    pool.free(second)
    assert pool.match([1, 1]) == second


def test_one_of_two_blocks_with_one_content_is_overwritten():
    pool = BlockPool(3, 2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.remember(first, [1, 1])
    pool.remember(second, [1, 1])
    assert pool.append(second, 1, 1) == []
    assert pool.match([1, 1]) == first


def test_a_second_block_of_a_content_carries_on_the_text():
    pool = BlockPool(4, 2)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.remember(first, [1, 1])
    pool.remember(second, [1, 1, 2, 2])
    assert pool.match([1, 1, 2, 2]) == [first[0], second[1]]


def test_what_follows_an_evicted_block_is_found_when_that_is_back():
    pool = BlockPool(4, 2)
    (table,) = remembered(pool, [1, 1, 2, 2])
    pool.match([1, 1, 2, 2])
    pool.free(table[:1])
    pool.free(table[1:])  # so that the beginning is evicted first
    assert pool.allocate(3)[2:] == table[:1]
    assert pool.match([1, 1, 2, 2]) == []
    pool.remember(table[:1], [1, 1])
    assert pool.match([1, 1, 2, 2]) == table


def test_what_is_overwritten_is_not_found():
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    pool.remember(table, [1, 1, 2, 2])
    assert pool.append(table, 3, 1) == []
    assert pool.match([1, 1, 2, 2]) == table[:1]
    pool.free(table[:1])
    pool.free(table)
    assert pool.statistics[:4] == (4, 0, 1, 3)

    pool = BlockPool(4, 2)
    (table,) = remembered(pool, [1, 1, 2, 2])
    assert pool.match([1, 1, 2, 2]) == pool.match([1, 1, 2, 2]) == table
    old = list(table)
    assert len(pool.append(table, 3, 1)) == 1  # another has it, too: it goes on in a copy
    assert table[1] != old[1]
    assert pool.match([1, 1, 2, 2]) == old


@pytest.mark.parametrize(("length", "n", "left"), [(1, 2, 0), (2, 2, 1), (3, 5, 1), (4, 1, 2)])
def test_blocks_that_are_overwritten_together_are_not_found(length, n, left):
    pool = BlockPool(6, 2)
    table = pool.allocate(3)
    pool.remember(table, [1, 1, 2, 2, 3, 3])
    assert pool.append(table, length, n) == []
    assert pool.match([1, 1, 2, 2, 3, 3]) == table[:left]


def test_a_block_that_is_remembered_anew():
    pool = BlockPool(4, 2)
    table = pool.allocate(1)
    pool.remember(table, [1, 1])
    pool.remember(table, [2, 2])
    assert pool.match([1, 1]) == []
    assert pool.match([2, 2]) == table


@pytest.mark.parametrize("text", [[3, 3, 2, 2], [2, 2]])
def test_contents_with_one_hash_are_told_apart(text, monkeypatch):
    """Of contents with one hash the first is found, and nothing else is taken for it."""
    monkeypatch.setattr(contents, "hash", lambda value: hash(value) if value[1] == (None,) else 7, raising=False)
    pool = BlockPool(8, 2)
    (table,) = remembered(pool, [1, 1, 2, 2])
    other, _ = remembered(pool, text, [1, 1])
    assert pool.match([1, 1, 2, 2]) == table[:1]
    assert pool.match(text) == []
    assert pool.statistics[:4] == (8, 1, 0, 7)
    assert other != table


def test_the_same_tokens_after_others_with_one_hash_are_not_found(monkeypatch):
    codes = {(None,): 1, (1, 1): 2, (3, 3): 3, (2, 2): 4}  # without the parent's
    monkeypatch.setattr(contents, "hash", lambda value: codes[value[1]], raising=False)
    pool = BlockPool(8, 2)
    remembered(pool, [1, 1, 2, 2])
    (table,) = remembered(pool, [3, 3])
    assert pool.match([3, 3, 2, 2]) == table


def test_seeds_say_where_hashes_begin():
    def codes(**options):
        pool = BlockPool(4, 2, **options)
        pool.remember(pool.allocate(2), [1, 2, 3, 4])
        return set(pool._contents._by_code)

    assert codes(seed=1) == codes(seed=1)
    assert codes(seed=1) != codes(seed=2)
    assert codes() != codes()


def test_forgotten():
    pool = BlockPool(6, 2)
    remembered(pool, [1, 1, 2, 2])
    held = pool.allocate(2)
    pool.remember(held, [1, 1, 3, 3])
    pool.forget()
    assert pool.statistics[:4] == (6, 2, 0, 4)
    assert pool.match([1, 1]) == []
    pool.free(held)
    assert pool.statistics[:4] == (6, 0, 0, 6)
    assert sorted(pool.allocate(6)) == list(range(6))


def test_a_long_text_is_forgotten_without_recursion():
    pool = BlockPool(100_000, 1)
    (table,) = remembered(pool, range(100_000))
    assert pool.match(range(100_000)) == table
    pool.free(table)
    pool.forget()
    assert pool.num_free == 100_000


def test_nothing_is_left_of_what_was_evicted():
    pool = BlockPool(4, 1)
    for start in range(0, 1000, 4):
        remembered(pool, [start, start + 1, start + 2, start + 3])
    assert len(pool._contents._by_code) == 5  # with the root
    pool.forget()
    assert not pool._contents._by_code


def test_nothing_is_left_of_texts_that_fill_no_block_or_cannot_be_found(monkeypatch):
    pool = BlockPool(4, 2)
    for salt in range(3):
        pool.remember(pool.allocate(1), [salt], salt=salt)
        assert pool.match([salt, salt], salt=salt) == []
    assert not pool._contents._by_code
    monkeypatch.setattr(contents, "hash", lambda value: value[1] if len(value[1]) == 1 else 7, raising=False)
    remembered(pool, [1, 1])
    for salt in range(3):  # all have the first one's hash
        pool.remember([0], [2, 2], salt=salt)
        assert len(pool._contents._by_code) == 2  # the first one's, and its root
