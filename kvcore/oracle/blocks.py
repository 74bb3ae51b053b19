"""Copies, swaps and zeros of whole blocks in NumPy: what is right. Plain loops over arrays with an axis of blocks."""

from collections.abc import Iterable, Sequence

import numpy as np


def copy_blocks(caches: Sequence[np.ndarray], pairs: Iterable[Sequence[int]], axes: Sequence[int]) -> None:
    """Copies blocks, in place. All are read before one is written; of two pairs with one destination, the last wins.

    Args:
        caches: Arrays with an axis of blocks each.
        pairs: Source and destination of each copy. One that is no block makes the pair skipped.
        axes: Which axis of each array it is.
    """
    pairs = [(int(source), int(destination)) for source, destination in pairs]
    for cache, axis in zip(caches, axes, strict=True):
        new, old = np.moveaxis(cache, axis, 0), np.moveaxis(cache.copy(), axis, 0)
        for source, destination in pairs:
            if 0 <= source < len(old) and 0 <= destination < len(old):
                new[destination] = old[source]


def zero_blocks(caches: Sequence[np.ndarray], blocks: Iterable[int], axes: Sequence[int]) -> None:
    """Fills blocks with zero bytes, in place. What is no block is skipped.

    Args:
        caches: Arrays with an axis of blocks each.
        blocks: Which ones.
        axes: Which axis of each array it is.
    """
    for cache, axis in zip(caches, axes, strict=True):
        of_blocks = np.moveaxis(cache, axis, 0)
        for block in map(int, blocks):
            if 0 <= block < len(of_blocks):
                of_blocks[block] = 0


def swap_blocks(
    source: Sequence[np.ndarray],
    destination: Sequence[np.ndarray],
    pairs: Iterable[Sequence[int]],
    axes: Sequence[int],
) -> None:
    """Copies blocks of one cache to blocks of another one, in place; of two pairs with one destination, the last wins.

    Args:
        source: Arrays with an axis of blocks each, which are read.
        destination: Those that are written, which have as much in a block.
        pairs: A block of source, and one of destination. One that is no block makes the pair skipped.
        axes: Which axis of each array it is.
    """
    pairs = [(int(block), int(target)) for block, target in pairs]
    for old, new, axis in zip(source, destination, axes, strict=True):
        old_blocks, new_blocks = np.moveaxis(old, axis, 0), np.moveaxis(new, axis, 0)
        for block, target in pairs:
            if 0 <= block < len(old_blocks) and 0 <= target < len(new_blocks):
                new_blocks[target] = old_blocks[block]
