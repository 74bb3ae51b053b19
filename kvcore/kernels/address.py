"""Where the elements of a row are, in the tokens' array and in the cache. Both described by kvcore.plan.rows.Rows.

    column = 0 … num_heads * head_size - 1,   head = column // head_size,   dim = column % head_size

    tokens' element  token·T + head·h + dim·d
    cache element    offset + layer·L + block·B + place·S + head·H + (dim // x)·D + (dim % x)·X

In the cache, columns count stored units: elements, or `pack` of them in one byte.

All strides, and so all alignments, are constexprs: that is what makes 128-bit accesses out of addresses that depend on
data. Offsets of tokens and slots have 64 bits, those within a row where they need it.
"""

import triton
import triton.language as tl


@triton.jit
def columns(R: tl.constexpr):
    """Columns of this program, and which of them the row has."""
    column = tl.program_id(1) * R.columns + tl.arange(0, R.columns)
    return column, column < R.num_heads * R.head_size


@triton.jit
def elements(R: tl.constexpr):
    """The elements of its columns, and which of them the row has."""
    WIDTH: tl.constexpr = R.columns * R.pack
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    return element, element < R.num_heads * R.head_size * R.pack


@triton.jit
def token_offsets(token, element, R: tl.constexpr):
    """Elements from the array's first to those of tokens, `[TOKENS, elements]`."""
    HEAD: tl.constexpr = R.head_size * R.pack
    if R.wide:
        element = element.to(tl.int64)
    if R.input_head_stride == HEAD * R.input_dim_stride:
        within = element * R.input_dim_stride
    else:
        within = (element // HEAD) * R.input_head_stride + (element % HEAD) * R.input_dim_stride
    return token[:, None] * R.token_stride + within[None, :]


@triton.jit
def cache_offsets(layer, block, place, column, R: tl.constexpr):
    """Units from the cache's first to those of slots, `[TOKENS, columns]`."""
    if R.wide:
        column = column.to(tl.int64)
    within = (column // R.head_size) * R.head_stride + dim_offset(column % R.head_size, R)
    return slot_offset(layer, block, place, R)[:, None] + within[None, :]


@triton.jit
def slot_offset(layer, block, place, R: tl.constexpr):
    """Units from the cache's first to the first head of slots."""
    return R.offset + layer * R.layer_stride + block * R.block_stride + place * R.slot_stride


@triton.jit
def dim_offset(dim, R: tl.constexpr):
    """Units from the first of a head to others."""
    if R.x > 1:
        within = (dim // R.x) * R.dim_stride + (dim % R.x) * R.x_stride
    else:
        within = dim * R.dim_stride
    return within


@triton.jit
def head_scale(scale_ptr, element, inside, R: tl.constexpr):
    """The static scales of elements: one for all, one for each, or None."""
    scale = scale_ptr
    if scale_ptr is not None:
        if R.scale_stride == 0:
            scale = tl.load(scale_ptr)
        else:
            head = element // (R.head_size * R.pack)
            scale = tl.load(scale_ptr + head * R.scale_stride, mask=inside, other=1)[None, :]
    return scale


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
