"""Read heads of K and V out of a cache, in words: of one stored unit each, or of two bytes that lie side by side.

A word holds one, two or four elements: tensor cores take 16-bit words from shared memory as they lie, where bytes would
be carried one by one. Words are not taken apart into one long head: element i of all words makes a matrix of its own,
which is multiplied with the elements i of query's words (of K), or summed on its own (of V).

C is kvcore.plan.attention_constants.CacheRows, of K, of V or of the rotary part.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .address import slot_offset, unit_offset
from .decode import decode, decode_element, narrow, widen
from .scales import spread


class Pages(NamedTuple):
    """What a program reads: the cache, one sequence's row of the block table, one KV head, one layer."""

    key_cache_ptr: tl.tensor
    value_cache_ptr: tl.tensor
    k_scale_ptr: tl.tensor
    v_scale_ptr: tl.tensor
    table_ptr: tl.tensor
    num_blocks: tl.tensor
    head: tl.tensor
    layer: tl.tensor  # [1]


class Slots(NamedTuple):
    """Where the positions of a tile are in the cache."""

    block: tl.tensor  # [POSITIONS]
    place: tl.tensor  # [POSITIONS], in the block
    exists: tl.tensor  # [POSITIONS]: False past the ends, before the window, and where the table names no block


@triton.jit
def find_slots(pages, n, first, limit, MASKED: tl.constexpr, P: tl.constexpr):
    """The slots of positions n, `[POSITIONS]`. Unless MASKED, all of them exist.

    Positions below first, which a window has passed, are not looked up: their blocks may be freed, and hold anything.
    """
    Q: tl.constexpr = P.query
    OPTIONS: tl.constexpr = P.options
    if MASKED:
        exists = n < limit
        if OPTIONS.sliding_window is not None:
            exists = exists & (n >= first)
        block = tl.load(pages.table_ptr + n // P.block_size * Q.table_step, mask=exists, other=-1)
        exists = exists & (block >= 0) & (block < pages.num_blocks)
    else:
        block = tl.load(pages.table_ptr + n // P.block_size * Q.table_step)
        exists = n >= 0
    return Slots(block, n % P.block_size, exists)


@triton.jit
def load_words(cache_ptr, pages, slots, FIRST: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """Words FIRST … FIRST + SIZE - 1 of heads in slots, `[POSITIONS, SIZE]`; zeros where there are none."""
    ADDRESS: tl.constexpr = C.address
    if C.units_per_word == 2:
        cache_ptr = cache_ptr.to(tl.pointer_type(tl.uint16))
    word = FIRST + tl.arange(0, SIZE)
    if C.wide:  # any of the axes may be the outermost one
        layer = pages.layer
        block = slots.block.to(tl.int64)
        place = slots.place.to(tl.int64)
        head = pages.head.to(tl.int64)
        word = word.to(tl.int64)
    else:
        layer = pages.layer.to(tl.int32)
        block = slots.block.to(tl.int32)
        place = slots.place
        head = pages.head
    head_offset = slot_offset(layer, block, place, ADDRESS) + head * ADDRESS.head
    words = cache_ptr + head_offset[:, None] + unit_offset(word, ADDRESS)[None, :]
    if C.words < FIRST + SIZE:
        x = tl.load(words, mask=slots.exists[:, None] & (word < C.words)[None, :], other=0)
    elif MASKED:
        x = tl.load(words, mask=slots.exists[:, None], other=0)
    else:
        x = tl.load(words)
    return x


@triton.jit
def load_position_scales(scale_cache_ptr, pages, slots, S: tl.constexpr):
    """Scales of each position's head, `[POSITIONS]`, out of a scale cache. S is kvcore.plan.rows.ScaleRows."""
    ADDRESS: tl.constexpr = S.address
    slot = slot_offset(pages.layer, slots.block.to(tl.int64), slots.place, ADDRESS)
    offset = slot + pages.head.to(tl.int64) * ADDRESS.head
    return tl.load(scale_cache_ptr + offset, mask=slots.exists, other=0)


@triton.jit
def load_word_scales(cache_ptr, pages, slots, FIRST: tl.constexpr, SIZE: tl.constexpr, POSITIONS: tl.constexpr,
                     C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The scales of words FIRST … FIRST + SIZE - 1, `[POSITIONS, SIZE]`, out of the cache's own memory.

    None where no scales lie there. Scales of 8 bits come as floats of P.compute, which holds the product of any of them
    with any element exactly; those of 32 bits stay float32.
    """
    COMPUTE: tl.constexpr = P.compute
    S: tl.constexpr = C.scales
    scale = None
    if S is not None:
        if S.inside:
            ADDRESS: tl.constexpr = S.address
            FORMAT: tl.constexpr = S.format
            GROUP: tl.constexpr = S.group // C.elements_per_word  # words that share one
            group = FIRST // GROUP + tl.arange(0, SIZE // GROUP)
            head_offset = slot_offset(pages.layer, slots.block.to(tl.int64), slots.place, ADDRESS)
            head_offset = head_offset + pages.head.to(tl.int64) * ADDRESS.head
            offset = head_offset[:, None] + unit_offset(group, ADDRESS)[None, :]
            mask = slots.exists[:, None] & (group * GROUP < C.words)[None, :]
            if FORMAT.bits == 8:
                scale = tl.load(cache_ptr.to(tl.pointer_type(tl.uint8)) + offset, mask=mask, other=0)
                scale = narrow(decode(scale, FORMAT, False), COMPUTE)
            else:
                scale = tl.load(cache_ptr.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0)
            scale = spread(scale, POSITIONS, SIZE, GROUP)
    return scale


@triton.jit
def element_of(words, scale, ELEMENT: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Element ELEMENT of each word, `[POSITIONS, words]`, times the words' scales, if any, as floats of P.compute."""
    FORMAT: tl.constexpr = C.format
    COMPUTE: tl.constexpr = P.compute
    if scale is None:
        x = decode_element(words, ELEMENT, C.elements_per_word, FORMAT, COMPUTE, P.hardware)
    elif scale.dtype == tl.float32:
        element = (words >> (ELEMENT * FORMAT.bits)).to(tl.uint8)
        x = narrow(widen(decode(element, FORMAT, P.hardware)) * scale, COMPUTE)
    else:
        x = decode_element(words, ELEMENT, C.elements_per_word, FORMAT, COMPUTE, P.hardware) * scale
    return x
