"""Copies and zeros of whole blocks in NumPy: what is right. Plain loops over arrays with an axis of blocks."""

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
