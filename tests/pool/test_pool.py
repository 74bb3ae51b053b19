"""BlockPool: what is handed out, kept, shared and evicted, in which order, and what is refused."""

import pickle
import re

import numpy as np
import pytest

from kvcore.pool import BlockPool, OutOfBlocks
from tests.cases.processes import packages, run


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_handed_out_and_taken_back():
    pool = BlockPool(6, 16)
    assert (pool.num_blocks, pool.block_size, pool.watermark, pool.num_free) == (6, 16, 0, 6)
    assert pool.allocate(0) == []
    first, second = pool.allocate(2), pool.allocate(4)
    assert sorted(first + second) == list(range(6))
    assert pool.num_free == 0
    pool.free([])
    pool.free(second[1:3])
    assert pool.num_free == 2
    assert pool.allocate(2) == second[1:3]


def test_integers_of_numpy():
    pool = BlockPool(np.int64(6), np.int32(4), watermark=np.uint8(1))
    pool.free(np.array(pool.allocate(np.int16(3))))
    blocks = pool.allocate(3)
    assert blocks == [0, 1, 2]
    assert {type(b) for b in [*blocks, pool.num_blocks, pool.block_size, pool.watermark]} == {int}
    assert [type(b) for b in pool.fork(np.array(blocks))] == [int] * 3


def test_out_of_blocks():
    pool = BlockPool(4, 16)
    pool.allocate(3)
    with says(OutOfBlocks, "2 blocks were asked for, 1 is free") as error:
        pool.allocate(2)
    assert (error.value.asked, error.value.free, error.value.kept) == (2, 1, 0)
    assert pool.allocate(1) == [3]


def test_out_of_blocks_goes_to_other_processes():
    error = pickle.loads(pickle.dumps(OutOfBlocks(5, 3, 2)))
    assert str(error) == "5 blocks were asked for, 3 are free, 2 of them kept by the watermark"
    assert (error.asked, error.free, error.kept) == (5, 3, 2)


def test_the_watermark_is_kept_for_those_that_run():
    pool = BlockPool(4, 2, watermark=2)
    assert pool.num_free == 4
    with says(OutOfBlocks, "3 blocks were asked for, 4 are free, 2 of them kept by the watermark"):
        pool.allocate(3)
    table = pool.allocate(2)
    with says(OutOfBlocks, "1 block was asked for, 2 are free, 2 of them kept by the watermark"):
        pool.append([], 0, 1, admit=True)
    assert pool.append(table, 4, 3) == []
    assert pool.num_free == 0
    assert pool.allocate(0) == []
    with says(OutOfBlocks, "1 block was asked for, 0 are free"):
        pool.allocate(1)


def test_a_shared_block_is_freed_by_its_last_holder():
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    assert pool.fork(blocks[:1]) == blocks[:1]
    pool.free(blocks)
    assert pool.num_free == 3
    pool.free(blocks[:1])
    assert pool.num_free == 4


def test_appended_in_place_where_nobody_else_sees_it():
    pool = BlockPool(6, 4)
    table = []
    assert pool.append(table, 0, 3) == []
    assert table == [0]
    assert pool.append(table, 3) == []
    assert table == [0]
    assert pool.append(table, 4, 9) == []
    assert table == [0, 1, 2, 3]
    assert pool.append(table, 13, 0) == []
    assert pool.append(table, 2, 14) == []  # behind truncation
    assert table == [0, 1, 2, 3]


def test_copied_on_write():
    pool = BlockPool(6, 4)
    table = pool.allocate(3)
    other = pool.fork(table)
    assert pool.append(other, 12, 0) == []
    assert pool.append(other, 6, 3) == [(1, 3), (2, 4)]
    assert (table, other) == ([0, 1, 2], [0, 3, 4])
    assert pool.append(table, 6, 3) == []  # it is alone in them now
    pool.free(other)
    pool.free(table)
    assert pool.num_free == 6


def test_no_block_for_a_copy():
    pool = BlockPool(3, 4)
    table = pool.allocate(2)
    other = pool.fork(table)
    with says(OutOfBlocks, "2 blocks were asked for, 1 is free"):
        pool.append(other, 5, 4)  # a copy of block 1, and a new one
    assert other == [0, 1]
    assert pool.append(other, 5, 3) == [(1, 2)]


def test_printed():
    pool = BlockPool(8, 2)
    assert repr(pool) == "BlockPool(8 blocks × 2 slots, 0 used, 0 cached, hit rate 0.00)"


def test_neither_numpy_nor_a_framework_is_needed():
    modules = run(
        "from kvcore.sequence import Sequence, BlockPool\nSequence(BlockPool(2, 2), [1]).append(2)",
        {"numpy", "jax", "torch", "triton"},
    )
    assert not packages(modules) & {"numpy", "jax", "torch", "triton"}


# ---- what is refused

CREATE = {
    "blocks": ((0, 4), {}, ValueError, "num_blocks must be at least 1, got 0"),
    "block size": ((4, 0), {}, ValueError, "block_size must be at least 1, got 0"),
    "float": ((4.0, 4), {}, TypeError, "num_blocks must be an int, got 4.0"),
    "bool": ((4, True), {}, TypeError, "block_size must be an int, got True"),
    "watermark": ((4, 4), {"watermark": 4}, ValueError, "watermark must be below 4, the number of blocks, got 4"),
    "negative watermark": ((4, 4), {"watermark": -1}, ValueError, "watermark must be at least 0, got -1"),
    "a share as watermark": ((4, 4), {"watermark": 0.1}, TypeError, "watermark must be an int, got 0.1"),
    "seed": ((4, 4), {"seed": "x"}, TypeError, "seed must be an int, got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CREATE)
def test_no_pool(name):
    arguments, options, error, text = CREATE[name]
    with says(error, text):
        BlockPool(*arguments, **options)


BAD = {
    "allocate, negative": (lambda p, t: p.allocate(-1), ValueError, "n must be at least 0, got -1"),
    "allocate, float": (lambda p, t: p.allocate(1.0), TypeError, "n must be an int, got 1.0"),
    "free, twice": (
        lambda p, t: p.free([0, 1, 5]), ValueError, "blocks[2] must be a block that is held, got 5, which is free",
    ),
    "free, twice at once": (
        lambda p, t: p.free([1, 0, 1]), ValueError, "blocks must have block 1 at most 1 times, got 2",
    ),
    "free, foreign": (lambda p, t: p.free([0, 8]), ValueError, "blocks[1] must be at least 0 and below 8, got 8"),
    "free, negative": (lambda p, t: p.free([0, -8]), ValueError, "blocks[1] must be at least 0 and below 8, got -8"),
    "free, float": (lambda p, t: p.free([0, 1.0]), TypeError, "blocks[1] must be an int, got 1.0"),
    "free, bool": (lambda p, t: p.free([0, True]), TypeError, "blocks[1] must be an int, got True"),
    "fork": (lambda p, t: p.fork([0, 5]), ValueError, "blocks[1] must be a block that is held, got 5, which is free"),
    "append, too long": (
        lambda p, t: p.append(t, 7), ValueError, "length must be at most 6, the slots of the table, got 7",
    ),
    "append, negative": (lambda p, t: p.append(t, 0, -1), ValueError, "n must be at least 0, got -1"),
    "append, float": (lambda p, t: p.append(t, 0.5), TypeError, "length must be an int, got 0.5"),
    "append, foreign": (
        lambda p, t: p.append([0, 9], 3), ValueError, "table[1] must be at least 0 and below 8, got 9",
    ),
    "append, free": (
        lambda p, t: p.append([0, 6], 2, 4), ValueError, "table[1] must be a block that is held, got 6, which is free",
    ),
    "remember, too many": (
        lambda p, t: p.remember(t, [1] * 7), ValueError, "tokens must be at most 6, the slots of the table, got 7",
    ),
    "remember, free": (
        lambda p, t: p.remember([0, 6], [1] * 4), ValueError,
        "table[1] must be a block that is held, got 6, which is free",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name):
    call, error, text = BAD[name]
    pool = BlockPool(8, 2)
    table = pool.allocate(3)
    pool.remember(table, [1, 1, 2, 2])
    before = pool.statistics, list(pool._holders), list(pool._empty)
    with says(error, text):
        call(pool, table)
    assert (pool.statistics, pool._holders, pool._empty) == before
    assert table == [0, 1, 2]
    assert pool.match([1, 1, 2, 2]) == table[:2]
