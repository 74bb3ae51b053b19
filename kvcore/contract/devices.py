"""Checks of calls whose positions are on several devices."""

from kvcore.contract.read import LONGEST
from kvcore.integers import integer


def check_window(sliding_window: int, parts: int) -> int | None:
    """The part of a sliding window that each of `parts` devices has, which take positions in turn; None: all.

    Raises:
        ValueError: they would not have the same number.
        TypeError: it is no integer.
    """
    window = integer("sliding_window", sliding_window, least=1)
    if window >= LONGEST:
        return None
    if window % parts:
        raise ValueError(f"sliding_window must be a multiple of the {parts} devices that share positions, got {window}")
    return window // parts
