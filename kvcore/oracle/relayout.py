"""Slots of one cache in slots of another one, in NumPy: what is right."""

from collections.abc import Iterable, Sequence

import numpy as np


def relayout(source: Sequence[np.ndarray], destination: Sequence[np.ndarray], pairs: Iterable[Sequence[int]]) -> None:
    """Copies what is stored, in place of the destination. A pair with a slot that does not exist is skipped.

    Args:
        source: Views `[layer, block, slot, …]` of K, of V, and of their scales, as `kvcore.oracle.views` makes them.
        destination: The same of the other cache, in the same order.
        pairs: Slots of the source and of the destination.
    """
    for old, new in zip(source, destination, strict=True):
        for pair in pairs:
            first, second = map(int, pair)
            if 0 <= first < old.shape[1] * old.shape[2] and 0 <= second < new.shape[1] * new.shape[2]:
                block, place = divmod(second, new.shape[2])
                old_block, old_place = divmod(first, old.shape[2])
                for layer in range(len(old)):
                    row = old[layer, old_block, old_place]
                    new[layer, block, place] = row.reshape(new.shape[3:])
