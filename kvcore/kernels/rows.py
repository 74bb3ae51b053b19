"""Where the elements of a row are, in the tokens' array and in the cache. Both described by kvcore.plan.Rows.

    column = 0 … num_heads * head_size - 1,   head = column // head_size,   dim = column % head_size

    tokens' element  token·T + head·h + dim·d
    cache element    offset + layer·L + block·B + place·S + head·H + (dim // x)·D + (dim % x)·X

All strides, and so all alignments, are constexprs: that is what makes 128-bit accesses out of addresses that depend on
data. Offsets of tokens and slots have 64 bits, those within a row where they need it.
"""

import triton
import triton.language as tl


@triton.jit
def columns(R: tl.constexpr):
    """Column indices of this program, and which of them the row has."""
    column = tl.program_id(1) * R.columns + tl.arange(0, R.columns)
    return column, column < R.num_heads * R.head_size


@triton.jit
def token_offsets(token, column, R: tl.constexpr):
    """Elements from the array's first to those of tokens `[TOKENS, columns]`."""
    if R.wide:
        column = column.to(tl.int64)
    if R.input_head_stride == R.head_size * R.input_dim_stride:
        within = column * R.input_dim_stride
    else:
        within = (column // R.head_size) * R.input_head_stride + (column % R.head_size) * R.input_dim_stride
    return token[:, None] * R.token_stride + within[None, :]


@triton.jit
def cache_offsets(layer, block, place, column, R: tl.constexpr):
    """Elements from the cache's first to those of slots `[TOKENS, columns]`."""
    if R.wide:
        column = column.to(tl.int64)
    head = column // R.head_size
    dim = column % R.head_size
    if R.x > 1:
        within = head * R.head_stride + (dim // R.x) * R.dim_stride + (dim % R.x) * R.x_stride
    else:
        within = head * R.head_stride + dim * R.dim_stride
    row = R.offset + layer * R.layer_stride + block * R.block_stride + place * R.slot_stride
    return row[:, None] + within[None, :]


@triton.jit
def layer_index(layer, LAYER_IS_POINTER: tl.constexpr):
    """The layer, `[1]`; 0 where the cache has no such axis."""
    index = tl.full([1], 0, tl.int64)
    if layer is not None:
        if LAYER_IS_POINTER:
            index += tl.load(layer)
        else:
            index += layer
    return index
