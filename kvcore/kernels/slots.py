"""The slots of new tokens, out of block tables.

A program takes TOKENS tokens. Token t belongs to the sequence before the first one that begins after t: starts that
descend are passed over, as `sequences` has it, so that no binary search would find it. In two steps:

    all starts, CHUNK at a time     between which of them the program's tokens lie: mostly, few
    these few, LANES at a time      [TOKENS, LANES]: which of them is the first after each token
"""

import triton
import triton.language as tl

from .reduce import minimum
from .sequences import CHUNK

_LONGEST = tl.constexpr(2**31 - 1)  # a length, a start, and a slot


@triton.jit
def slot_mapping_kernel(
    block_tables_ptr,     # [num_seqs, max_blocks]
    query_start_loc_ptr,  # [num_seqs + 1], or None: token t is that of sequence t
    seq_lens_ptr,         # [num_seqs]
    num_tokens,           # entries of slots
    num_seqs,
    max_blocks,
    table_stride,         # entries from one row of block_tables to the next
    slots_ptr,            # [num_tokens] int32
    BLOCK_SIZE: tl.constexpr,
    TABLE_STEP: tl.constexpr,    # entries from one block of a row to the next
    START_STRIDE: tl.constexpr,  # entries from one start to the next
    LENS_STRIDE: tl.constexpr,   # entries from one length to the next
    TOKENS: tl.constexpr,        # tokens of a program, a power of two
    LANES: tl.constexpr,         # starts that are compared with each of them at a time, a power of two
):  # fmt: skip
    """Writes the slot of each token; -1 where it has none."""
    first = tl.program_id(0) * TOKENS
    token = first + tl.arange(0, TOKENS)
    if query_start_loc_ptr is None:
        after = token + 1
        end = after
        mapped = token < num_seqs
    else:
        after = _first_after(query_start_loc_ptr, token, first, num_tokens, num_seqs, START_STRIDE, TOKENS, LANES)
        mapped = (after > 0) & (after <= num_seqs)
        end = tl.load(query_start_loc_ptr + after.to(tl.int64) * START_STRIDE, mask=mapped, other=0)
        end = tl.minimum(end, _LONGEST).to(tl.int32)
    seq = (after - 1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq * LENS_STRIDE, mask=mapped, other=0)
    position = tl.minimum(tl.maximum(seq_len, 0), _LONGEST).to(tl.int32) - end + token
    mapped = mapped & (position >= 0)
    position = tl.maximum(position, 0)
    column = position // BLOCK_SIZE
    mapped = mapped & (column < max_blocks)
    entry = seq * table_stride + column.to(tl.int64) * TABLE_STEP
    block = tl.load(block_tables_ptr + entry, mask=mapped, other=-1)
    mapped = (block >= 0) & (block <= _LONGEST // BLOCK_SIZE)
    # A slot past _LONGEST, of the last block of these, wraps to a negative one.
    slot = tl.where(mapped, block, 0).to(tl.int32) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slots_ptr + token, tl.where(mapped & (slot >= 0), slot, -1), mask=token < num_tokens)


@triton.jit
def _first_after(
    query_start_loc_ptr, token, first, num_tokens, num_seqs, START_STRIDE: tl.constexpr, TOKENS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The index of the first start after each token, `[TOKENS]`; num_seqs + 1 where there is none.

    Tokens are `first`, `first + 1`, …
    """
    last = tl.minimum(first + TOKENS, num_tokens) - 1
    lowest = num_seqs + 1  # for the first token
    highest = num_seqs + 1  # for the last one
    for chunk in range(0, num_seqs + 1, CHUNK):
        j = chunk + tl.arange(0, CHUNK)
        exists = j <= num_seqs
        start = tl.load(query_start_loc_ptr + j.to(tl.int64) * START_STRIDE, mask=exists, other=0)
        lowest = tl.minimum(lowest, minimum(tl.where(exists & (start > first), j, num_seqs + 1), 0))
        highest = tl.minimum(highest, minimum(tl.where(exists & (start > last), j, num_seqs + 1), 0))
    # What is after the last token is after them all. One of those in between is for some that come earlier.
    after = tl.full([TOKENS], 0, tl.int32) + highest
    for chunk in range(lowest, highest, LANES):
        j = chunk + tl.arange(0, LANES)
        exists = j < highest
        start = tl.load(query_start_loc_ptr + j.to(tl.int64) * START_STRIDE, mask=exists, other=0)
        is_after = exists[None, :] & (start[None, :] > token[:, None])
        after = tl.minimum(after, minimum(tl.where(is_after, j[None, :], highest), 1))
    return after
