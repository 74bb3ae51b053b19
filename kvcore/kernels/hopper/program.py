"""What a program of a kernel for Hopper works on: its rows of query, and the tiles of positions that they see."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..sequences import CHUNK, cdiv, find_rows, find_span


class Arrays(NamedTuple):
    """Arguments of the kernel, and what a program found of them."""

    query_ptr: gl.tensor
    sinks_ptr: gl.tensor
    table_ptr: gl.tensor  # the sequence's row of block_tables
    num_blocks: gl.tensor
    layer: gl.tensor  # its index; 0 where the cache has no axis for it
    out_ptr: gl.tensor
    lse_ptr: gl.tensor


class Work(NamedTuple):
    """What the warps of a program share: tiles first_tile … first_tile + num_tiles - 1."""

    first_tile: gl.tensor
    num_tiles: gl.tensor
    begin_whole: gl.tensor  # tiles begin_whole … end_whole - 1, counted from first_tile, need no masks,
    end_whole: gl.tensor  #   unless the block table has holes
    first_token: gl.tensor  # as in Span
    first: gl.tensor
    limit: gl.tensor


@gluon.jit
def find_program(
    query_ptr, block_tables_ptr, seq_lens_ptr, query_start_loc_ptr, sinks_ptr, layer, num_tokens, num_seqs, max_blocks,
    table_stride, num_blocks, num_layers, out_ptr, lse_ptr, P: gl.constexpr,
):  # fmt: skip
    """The program's rows (maybe none), what they see, and the arrays. The arguments are those of the kernels."""
    T: gl.constexpr = P.tile
    index: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    lanes = gl.arange(0, CHUNK, layout=index)
    layer_id = gl.to_tensor(0)
    layer_exists = None
    if layer is not None:
        layer_id, layer_exists = _find_layer(layer, num_layers, P)
    rows, end, seq_len = find_rows(query_start_loc_ptr, seq_lens_ptr, num_tokens, num_seqs, lanes, P, T)
    span = find_span(rows, end, seq_len, max_blocks, layer_exists, P, T)
    table_ptr = block_tables_ptr + rows.seq.to(gl.int64) * table_stride
    arrays = Arrays(query_ptr, sinks_ptr, table_ptr, num_blocks, layer_id, out_ptr, lse_ptr)
    return rows, _find_work(rows, span, P, T), arrays


@gluon.jit
def _find_layer(layer, num_layers, P: gl.constexpr):
    """The layer's index, and whether the cache has it."""
    if P.layer_is_pointer:
        layer = gl.load(layer)
    exists = (layer >= 0) & (layer < num_layers)
    return gl.where(exists, layer, 0).to(gl.int32), exists


@gluon.jit
def _find_work(rows, span, P: gl.constexpr, T: gl.constexpr):
    """The tiles of a program, and which of them every row sees wholly."""
    Q: gl.constexpr = P.query
    OPTIONS: gl.constexpr = P.options
    first_tile = span.begin // T.positions
    end_tile = cdiv(span.end, T.positions)
    limit = span.limit
    begin_whole = first_tile
    if OPTIONS.causal:
        limit = gl.minimum(limit, span.first_token + rows.first // Q.q_per_kv + 1)
        if OPTIONS.sliding_window is not None:
            # In 64 bits: a window may be as long as the longest sequence.
            last_token = gl.minimum((rows.first + T.rows - 1) // Q.q_per_kv, rows.length - 1)
            seen = (span.first_token + last_token).to(gl.int64) - (OPTIONS.sliding_window - 1)
            begin_whole = cdiv(gl.maximum(seen, 0), T.positions).to(gl.int32)
    begin_whole = gl.minimum(gl.maximum(begin_whole, first_tile), end_tile)
    end_whole = gl.maximum(gl.minimum(gl.maximum(limit, 0) // T.positions, end_tile), begin_whole)
    return Work(
        first_tile, gl.maximum(end_tile - first_tile, 0), begin_whole - first_tile, end_whole - first_tile,
        span.first_token, span.first, span.limit,
    )  # fmt: skip
