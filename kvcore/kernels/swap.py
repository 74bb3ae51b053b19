"""Copy blocks of one cache to blocks of another one: between a device's memory and the host's, or within one.

The host's memory is pinned, so that a device reaches it by the bus: it loads and stores there as in its own memory. A
program moves one slice of one pair's block: some words of one array, layers and heads and all else among them. No
program reads what another writes.

R and Q are kvcore.plan.blocks.BlockRows of one array: of what is read, and of what is written.
"""

import triton
import triton.language as tl

from .block_words import as_words, word_offsets


@triton.jit
def _swap_slice(
    source_ptr, array_ptr, part, batch, source, target, R: tl.constexpr, Q: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Copies a slice of a block, if it is of this array."""
    if (part >= Q.first_slice) & (part < Q.first_slice + Q.slices):
        old = as_words(source_ptr, batch, R) + source * R.block_stride
        new = as_words(array_ptr, batch, Q) + target * Q.block_stride
        begin = (part - Q.first_slice).to(tl.int64 if Q.wide else tl.int32) * (TILES * TILE)
        for tile in tl.static_range(TILES):
            index = begin + tile * TILE + tl.arange(0, TILE)
            mask = index < Q.words
            tl.store(new + word_offsets(index, Q), tl.load(old + word_offsets(index, R), mask=mask), mask=mask)


@triton.jit
def swap_blocks_kernel(
    first_source_ptr,   # an array of the cache that is read
    second_source_ptr,  # another one, or None, like the next
    third_source_ptr,
    fourth_source_ptr,
    first_ptr,          # an array of the cache that is written
    second_ptr,         # another one, or None, like the next
    third_ptr,
    fourth_ptr,
    pairs_ptr,          # [batch, n, 2] int32 or int64: source and destination
    n,                  # pairs of one item of the batch
    num_source,         # blocks of the cache that is read
    num_blocks,         # of the one that is written
    FIRST_SOURCE: tl.constexpr,   # kvcore.plan.blocks.BlockRows of the first array that is read
    SECOND_SOURCE: tl.constexpr,  # … of the second, or None, like the next
    THIRD_SOURCE: tl.constexpr,
    FOURTH_SOURCE: tl.constexpr,
    FIRST: tl.constexpr,          # … of the first array that is written
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    S: tl.constexpr,       # kvcore.plan.blocks.IndexSteps of pairs
    SLICES: tl.constexpr,  # of all arrays
    TILES: tl.constexpr,   # tiles of a slice
    TILE: tl.constexpr,    # words of a tile
):  # fmt: skip
    """Copy blocks of one cache to blocks of another one."""
    program = tl.program_id(0)
    part, i, batch = program % SLICES, program // SLICES % n, program // SLICES // n
    at = pairs_ptr + batch.to(tl.int64) * S.batch + i.to(tl.int64) * S.pair
    source, target = tl.load(at).to(tl.int64), tl.load(at + S.column).to(tl.int64)
    if (source >= 0) & (source < num_source) & (target >= 0) & (target < num_blocks):
        _swap_slice(first_source_ptr, first_ptr, part, batch, source, target, FIRST_SOURCE, FIRST, TILES, TILE)
        if SECOND is not None:
            _swap_slice(second_source_ptr, second_ptr, part, batch, source, target, SECOND_SOURCE, SECOND, TILES, TILE)
        if THIRD is not None:
            _swap_slice(third_source_ptr, third_ptr, part, batch, source, target, THIRD_SOURCE, THIRD, TILES, TILE)
        if FOURTH is not None:
            _swap_slice(fourth_source_ptr, fourth_ptr, part, batch, source, target, FOURTH_SOURCE, FOURTH, TILES, TILE)
