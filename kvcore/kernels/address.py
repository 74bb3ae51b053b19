"""Where elements are: in arrays of tokens, and in the cache.

Arrays of tokens, which kvcore.plan.rows.Rows describes, have elements; the cache has stored units, each an element or a
byte that holds two of them. Along a token row, all heads are one axis:

    column = 0 … num_heads * head_units - 1     a stored unit: head = column // head_units, unit = column % head_units
    element = column * elements_per_unit        the first, or only, element that it holds

    token's element   offset + token·T + head·h + dim·d        or, where heads lie in groups of g,
                      offset + token·T + (head // g)·G + (head % g)·h + dim·d
    cache's unit      offset + layer·L + block·B + place·S + head·H + (unit // x)·D + (unit % x)·X

`place` is a slot's index in its block. The second formula is kvcore.placement.Address, a constexpr, as all strides
are: known strides, and so known alignments, are what lets the compiler move 128 bits at a time although slots are data.
Offsets of tokens and slots have 64 bits; those within a token row have them where R.wide says that they need them.

R is kvcore.plan.rows.Rows, of K or of V.
"""

import triton
import triton.language as tl


@triton.jit
def columns(R: tl.constexpr):
    """This program's columns of token rows, `[columns]`, and which of them the rows have."""
    column = tl.program_id(1) * R.columns + tl.arange(0, R.columns)
    return column, column < R.num_heads * R.head_units


@triton.jit
def elements(R: tl.constexpr):
    """The elements of those columns, `[columns * elements_per_unit]`, and which of them the rows have."""
    WIDTH: tl.constexpr = R.columns * R.elements_per_unit
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    return element, element < R.num_heads * R.head_units * R.elements_per_unit


@triton.jit
def token_offsets(token, element, R: tl.constexpr):
    """Offsets in an array of tokens, counted in elements, `[TOKENS, elements]`.

    `token`, `[TOKENS]`, is a token's index in the array; `element`, `[elements]`, is an element's in its token row.
    """
    HEAD_SIZE: tl.constexpr = R.head_units * R.elements_per_unit
    GROUPS: tl.constexpr = R.groups
    if R.wide:
        element = element.to(tl.int64)
    if GROUPS is None and R.head_stride == HEAD_SIZE * R.dim_stride:
        within = element * R.dim_stride
    else:
        within = head_offset(element // HEAD_SIZE, R) + (element % HEAD_SIZE) * R.dim_stride
    return (R.offset + token * R.token_stride)[:, None] + within[None, :]


@triton.jit
def head_offset(head, R: tl.constexpr):
    """Offsets of heads from the beginning of their token, in an array of tokens; of the shape of `head`.

    R may be any description with `head_stride` and `groups`.
    """
    GROUPS: tl.constexpr = R.groups
    if GROUPS is None:
        offset = head * R.head_stride
    else:
        offset = (head // GROUPS.size) * GROUPS.stride + (head % GROUPS.size) * R.head_stride
    return offset


@triton.jit
def cache_offsets(layer, block, place, column, R: tl.constexpr):
    """Offsets in the cache, counted in stored units, of the columns of token rows: `[TOKENS, columns]`.

    `layer` is `[1]`, `block` and `place` are `[TOKENS]`, `column` is `[columns]`.
    """
    ADDRESS: tl.constexpr = R.address
    if R.wide:
        column = column.to(tl.int64)
    within = (column // R.head_units) * ADDRESS.head + unit_offset(column % R.head_units, ADDRESS)
    return slot_offset(layer, block, place, ADDRESS)[:, None] + within[None, :]


@triton.jit
def slot_offset(layer, block, place, ADDRESS: tl.constexpr):
    """Offsets of slots in the cache, where their first head begins; of the shape of `block` and `place`."""
    return ADDRESS.offset + layer * ADDRESS.layer + block * ADDRESS.block + place * ADDRESS.slot


@triton.jit
def head_row_offsets(layer, block, place, head, unit, ADDRESS: tl.constexpr):
    """Offsets in the cache of units of one head of a slot each, `[ROWS, units]`.

    `block`, `place` and `head` are `[ROWS]`, or `[1]` where all rows have the same, `unit` is `[units]`.
    """
    row_offset = slot_offset(layer, block, place, ADDRESS) + head * ADDRESS.head
    return row_offset[:, None] + unit_offset(unit, ADDRESS)[None, :]


@triton.jit
def unit_offset(unit, ADDRESS: tl.constexpr):
    """Offsets of units from the beginning of their head; of the shape of `unit`."""
    if ADDRESS.x > 1:
        within = (unit // ADDRESS.x) * ADDRESS.dim + (unit % ADDRESS.x) * ADDRESS.x_stride
    else:
        within = unit * ADDRESS.dim
    return within


@triton.jit
def layer_index(layer, LAYER_IS_POINTER: tl.constexpr):
    """The layer's index, `[1]`; 0 where the cache has no axis for it and layer is None."""
    index = tl.full([1], 0, tl.int64)
    if layer is not None:
        if LAYER_IS_POINTER:
            index += tl.load(layer)
        else:
            index += layer
    return index


@triton.jit
def scales_of_layer(scale_ptr, layer, num_layers, LAYER_IS_POINTER: tl.constexpr, STRIDE: tl.constexpr):
    """Where a layer's static scales begin. STRIDE is from one layer's to the next, 0 where all have the same.

    Of a layer that the cache does not have, it is the nearest one's: they are read before that is known.
    """
    if STRIDE != 0:
        index = layer
        if LAYER_IS_POINTER:
            index = tl.load(layer)
        index = tl.minimum(tl.maximum(index, 0), num_layers - 1)
        scale_ptr += index.to(tl.int64) * STRIDE
    return scale_ptr


@triton.jit
def in_layer(mask, layer, index, num_layers):
    """The mask; all of it False where the cache has no layer of that index."""
    if layer is not None:
        mask = mask & (index >= 0) & (index < num_layers)
    return mask
