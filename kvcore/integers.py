"""Integers as users may pass them, of Python or NumPy or any other kind, as Python's. Imports nothing."""

from collections.abc import Iterable
from operator import index


def integer(name: str, number: int, least: int | None = None) -> int:
    """A number as Python's integer.

    Raises:
        ValueError: it is below `least`.
        TypeError: it is no integer; the message has its name.
    """
    if type(number) is not int:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise TypeError(f"{name} must be an int, got {number!r}")
        number = index(number)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def integers(name: str, numbers: Iterable[int]) -> list[int]:
    """Numbers as a list of Python's integers.

    Raises:
        TypeError: one is no integer, or they are nothing to iterate over; the message has the name.
    """
    try:
        return list(map(index, numbers))
    except TypeError as error:
        raise TypeError(f"{name} must hold integers: {error}") from error
