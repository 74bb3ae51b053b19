"""Which query rows a program takes, of which sequence, and which positions they see.

The query heads that share a KV head and the tokens of a sequence make its *query rows*:

    row = token * q_per_kv + query head - KV head * q_per_kv        token counts from the sequence's first in query

They are cut into tiles of ROWS, and tiles are numbered over all sequences. Sequence s begins at token begin[s] of query
and with tile begin[s] * q_per_kv // ROWS + s + 1: each sequence has room for a last tile that is not full. Tile 0 and
those past the last sequence have the tokens that belong to none: they see no position, and their results are zeros.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .address import layer_index
from .reduce import maximum, minimum, total

# Neither seq_lens nor query_start_loc is checked: whatever they hold is brought into a range where no sum overflows.
_LONGEST = tl.constexpr(2**31 - 1)
_FAR_BELOW = tl.constexpr(-(2**30))

CHUNK = tl.constexpr(1024)  # entries of query_start_loc or of a block table that are loaded at a time


class RowTile(NamedTuple):
    """A program's query rows: first, first + 1, … of one sequence, for one KV head, below length * q_per_kv."""

    head: tl.tensor  # the KV head
    seq: tl.tensor
    start: tl.tensor  # token of query that is the sequence's first
    length: tl.tensor  # tokens of query that are the sequence's
    first: tl.tensor  # row


class Span(NamedTuple):
    """Positions of a sequence: those that a program's rows see, and those of them that the program takes."""

    first_token: tl.tensor  # position of the sequence's first token of query; may be below 0
    first: tl.tensor  # the first that any row sees
    limit: tl.tensor  # one past the last that any row sees
    begin: tl.tensor  # the program takes begin … end - 1; both are multiples of a tile's positions
    end: tl.tensor


@triton.jit
def cdiv(a, b):
    """The quotient, rounded up. `tl.cdiv` is not usable here, for the reason that `reduce.py` has for `tl.sum`."""
    return (a + b - 1) // b


@triton.jit
def find_rows(query_start_loc_ptr, seq_lens_ptr, num_tokens, num_seqs, lanes, P: tl.constexpr, T: tl.constexpr):
    """Finds this program's rows.

    Returns the rows, the token of query where query_start_loc ends their sequence, and the sequence's length.
    `lanes` is 0 … CHUNK - 1: an argument, because Gluon's has a layout.

    Programs go over all tiles of P.heads_at_once heads, then of as many more: what runs at a time reads few heads,
    whose K and V stay in the L2 cache. Tiles are taken from the last to the first: later ones of a prefill see more,
    and short ones fill gaps at the end.
    """
    Q: tl.constexpr = P.query
    HEADS: tl.constexpr = P.heads_at_once
    num_tiles = tl.num_programs(0) // Q.num_kv_heads
    program = tl.program_id(0)
    head = program % HEADS
    tile = num_tiles - 1 - program // HEADS
    if Q.num_kv_heads > HEADS:
        head += program // (num_tiles * HEADS) * HEADS
        tile = num_tiles - 1 - program % (num_tiles * HEADS) // HEADS
    if P.ragged:
        seq, start = _find_sequence(query_start_loc_ptr, tile, num_seqs, num_tokens, lanes, P, T)
        first = (tile - (start * Q.q_per_kv // T.rows + seq + 1)) * T.rows
        end = tl.load(query_start_loc_ptr + (seq + 1) * Q.start_stride, mask=seq < num_seqs, other=num_tokens)
        length = tl.maximum(tl.minimum(end, num_tokens), 0).to(tl.int32) - start
        seq_len = tl.load(seq_lens_ptr + seq * Q.lens_stride, mask=(seq >= 0) & (seq < num_seqs), other=0)
    else:
        TILES_PER_SEQ: tl.constexpr = (Q.q_per_kv + T.rows - 1) // T.rows
        seq = tile // TILES_PER_SEQ
        first = (tile % TILES_PER_SEQ) * T.rows
        start = seq
        end = start + 1
        length = end - start
        seq_len = tl.load(seq_lens_ptr + seq * Q.lens_stride)
    seq_len = tl.minimum(tl.maximum(seq_len, 0), _LONGEST).to(tl.int32)
    return RowTile(head, seq, start, length, first), end, seq_len


@triton.jit
def _find_sequence(query_start_loc_ptr, tile, num_seqs, num_tokens, lanes, P: tl.constexpr, T: tl.constexpr):
    """The sequence that a tile of rows belongs to, and its first token of query.

    -1 and num_seqs stand for the tokens before and after all sequences. A sequence begins no earlier than the ones
    before it do, even where query_start_loc says otherwise.
    """
    Q: tl.constexpr = P.query
    # Sequence s begins after the tile if begin[j] * q_per_kv // ROWS + s + 1 > tile for any j ≤ s. The first that does:
    after = num_seqs + 1
    for chunk in range(0, num_seqs + 1, CHUNK):
        j = chunk + lanes
        begin = _begins(query_start_loc_ptr, j, num_seqs, num_tokens, P)
        first_after = tl.maximum(j, tile - begin * Q.q_per_kv // T.rows)
        after = tl.minimum(after, minimum(tl.where(j <= num_seqs, first_after, after), 0))
    start = 0
    for chunk in range(0, after, CHUNK):
        j = chunk + lanes
        begin = _begins(query_start_loc_ptr, j, num_seqs, num_tokens, P)
        start = tl.maximum(start, maximum(tl.where(j < after, begin, 0), 0))
    return after - 1, start


@triton.jit
def _begins(query_start_loc_ptr, s, num_seqs, num_tokens, P: tl.constexpr):
    """Where sequences s begin in query, brought into 0 … num_tokens; of the shape of `s`."""
    Q: tl.constexpr = P.query
    start = tl.load(query_start_loc_ptr + s * Q.start_stride, mask=s <= num_seqs, other=0)
    return tl.minimum(tl.maximum(start, 0), num_tokens).to(tl.int32)


@triton.jit
def has_layer(layer, num_layers, P: tl.constexpr):
    """Whether the cache has the layer; None where it has no axis for it."""
    exists = None
    if layer is not None:
        index = layer_index(layer, P.layer_is_pointer)
        exists = total(((index >= 0) & (index < num_layers)).to(tl.int32), 0) > 0
    return exists


@triton.jit
def find_span(rows, end, seq_len, max_blocks, layer_exists, P: tl.constexpr, T: tl.constexpr):
    """The positions that a program's rows see, and the split of them that it takes.

    Args:
        rows: The rows.
        end: One past the sequence's last token of query, as query_start_loc has it.
        seq_len: Positions of the sequence. The last of them is that of the token before end.
        max_blocks: Entries of a row of block_tables.
        layer_exists: From `has_layer`. Where there is no such layer, rows see no position.
        P: All constants.
        T: The tile.
    """
    Q: tl.constexpr = P.query
    OPTIONS: tl.constexpr = P.options
    first_token = tl.maximum(seq_len.to(tl.int64) - end + rows.start, _FAR_BELOW).to(tl.int32)
    limit = tl.minimum(seq_len, max_blocks * P.block_size)
    first = 0
    if OPTIONS.causal:
        last_token = tl.minimum((rows.first + T.rows - 1) // Q.q_per_kv, rows.length - 1)
        limit = tl.minimum(limit, first_token + last_token + 1)
        if OPTIONS.sliding_window is not None:
            token = rows.first // Q.q_per_kv
            first = tl.maximum(tl.maximum(first_token + token, -1) - (OPTIONS.sliding_window - 1), 0)
    if layer_exists is not None:
        limit = tl.where(layer_exists, limit, 0)
    end_tile = cdiv(tl.maximum(limit, 0), T.positions)
    first_tile = tl.minimum(first // T.positions, end_tile)
    if P.split:
        share = tl.maximum(cdiv(end_tile - first_tile, tl.num_programs(1)), P.min_tiles)
        first_tile = tl.minimum(first_tile + tl.program_id(1) * share, end_tile)
        end_tile = tl.minimum(first_tile + share, end_tile)
    return Span(first_token, first, limit, first_tile * T.positions, end_tile * T.positions)


@triton.jit
def all_blocks_exist(table_ptr, num_entries, num_blocks, lanes, P: tl.constexpr):
    """Whether the first num_entries entries of a row of block_tables all name a block that exists."""
    Q: tl.constexpr = P.query
    missing = 0
    for chunk in range(0, num_entries, CHUNK):
        entry = chunk + lanes
        block = tl.load(table_ptr + entry * Q.table_step, mask=entry < num_entries, other=0)
        missing += total(((block < 0) | (block >= num_blocks)).to(tl.int32), 0)
    return missing == 0
