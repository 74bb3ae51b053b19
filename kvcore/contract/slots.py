"""The contract of `slot_mapping`: every check, every error message, once for both frameworks."""

from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec, check_integers, python_integers
from kvcore.contract.checks import check_devices, check_indices

_MOST = 2**31 - 1
"""What an int32 holds: of slots, and of tokens."""


class SlotMapping(NamedTuple):
    """A call of `slot_mapping` that fulfils the contract; hashable.

    Attributes:
        block_tables: The spec of block_tables.
        query_start_loc: The spec of query_start_loc, or None for one token a sequence.
        seq_lens: The spec of seq_lens.
        block_size: Slots of a block.
        num_tokens: Entries of the result.
    """

    block_tables: ArraySpec
    query_start_loc: ArraySpec | None
    seq_lens: ArraySpec
    block_size: int
    num_tokens: int


def check_slot_mapping(
    block_tables: ArraySpec,
    query_start_loc: ArraySpec | None,
    seq_lens: ArraySpec,
    block_size: Any,
    num_tokens: Any,
) -> SlotMapping:
    """Checks the arguments of `slot_mapping`.

    Args:
        block_tables: `(num_seqs, max_blocks)`.
        query_start_loc: `(num_seqs + 1,)`, or None for one token a sequence.
        seq_lens: `(num_seqs,)`.
        block_size: Slots of a block.
        num_tokens: Entries of the result; None: one a sequence, only without query_start_loc. With it, the frameworks
            read where it ends, if they can.

    Raises:
        ValueError: a shape, a number or a device does not fit, or num_tokens is not known.
        TypeError: a dtype or a type does not fit.
    """
    check_indices("block_tables", block_tables, ("num_seqs", "max_blocks"))
    num_seqs = block_tables.shape[0]
    if query_start_loc is not None:
        check_indices("query_start_loc", query_start_loc, (num_seqs + 1,))
    check_indices("seq_lens", seq_lens, (num_seqs,))
    check_integers(block_size=block_size, num_tokens=num_tokens)
    if block_size is None:
        raise TypeError("block_size must be an int, got None")
    if not 1 <= block_size <= _MOST:
        raise ValueError(f"block_size must be at least 1 and below {_MOST + 1}, got {block_size}")
    if num_tokens is not None:
        if not 0 <= num_tokens <= _MOST:
            raise ValueError(f"num_tokens must be at least 0 and below {_MOST + 1}, got {num_tokens}")
    elif query_start_loc is not None:
        raise ValueError(
            "num_tokens must be given where query_start_loc cannot be read: under jit, vmap and torch.compile, and "
            "while a CUDA graph is captured; got None"
        )
    named = [("query_start_loc", query_start_loc), ("seq_lens", seq_lens)]
    check_devices(named, "block_tables", block_tables)
    size, count = python_integers(block_size, num_seqs if num_tokens is None else num_tokens)
    return SlotMapping(block_tables, query_start_loc, seq_lens, size, count)
