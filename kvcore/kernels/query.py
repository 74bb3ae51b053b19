"""Load rows of query, as they are multiplied with words of K.

A row has up to three pieces, as a head of K has them in the cache: the main one, whose columns are a power of two; the
rest, where a second power of two covers the head; the rotary part, where that is stored in a format of its own. A piece
is a tuple with one matrix `[ROWS, words]` for each element of a word.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .decode import narrow, widen
from .reduce import maximum
from .softmax import LOG2E

# A float32 stores its exponent with 127 added: 2^e has e + 127, and its reciprocal -e + 127, so the two add up to 254.
# 2^126 is the largest power of two whose reciprocal is a normal number.
_EXPONENT = tl.constexpr(0x7F800000)  # the bits of the exponent
_SUM = tl.constexpr(254 << 23)  # the bits of a power of two plus those of its reciprocal
_LARGEST_POWER = tl.constexpr(253 << 23)  # the bits of 2^126


class Query(NamedTuple):
    """Rows of query."""

    main: tl.tuple
    rest: tl.tuple  # empty if there is none
    rope: tl.tuple  # empty if there is none
    scale: tl.tensor  # [ROWS]: makes logits to base 2 of scores; never negative
    position: tl.tensor  # [ROWS]: where the row's token stands in its sequence; one number where rows see the same


@triton.jit
def load_query(query_ptr, k_scale_ptr, head, row_offset, inside, position, P: tl.constexpr, T: tl.constexpr):
    """The rows at offsets `[ROWS]` of query, of those that are inside, for a KV head."""
    K: tl.constexpr = P.k
    ROPE: tl.constexpr = P.rope
    main = _load_piece(query_ptr, row_offset, inside, 0, 0, K.main, K, P)
    rest = ()
    rope = ()
    if K.rest > 0:
        rest = _load_piece(query_ptr, row_offset, inside, 0, K.main, K.rest, K, P)
    if ROPE is not None:
        rope = _load_piece(query_ptr, row_offset, inside, K.words * K.elements_per_word, 0, ROPE.main, ROPE, P)

    Q: tl.constexpr = P.query
    OPTIONS: tl.constexpr = P.options
    scale = tl.full([T.rows], OPTIONS.scale * LOG2E, tl.float32)
    if k_scale_ptr is not None:
        KS: tl.constexpr = K.scales
        if KS is None or KS.inside:  # else the scale cache, whose scales differ from position to position
            scale = scale * tl.load(k_scale_ptr + head * Q.k_scale_stride)
    # The sign goes to query: where tiles need no mask, the largest product is found before it is scaled.
    factor = tl.where(scale < 0, -1.0, 1.0)
    scale = tl.abs(scale)
    COMPUTE: tl.constexpr = P.compute
    if COMPUTE.mantissa_bits == 10:
        # Each row is divided by a power of two near its largest magnitude, so that float16 can hold it. That is exact
        # for elements that are at least 2^-14 of that power; smaller ones become multiples of 2^-24 of it.
        largest = _largest(main, K)
        if K.rest > 0:
            largest = tl.maximum(largest, _largest(rest, K))
        if ROPE is not None:
            largest = tl.maximum(largest, _largest(rope, ROPE))
        power = tl.minimum(largest.to(tl.uint32, bitcast=True) & _EXPONENT, _LARGEST_POWER)
        factor = factor * (_SUM - power).to(tl.float32, bitcast=True)
        scale = scale * power.to(tl.float32, bitcast=True)

    main = _times(main, factor, K, COMPUTE)
    if K.rest > 0:
        rest = _times(rest, factor, K, COMPUTE)
    if ROPE is not None:
        rope = _times(rope, factor, ROPE, COMPUTE)
    return Query(main, rest, rope, scale, position)


@triton.jit
def _load_piece(query_ptr, row_offset, inside, DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
                C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """What is multiplied with words FIRST … FIRST + SIZE - 1 of the heads that C describes.

    In query, these begin at element DIM of a head. Returns `[ROWS, SIZE]` for each element of a word.
    """
    ELEMENTS: tl.constexpr = C.elements_per_word
    piece = (_load_element(query_ptr, row_offset, inside, DIM, FIRST, SIZE, C, P),)
    for element in tl.static_range(1, ELEMENTS):
        piece = piece + (_load_element(query_ptr, row_offset, inside, DIM + element, FIRST, SIZE, C, P),)
    return piece


@triton.jit
def _load_element(query_ptr, row_offset, inside, DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
                  C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """What is multiplied with one element of each word, `[ROWS, SIZE]`: bfloat16 if P.compute is that, else float32."""
    Q: tl.constexpr = P.query
    COMPUTE: tl.constexpr = P.compute
    word = FIRST + tl.arange(0, SIZE)
    dim = word * C.elements_per_word + DIM
    q = tl.load(
        query_ptr + row_offset[:, None] + dim[None, :] * Q.dim_stride,
        mask=inside[:, None] & (word < C.words)[None, :],
        other=0,
    )
    if COMPUTE.mantissa_bits != 7:
        q = widen(q)
    return q


@triton.jit
def _largest(piece, C: tl.constexpr):
    """The largest magnitude of each row of a piece, `[ROWS]`."""
    ELEMENTS: tl.constexpr = C.elements_per_word
    largest = maximum(tl.abs(piece[0]), 1)
    for element in tl.static_range(1, ELEMENTS):
        largest = tl.maximum(largest, maximum(tl.abs(piece[element]), 1))
    return largest


@triton.jit
def _times(piece, factor, C: tl.constexpr, COMPUTE: tl.constexpr):
    """A piece times a factor for each row, as floats of COMPUTE."""
    ELEMENTS: tl.constexpr = C.elements_per_word
    product = (narrow(piece[0] * factor[:, None], COMPUTE),)
    for element in tl.static_range(1, ELEMENTS):
        product = product + (narrow(piece[element] * factor[:, None], COMPUTE),)
    return product
