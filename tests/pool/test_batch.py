"""ragged_batch: the arrays of a step agree with the slots that its sequences were given, and padding is skipped."""

import re

import numpy as np
import pytest

from kvcore.batch import RaggedBatch, ragged_batch
from kvcore.oracle.slots import slot_mapping
from kvcore.pool import BlockPool
from kvcore.sequence import Sequence
from kvcore.slots import check_tables

BLOCKS, SIZE = 64, 4


def sequences(*lengths):
    """Sequences whose blocks are out of order, and all their slots."""
    pool = BlockPool(BLOCKS, SIZE)
    blocks = pool.allocate(BLOCKS)
    np.random.default_rng(0).shuffle(blocks)
    pool.free(blocks)
    made = [Sequence(pool) for _ in lengths]
    for sequence, length in zip(made, lengths, strict=True):
        sequence.append(length)
    return made


@pytest.mark.parametrize("sizes", [{}, {"num_seqs": 7, "max_blocks": 9, "num_tokens": 20}])
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ((9, 1, 30), (1, 1, 1)),
        ((9, 1, 30, 8), (9, 0, 11, 0)),
        ((4, 8), (4, 3)),
        ((5,), (0,)),
        ((0, 6), (0, 6)),
        ((), ()),
    ],
)
def test_slots_of_the_batch_are_those_that_the_sequences_were_given(lengths, new, sizes):
    members = sequences(*lengths)
    batch = ragged_batch(iter(members), iter(new), **sizes)
    rows, width, tokens = (sizes.get(name) for name in ("num_seqs", "max_blocks", "num_tokens"))
    rows, tokens = rows or len(lengths), tokens or sum(new)
    width = width or max((-(-n // SIZE) for n in lengths), default=0)
    assert [(a.shape, a.dtype) for a in batch] == [
        (shape, np.int32) for shape in ((rows, width), (rows + 1,), (rows,), (tokens,))
    ]
    given = [slot for sequence, n in zip(members, new, strict=True) for slot in sequence.slots(sequence.length - n)]
    given += [-1] * (tokens - len(given))
    starts = batch.query_start_loc
    slots = slot_mapping(batch.block_tables, starts, batch.seq_lens, SIZE, tokens)
    assert slots.tolist() == given
    check_tables(batch.block_tables, batch.seq_lens, given, starts, num_blocks=BLOCKS, block_size=SIZE)
    positions = [p for n, count in zip(lengths, new, strict=True) for p in range(n - count, n)]
    assert batch.positions.tolist() == positions + [-1] * (tokens - len(positions))
    assert (batch.block_tables[len(lengths) :] == -1).all()
    assert not batch.seq_lens[len(lengths) :].any()
    assert (starts[len(lengths) :] == sum(new)).all()


def test_without_counts_each_sequence_decodes():
    members = sequences(9, 4, 1)
    for got, want in zip(ragged_batch(members), ragged_batch(members, [1, 1, 1]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert ragged_batch(members).positions.tolist() == [8, 3, 0]


def test_a_batch_stays_as_it_was_made():
    first, *_ = members = sequences(9, 4)
    batch = ragged_batch(members)
    before = [array.copy() for array in batch]
    first.append(20)
    for got, want in zip(batch, before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_tables_are_those_of_now():
    """What is kept of a table from step to step is kept for no longer than the table is so."""
    first, second = sequences(9, 17)

    def check(*members):
        batch = ragged_batch(members, [0] * len(members), max_blocks=40)
        for row, sequence in zip(batch.block_tables.tolist(), members, strict=True):
            assert row == sequence.table + [-1] * (40 - len(sequence.table))

    check(first, second)
    first.append(20)  # longer
    check(first, second)
    first.commit(range(first.length))
    fork = first.fork()
    check(fork, first, second)
    fork.append(1)  # a block of it is a copy
    check(fork, first, second)
    first.truncate(5)  # shorter
    check(second, first, fork)
    second.append(9)
    first.append(12)  # as long as before, in other blocks
    check(second, first, fork)
    second.table[1] = 63  # by somebody else, who has moved it
    check(first, second, fork)
    fork.free()
    check(fork, first, second)


def test_the_batch_is_a_pytree_of_jax():
    import jax

    batch = ragged_batch(sequences(9, 4))
    got = jax.jit(lambda batch: batch._replace(seq_lens=batch.seq_lens + 1))(batch)
    assert isinstance(got, RaggedBatch)
    assert got.seq_lens.tolist() == [10, 5]


@pytest.mark.parametrize(
    ("new", "sizes", "error", "text"),
    [
        ([1], {}, ValueError, "num_new must have 2 numbers, one for each sequence, got 1"),
        ([1, 5], {}, ValueError, "num_new[1] must be 0 to 4, the sequence's length, got 5"),
        ([-1, 1], {}, ValueError, "num_new[0] must be 0 to 9, the sequence's length, got -1"),
        ([1.0, 1], {}, TypeError, "num_new must hold integers: 'float' object cannot be interpreted as an integer"),
        (None, {"num_seqs": 1}, ValueError, "num_seqs must be at least 2, got 1"),
        (None, {"max_blocks": 2}, ValueError, "max_blocks must be at least 3, got 2"),
        ([9, 4], {"num_tokens": 12}, ValueError, "num_tokens must be at least 13, got 12"),
        (None, {"num_tokens": True}, TypeError, "num_tokens must be an int, got True"),
    ],
)
def test_errors(new, sizes, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        ragged_batch(sequences(9, 4), new, **sizes)


def test_only_sequences_take_part():
    with pytest.raises(TypeError, match=r"^sequences\[1\] must be a Sequence, got \[3\]$"):
        ragged_batch([*sequences(9), [3]])
