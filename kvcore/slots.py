"""Helpers for slot mappings, outside of any hot path."""

from typing import Any

import numpy as np


def find_duplicate_slots(slot_mapping: Any) -> np.ndarray:
    """Slots that more than one token would be written to, so that the result is unspecified.

    A check for debugging, outside jit and off the hot path: it reads the array on the host.

    Args:
        slot_mapping: Integers `(n,)`: an array of NumPy, JAX or torch (on any device), or a list.

    Returns:
        The repeated slots, sorted; empty if all is well. Negative slots are padding, never duplicates.
    """
    if hasattr(slot_mapping, "cpu"):
        slot_mapping = slot_mapping.cpu()
    slots, counts = np.unique(np.asarray(slot_mapping), return_counts=True)
    return slots[(counts > 1) & (slots >= 0)]
