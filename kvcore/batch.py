"""The arrays that say what a ragged call is, made of the sequences that take part in it."""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcore.integers import integer, integers
from kvcore.sequence import Sequence


class RaggedBatch(NamedTuple):
    """What `ragged_batch` makes: arrays of NumPy, int32. In JAX it is a pytree, to be passed to jit as it is.

    For torch, `torch.from_numpy(array).to(device)` makes a tensor of each.

    Attributes:
        block_tables: `[num_seqs, max_blocks]`: the blocks of each sequence, in order; -1 where there is none.
        query_start_loc: `[num_seqs + 1]`: sequence s has the rows (of query, key and value) from `query_start_loc[s]`
            to below `query_start_loc[s + 1]`.
        seq_lens: `[num_seqs]`: tokens of each sequence, the new ones among them; 0 where there is no sequence.
        positions: `[num_tokens]`: the position of each row in its sequence; -1 where there is no token.
    """

    block_tables: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    positions: NDArray[np.int32]


def ragged_batch(
    sequences: Iterable[Sequence],
    num_new: Iterable[int] | None = None,
    *,
    num_seqs: int | None = None,
    max_blocks: int | None = None,
    num_tokens: int | None = None,
) -> RaggedBatch:
    """Block tables, starts, lengths and positions of one call, for sequences that have slots for their new tokens.

    Give the sizes where shapes are to be the same in each step, as jit and CUDA graphs need: what is left is padding,
    which the ops skip.

    Args:
        sequences: Whose new tokens are the rows of the call, one sequence after another.
        num_new: New tokens of each: the last ones that `append` gave slots. None: one each, as in decoding.
        num_seqs: Sequences of the arrays; None: as many as there are.
        max_blocks: Blocks of a sequence in the arrays; None: as many as the longest table has.
        num_tokens: Rows of the call; None: as many as there are new tokens.

    Returns:
        The arrays, padded to the sizes that are given.

    Raises:
        ValueError: a sequence has fewer tokens than are new, or a size is too small.
        TypeError: a number is no integer, or a sequence is no `Sequence`.

    Example:
        >>> pool = BlockPool(num_blocks=8, block_size=4)
        >>> first, second = Sequence(pool), Sequence(pool)
        >>> _ = first.append(5), second.append(9)
        >>> batch = ragged_batch([first, second], [1, 3], num_seqs=3, num_tokens=6)
        >>> batch.block_tables.tolist(), batch.seq_lens.tolist()
        ([[0, 1, -1], [2, 3, 4], [-1, -1, -1]], [5, 9, 0])
        >>> batch.query_start_loc.tolist(), batch.positions.tolist()
        ([0, 1, 4, 4], [4, 6, 7, 8, -1, -1])

    The new token of the first sequence is its fifth, and the three of the second its last three.
    """
    members = list(sequences)
    for i, sequence in enumerate(members):
        if not isinstance(sequence, Sequence):
            raise TypeError(f"sequences[{i}] must be a Sequence, got {sequence!r}")
    counts = [1] * len(members) if num_new is None else integers("num_new", num_new)
    if len(counts) != len(members):
        raise ValueError(f"num_new must have {len(members)} numbers, one for each sequence, got {len(counts)}")
    for i, (sequence, count) in enumerate(zip(members, counts, strict=True)):
        if not 0 <= count <= sequence.length:
            raise ValueError(f"num_new[{i}] must be 0 to {sequence.length}, the sequence's length, got {count}")
    rows = _size("num_seqs", num_seqs, len(members))
    width = _size("max_blocks", max_blocks, max((len(sequence.table) for sequence in members), default=0))
    tokens = _size("num_tokens", num_tokens, sum(counts))

    tables, lens = np.full((rows, width), -1, np.int32), np.zeros(rows, np.int32)
    starts, positions = np.full(rows + 1, sum(counts), np.int32), np.full(tokens, -1, np.int32)
    for s, sequence in enumerate(members):
        tables[s, : len(sequence.table)] = sequence._packed_table()
    lens[: len(members)] = [sequence.length for sequence in members]
    starts[: len(members) + 1] = [0, *accumulate(counts)]
    # A sequence's last row is for its last position, and those before it are for those before that.
    ends = lens[: len(members)] - starts[1 : len(members) + 1]
    positions[: sum(counts)] = np.arange(sum(counts)) + np.repeat(ends, counts)
    return RaggedBatch(tables, starts, lens, positions)


def _size(name: str, size: int | None, needed: int) -> int:
    """An extent of the arrays, at least what is needed."""
    return needed if size is None else integer(name, size, needed)
