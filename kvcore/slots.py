"""Helpers for slot mappings and block tables, outside of any hot path."""

from typing import Any

import numpy as np

from kvcore.integers import integer


def find_duplicate_slots(slot_mapping: Any) -> np.ndarray:
    """Slots that more than one token would be written to, so that the result is unspecified.

    A check for debugging, outside jit and off the hot path: it reads the array on the host.

    Args:
        slot_mapping: Integers `(n,)`: an array of NumPy, JAX or torch (on any device), or a list.

    Returns:
        The repeated slots, sorted; empty if all is well. Negative slots are padding, never duplicates.

    Example:
        >>> find_duplicate_slots([5, 2, 5, -1, -1]).tolist()
        [5]
    """
    if hasattr(slot_mapping, "cpu"):
        slot_mapping = slot_mapping.cpu()
    slots, counts = np.unique(np.asarray(slot_mapping), return_counts=True)
    return slots[(counts > 1) & (slots >= 0)]


def check_tables(
    block_tables: Any,
    seq_lens: Any,
    slot_mapping: Any = None,
    query_start_loc: Any = None,
    *,
    num_blocks: int,
    block_size: int,
) -> None:
    """Checks that the arrays that say where sequences lie agree with each other and with the cache.

    A check for debugging, outside jit and off the hot path: it reads the arrays on the host. The ops never look at
    these values before a launch. What they do with the ones that are refused here is defined, but not what anyone
    wants: they attend to fewer positions, write over another sequence's tokens, or return zeros.

    The last n positions of a sequence are those of its new tokens, n being `query_start_loc[s + 1] -
    query_start_loc[s]`, or 1 without query_start_loc. Where n is more than a sequence's length (left padding, or an
    empty sequence in decoding), the first of these tokens have no position, and must have no slot.

    Args:
        block_tables: Integers `(num_seqs, max_blocks)`: an array of NumPy, JAX or torch (on any device), or lists. Only
            entries within a sequence's length are looked at.
        seq_lens: Integers `(num_seqs,)`: tokens of each sequence once slot_mapping has been written, the new ones among
            them.
        slot_mapping: Integers `(n,)`: the slot of each new token; negative: it is not written. Entries after the last
            sequence's tokens are padding: negative, or beyond the cache. None: all new tokens are written.
        query_start_loc: Integers `(num_seqs + 1,)`, as in `paged_attention`; None: one new token for each sequence.
        num_blocks: Blocks of the cache, per layer.
        block_size: Slots of a block.

    Raises:
        ValueError: a shape does not fit; a length is negative or beyond the table; a block within a length is none of
            the cache; query_start_loc does not begin with 0, descends, or ends beyond slot_mapping; a slot is not where
            its token's position is, or its token has none; a block is written by two sequences, or by one that has it
            twice. A block that one sequence writes and others only read is fine.
        TypeError: an argument holds no integers.

    Example:
        >>> check_tables([[2, 0]], [3], [0], num_blocks=3, block_size=2)  # the new token is place 0 of block 0: fine
        >>> check_tables([[2, 0]], [5], num_blocks=3, block_size=2)
        Traceback (most recent call last):
        ValueError: seq_lens[0] must be at most 4, the positions of 2 blocks of 2, got 5
    """
    num_blocks, block_size = integer("num_blocks", num_blocks, 1), integer("block_size", block_size, 1)
    tables = _integers("block_tables", block_tables, ("num_seqs", "max_blocks"))
    num_seqs, max_blocks = tables.shape
    lengths = _integers("seq_lens", seq_lens, (num_seqs,))
    starts = np.arange(num_seqs + 1)
    if query_start_loc is not None:
        starts = _integers("query_start_loc", query_start_loc, (num_seqs + 1,))

    positions = max_blocks * block_size
    if (s := _first(lengths < 0)) is not None:
        raise ValueError(f"seq_lens[{s}] must be at least 0, got {lengths[s]}")
    if (s := _first(lengths > positions)) is not None:
        raise ValueError(
            f"seq_lens[{s}] must be at most {positions}, the positions of {max_blocks} blocks of {block_size}, "
            f"got {lengths[s]}"
        )
    column = np.arange(max_blocks)
    used = column < -(-lengths[:, None] // block_size)
    if (entry := _first(used & ((tables < 0) | (tables >= num_blocks)))) is not None:
        s, c = divmod(entry, max_blocks)
        raise ValueError(
            f"block_tables[{s}, {c}] must be at least 0 and below {num_blocks}, since sequence {s} has {lengths[s]} "
            f"positions, got {tables[s, c]}"
        )
    if starts[0] != 0:
        raise ValueError(f"query_start_loc[0] must be 0, got {starts[0]}")
    if (s := _first(starts[1:] < starts[:-1])) is not None:
        raise ValueError(
            f"query_start_loc[{s + 1}] must be at least {starts[s]}, as query_start_loc[{s}], got {starts[s + 1]}"
        )

    if slot_mapping is None:
        count = np.diff(starts)
        first = np.maximum(lengths - count, 0) // block_size
        written = used & (column >= first[:, None]) & (count > 0)[:, None]
    else:
        slots = _integers("slot_mapping", slot_mapping, ("n",))
        written = _check_slots(slots, tables, lengths, starts, query_start_loc is None, num_blocks, block_size)
    _check_writers(tables, used, written, num_blocks)


def _check_slots(
    slots: np.ndarray,
    tables: np.ndarray,
    lengths: np.ndarray,
    starts: np.ndarray,
    one_each: bool,
    num_blocks: int,
    block_size: int,
) -> np.ndarray:
    """Checks that each new token's slot is where its position is.

    Args:
        slots: The slot of each token, `[n]`.
        tables: Block tables, `[num_seqs, max_blocks]`.
        lengths: Tokens of each sequence, `[num_seqs]`.
        starts: Index of each sequence's first new token, and the end, `[num_seqs + 1]`.
        one_each: Whether each sequence has one new token, since nothing else was said.
        num_blocks: Blocks of the cache.
        block_size: Slots of a block.

    Returns:
        Which entries of the tables hold slots that are written, `[num_seqs, max_blocks]`.
    """
    num_seqs, end = len(lengths), int(starts[-1])
    if one_each:  # empty sequences at the end need no entry
        if (s := _first(lengths[len(slots) :] > 0)) is not None:
            raise ValueError(
                f"slot_mapping must have an entry for sequence {len(slots) + s}, which has "
                f"{lengths[len(slots) + s]} positions, got shape ({len(slots)},)"
            )
    elif end > len(slots):
        raise ValueError(
            f"query_start_loc[{num_seqs}] must be at most {len(slots)}, the entries of slot_mapping, got {end}"
        )
    behind = slots[end:]
    if (t := _first((behind >= 0) & (behind < num_blocks * block_size))) is not None:
        owners = f"there are {num_seqs} sequences" if one_each else f"query_start_loc ends at {end}"
        raise ValueError(f"slot_mapping[{end + t}] must be negative, since {owners}, got {behind[t]}")

    token = np.flatnonzero(slots[:end] >= 0)
    seq = np.searchsorted(starts, token, side="right") - 1
    position = lengths[seq] - starts[seq + 1] + token
    if (t := _first(position < 0)) is not None:
        raise ValueError(
            f"slot_mapping[{token[t]}] must be negative, since it is for position {position[t]} of sequence {seq[t]}, "
            f"got {slots[token[t]]}"
        )
    column = position // block_size
    wanted = tables[seq, column] * block_size + position % block_size
    if (t := _first(slots[token] != wanted)) is not None:
        raise ValueError(
            f"slot_mapping[{token[t]}] must be {wanted[t]}, position {position[t]} of sequence {seq[t]}, or negative, "
            f"got {slots[token[t]]}"
        )
    written = np.zeros(tables.shape, bool)
    written[seq, column] = True
    return written


def _check_writers(tables: np.ndarray, used: np.ndarray, written: np.ndarray, num_blocks: int) -> None:
    """Raises where two sequences write a block, or one writes a block that its table has twice.

    Args:
        tables: Block tables, `[num_seqs, max_blocks]`.
        used: Which of their entries lie within a sequence's length.
        written: Which of these hold slots of new tokens.
        num_blocks: Blocks of the cache.
    """
    is_written = np.zeros(num_blocks, bool)
    is_written[tables[written]] = True
    # Only entries for blocks that anyone writes are sorted: a cache may have millions of others.
    seq, column = np.nonzero(used & is_written[np.where(used, tables, 0)])
    block, writes = tables[seq, column], written[seq, column]

    # Sorted so, entries of one sequence for one block are neighbours, those that are written behind those that are not.
    order = np.lexsort((writes, block, seq))
    s, c, b = seq[order], column[order], block[order]
    if (i := _first((s[1:] == s[:-1]) & (b[1:] == b[:-1]) & writes[order][1:])) is not None:
        raise ValueError(
            f"block_tables[{s[i + 1]}, {c[i + 1]}] must be a block that sequence {s[i]} has once, since it writes it, "
            f"got {b[i]}, as block_tables[{s[i]}, {c[i]}]"
        )
    order = np.flatnonzero(writes)
    order = order[np.lexsort((seq[order], block[order]))]
    s, c, b = seq[order], column[order], block[order]
    if (i := _first(b[1:] == b[:-1])) is not None:
        raise ValueError(
            f"block_tables[{s[i + 1]}, {c[i + 1]}] must be a block that only sequence {s[i + 1]} writes, got {b[i]}, "
            f"as block_tables[{s[i]}, {c[i]}]"
        )


def _first(wrong: np.ndarray) -> int | None:
    """The index of the first True, counted in C order; None where there is none."""
    return int(wrong.argmax()) if wrong.any() else None


def _integers(name: str, argument: Any, shape: tuple[int | str, ...]) -> np.ndarray:
    """An array of int64 on the host, of this shape; a string in it stands for any size."""
    wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    try:
        array = np.asarray(argument.cpu() if hasattr(argument, "cpu") else argument)
    except ValueError as error:  # NumPy's, for lists of different lengths
        raise ValueError(f"{name} must have shape {wanted}, got lists of different lengths") from error
    if array.size == 0 and not hasattr(argument, "shape"):  # an empty list has no dtype, and hides inner axes
        array = np.zeros((0,) * len(shape) if array.shape == (0,) else array.shape, np.int64)
    if array.ndim != len(shape) or any(
        not isinstance(n, str) and n != got for n, got in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.dtype == np.uint64:  # larger ones are no block, length or slot either way
        array = np.minimum(array, np.uint64(np.iinfo(np.int64).max))
    return array.astype(np.int64)
