"""check_tables: what it says of every kind of table, of arrays of every framework, and whether plain loops agree."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxkv
import torchkv

# Three sequences on blocks of 4 slots: 5 positions, 8 and 3, of which the last 2, 1 and 3 are new.
TABLES = [[2, 7, -1], [5, 1, 9], [4, 99, 99]]
LENGTHS = [5, 8, 3]
STARTS = [0, 2, 3, 6]
SLOTS = [11, 28, 7, 16, 17, 18]
CACHE = {"num_blocks": 10, "block_size": 4}
GOOD = {"block_tables": TABLES, "seq_lens": LENGTHS, "slot_mapping": SLOTS, "query_start_loc": STARTS} | CACHE
DECODE = {"block_tables": TABLES, "seq_lens": LENGTHS} | CACHE

ARRAYS = {
    "lists": lambda x: x,
    "tuples": lambda x: tuple(tuple(r) if isinstance(r, list) else r for r in x),
    "NumPy": np.asarray,
    "NumPy int32": lambda x: np.asarray(x, np.int32),
    "JAX": jnp.asarray,
    "torch": torch.tensor,
    "torch int32": lambda x: torch.tensor(x, dtype=torch.int32),
    "strided": lambda x: torch.tensor(x).unsqueeze(-1).repeat_interleave(2, -1)[..., 1],
}


def convert(arguments, of):
    return {n: of(x) if isinstance(x, list) else x for n, x in arguments.items()}


def test_both_packages_have_it():
    assert jaxkv.check_tables is torchkv.check_tables


@pytest.mark.parametrize("of", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_kind(of):
    torchkv.check_tables(**convert(GOOD, of))
    with pytest.raises(ValueError, match=r"slot_mapping\[1\] must be 28, position 4 of sequence 0, .*got 27"):
        torchkv.check_tables(**convert(GOOD | {"slot_mapping": [11, 27, 7, 16, 17, 18]}, of))


FINE = {
    "no slots": GOOD | {"slot_mapping": None},
    "one token each": DECODE,
    "one slot each": DECODE | {"slot_mapping": [28, 7, 18]},
    "tokens that are not written": GOOD | {"slot_mapping": [11, -1, -7, -1, 17, 18]},
    "padding": GOOD | {"slot_mapping": [*SLOTS, -1, 40, 10**12]},
    "no blocks, no positions": {"block_tables": np.zeros((2, 0), int), "seq_lens": [0, 0]} | CACHE,
    "no sequences": {"block_tables": np.zeros((0, 3), int), "seq_lens": np.zeros(0, int)} | CACHE,
    "empty lists": {"block_tables": [], "seq_lens": [], "slot_mapping": [], "query_start_loc": [0]} | CACHE,
    "an empty batch of a graph": {
        "block_tables": np.full((2, 3), -1), "seq_lens": [0, 0], "slot_mapping": [-1, -1],
    } | CACHE,
    "slots of the sequences that are not empty": {
        "block_tables": [[3], [-1], [-1]], "seq_lens": [4, 0, 0], "slot_mapping": [15],
    } | CACHE,
    "a sequence without new tokens": GOOD | {
        "query_start_loc": [0, 2, 2, 5], "slot_mapping": [11, 28, 16, 17, 18],
    },
    "left padding": DECODE | {"query_start_loc": [0, 3, 4, 9], "slot_mapping": [10, 11, 28, 7, -1, -1, 16, 17, 18]},
    "left padding without slots": DECODE | {"query_start_loc": [0, 3, 4, 400]},
    "a full table": {"block_tables": [[0, 1]], "seq_lens": [8], "slot_mapping": [7]} | CACHE,
    "a shared prefix": {"block_tables": [[0, 1], [0, 2], [0, 3]], "seq_lens": [5, 6, 8]} | CACHE,
    "a block that another sequence reads": {
        "block_tables": [[0, 1], [0, 1]], "seq_lens": [7, 6], "slot_mapping": [6, -1],
    } | CACHE,
    "a block that a sequence reads twice": {"block_tables": [[6, 6, 6, 3]], "seq_lens": [13]} | CACHE,
    "an unused entry of another's block": {"block_tables": [[0, 1], [2, 1]], "seq_lens": [8, 4]} | CACHE,
    "NumPy's integers": DECODE | {"num_blocks": np.int64(10), "block_size": np.int32(4)},
    "uint64": DECODE | {"block_tables": np.array([[2, 7, 2**64 - 1], [5, 1, 9], [4, 99, 99]], np.uint64)},
}  # fmt: skip


@pytest.mark.parametrize("arguments", FINE.values(), ids=FINE)
def test_what_is_fine(arguments):
    assert torchkv.check_tables(**arguments) is None


BAD = {
    "a length beyond the table": (
        DECODE | {"seq_lens": [5, 8, 500]}, "seq_lens[2] must be at most 12, the positions of 3 blocks of 4, got 500",
    ),
    "a length beyond no table": (
        {"block_tables": [[]], "seq_lens": [1]} | CACHE,
        "seq_lens[0] must be at most 0, the positions of 0 blocks of 4, got 1",
    ),
    "a negative length": (DECODE | {"seq_lens": [5, -8, 3]}, "seq_lens[1] must be at least 0, got -8"),
    "no block": (
        DECODE | {"seq_lens": [9, 8, 3]},
        "block_tables[0, 2] must be at least 0 and below 10, since sequence 0 has 9 positions, got -1",
    ),
    "a block beyond the cache": (
        DECODE | {"num_blocks": 7},
        "block_tables[0, 1] must be at least 0 and below 7, since sequence 0 has 5 positions, got 7",
    ),
    "starts that do not begin": (GOOD | {"query_start_loc": [1, 2, 3, 6]}, "query_start_loc[0] must be 0, got 1"),
    "starts that descend": (
        GOOD | {"query_start_loc": [0, 3, 2, 6]},
        "query_start_loc[2] must be at least 3, as query_start_loc[1], got 2",
    ),
    "starts that end beyond": (
        GOOD | {"query_start_loc": [0, 2, 3, 7]},
        "query_start_loc[3] must be at most 6, the entries of slot_mapping, got 7",
    ),
    "starts that end before": (
        GOOD | {"query_start_loc": [0, 2, 3, 5], "seq_lens": [5, 8, 2]},
        "slot_mapping[5] must be negative, since query_start_loc ends at 5, got 18",
    ),
    "more slots than sequences": (
        DECODE | {"slot_mapping": [28, 7, 18, 30]},
        "slot_mapping[3] must be negative, since there are 3 sequences, got 30",
    ),
    "fewer slots than sequences": (
        DECODE | {"slot_mapping": [28]},
        "slot_mapping must have an entry for sequence 1, which has 8 positions, got shape (1,)",
    ),
    "a slot of another position": (
        DECODE | {"slot_mapping": [29, 7, 18]},
        "slot_mapping[0] must be 28, position 4 of sequence 0, or negative, got 29",
    ),
    "a slot beyond the cache": (
        DECODE | {"slot_mapping": [28, 7, 40]},
        "slot_mapping[2] must be 18, position 2 of sequence 2, or negative, got 40",
    ),
    "slots of lengths before the new tokens": (
        GOOD | {"seq_lens": [3, 7, 3]},
        "slot_mapping[0] must be 9, position 1 of sequence 0, or negative, got 11",
    ),
    "a slot without a position": (
        DECODE | {"seq_lens": [5, 8, 0], "slot_mapping": [28, 7, 16]},
        "slot_mapping[2] must be negative, since it is for position -1 of sequence 2, got 16",
    ),
    "two that write a block": (
        {"block_tables": [[0, 1], [2, 3], [4, 1]], "seq_lens": [6, 5, 7]} | CACHE,
        "block_tables[2, 1] must be a block that only sequence 2 writes, got 1, as block_tables[0, 1]",
    ),
    "two that write a block at slots of their own": (
        {"block_tables": [[0, 1], [3, 1]], "seq_lens": [6, 7], "slot_mapping": [5, 6]} | CACHE,
        "block_tables[1, 1] must be a block that only sequence 1 writes, got 1, as block_tables[0, 1]",
    ),
    "two chunks that write a block": (
        {"block_tables": [[0, 1], [2, 0]], "seq_lens": [8, 6], "query_start_loc": [0, 8, 10]} | CACHE,
        "block_tables[1, 1] must be a block that only sequence 1 writes, got 0, as block_tables[0, 0]",
    ),
    "one that has a block twice and writes it": (
        {"block_tables": [[6, 3, 3]], "seq_lens": [9]} | CACHE,
        "block_tables[0, 2] must be a block that sequence 0 has once, since it writes it, got 3, as block_tables[0, 1]",
    ),
    "one that writes a block twice": (
        {"block_tables": [[8, 8]], "seq_lens": [8], "query_start_loc": [0, 8]} | CACHE,
        "block_tables[0, 1] must be a block that sequence 0 has once, since it writes it, got 8, as block_tables[0, 0]",
    ),
    "rank of tables": (
        DECODE | {"block_tables": [1, 2, 3]}, "block_tables must have shape (num_seqs, max_blocks), got (3,)",
    ),
    "ragged tables": (
        DECODE | {"block_tables": [[1, 2], [3], [4]]},
        "block_tables must have shape (num_seqs, max_blocks), got lists of different lengths",
    ),
    "number of lengths": (DECODE | {"seq_lens": [1, 2]}, "seq_lens must have shape (3,), got (2,)"),
    "no lengths": (DECODE | {"seq_lens": []}, "seq_lens must have shape (3,), got (0,)"),
    "number of starts": (GOOD | {"query_start_loc": [0, 2, 6]}, "query_start_loc must have shape (4,), got (3,)"),
    "rank of slots": (GOOD | {"slot_mapping": [SLOTS]}, "slot_mapping must have shape (n,), got (1, 6)"),
    "blocks": (DECODE | {"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
    "block size": (DECODE | {"block_size": -4}, "block_size must be at least 1, got -4"),
}  # fmt: skip


@pytest.mark.parametrize("of", ["lists", "JAX", "torch"])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not(bad, of):
    arguments, message = BAD[bad]
    if of != "lists" and bad in ("ragged tables", "no lengths", "a length beyond no table"):
        pytest.skip("of lists only")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        torchkv.check_tables(**convert(arguments, ARRAYS[of]))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_tables": np.ones((3, 3), np.float32)}, "block_tables must hold integers, got float32"),
        ({"seq_lens": [5.0, 8.0, 3.0]}, "seq_lens must hold integers, got float64"),
        ({"seq_lens": [True, True, True]}, "seq_lens must hold integers, got bool"),
        ({"slot_mapping": ["a"]}, "slot_mapping must hold integers, got <U1"),
        ({"query_start_loc": np.zeros(0)}, None),
        ({"num_blocks": 10.0}, "num_blocks must be an int, got 10.0"),
        ({"block_size": True}, "block_size must be an int, got True"),
        ({"num_blocks": None}, "num_blocks must be an int, got None"),
    ],
)
def test_types(arguments, message):
    with pytest.raises(TypeError if message else ValueError) as error:
        torchkv.check_tables(**DECODE | arguments)
    assert str(error.value) == (message or "query_start_loc must have shape (4,), got (0,)")


def fits(tables, lengths, slots, starts, num_blocks, block_size):
    """What check_tables decides, by loops over tokens."""
    starts = list(range(len(lengths) + 1)) if starts is None else starts
    owner: dict[int, int] = {}
    rows_of: dict[int, list] = {}
    if starts[0] != 0 or any(b < a for a, b in pairwise(starts)):
        return False
    for s, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        if not 0 <= length <= len(table) * block_size:
            return False
        own = table[: -(-length // block_size)]
        if any(not 0 <= b < num_blocks for b in own):
            return False
        rows_of[s] = own
    if slots is not None and starts[-1] > len(slots):
        return False
    for token in range(starts[-1] if slots is None else len(slots)):
        s = next((s for s in range(len(lengths)) if starts[s] <= token < starts[s + 1]), None)
        slot = None if slots is None else slots[token]
        if slot is not None and slot < 0:
            continue
        if s is None:
            if slot < num_blocks * block_size:
                return False
            continue
        position = lengths[s] - starts[s + 1] + token
        if position < 0:
            if slot is not None:
                return False
            continue
        block = tables[s][position // block_size]
        if slot is not None and slot != block * block_size + position % block_size:
            return False
        if owner.setdefault(block, s) != s or rows_of[s].count(block) > 1:
            return False
    return True


def random_tables(rng):
    """Tables that fit, then a few changes that may leave them so."""
    num_blocks, block_size, num_seqs = (int(rng.integers(low, high)) for low, high in ((4, 12), (1, 5), (0, 4)))
    width = int(rng.integers(1, 4))
    blocks = iter(rng.permutation(num_blocks).tolist())
    lengths = rng.integers(0, width * block_size + 1, num_seqs)
    tables = [[next(blocks, 0) for _ in range(width)] for _ in range(num_seqs)]
    counts = rng.integers(0, 5, num_seqs)
    starts = np.concatenate([[0], np.cumsum(counts)])
    slots = []
    for s in range(num_seqs):
        for position in range(lengths[s] - counts[s], lengths[s]):
            block = tables[s][position // block_size] if position >= 0 else -1
            slots.append(block * block_size + position % block_size if position >= 0 else -1)
    arrays = [np.array(tables).reshape(num_seqs, width), lengths, np.array(slots, int), starts]
    for _ in range(rng.integers(0, 3)):
        array = arrays[rng.integers(4)]
        if array.size:
            array.reshape(-1)[rng.integers(array.size)] += rng.integers(-3, 4)
    if rng.random() < 0.3:
        arrays[0][:] = rng.integers(0, num_blocks, arrays[0].shape)
    if rng.random() < 0.3:
        arrays[2] = None
    return [None if a is None else a.tolist() for a in arrays], num_blocks, block_size


def test_plain_loops_agree():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(4000):
        (tables, lengths, slots, starts), num_blocks, block_size = random_tables(rng)
        want = fits(tables, lengths, slots, starts, num_blocks, block_size)
        try:
            torchkv.check_tables(
                np.array(tables, int).reshape(len(lengths), -1 if tables else 1), lengths, slots, starts,
                num_blocks=num_blocks, block_size=block_size,
            )  # fmt: skip
            got = True
        except ValueError:
            got = False
        assert got == want, (tables, lengths, slots, starts, num_blocks, block_size)
        verdicts.append(got)
    assert 1000 < sum(verdicts) < 3000


def test_thousands_of_sequences():
    """Also that nothing is as large as the product of tokens and sequences."""
    num_seqs, width, block_size = 5000, 40, 16
    tables = np.random.default_rng(0).permutation(num_seqs * width).reshape(num_seqs, width)
    lengths = np.full(num_seqs, width * block_size)
    starts = np.arange(num_seqs + 1) * 20
    n = np.arange(width * block_size - 20, width * block_size)
    slots = (tables[:, n // block_size] * block_size + n % block_size).reshape(-1)
    cache = {"num_blocks": tables.size, "block_size": block_size}
    torchkv.check_tables(tables, lengths, slots, starts, **cache)
    torchkv.check_tables(tables, lengths, query_start_loc=starts * 10**9, **cache)
    slots[-1] -= 1
    with pytest.raises(ValueError, match=r"slot_mapping\[99999\] must be"):
        torchkv.check_tables(tables, lengths, slots, starts, **cache)
