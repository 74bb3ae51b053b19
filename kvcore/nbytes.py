"""Bytes as text, and back: "1.5 GiB"."""

import re
from decimal import Decimal

from kvcore.integers import integer

_UNITS = {"TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}


def readable(nbytes: int) -> str:
    """Bytes in the largest unit up to GiB that leaves at least one of it."""
    for unit in ("GiB", "MiB", "KiB"):
        if nbytes >= _UNITS[unit]:
            return f"{nbytes / _UNITS[unit]:.1f} {unit}"
    return f"{nbytes} bytes"


def bytes_of(name: str, memory: int | str) -> int:
    """A number of bytes, given as such or with a unit: `2**31`, `"2GiB"`, `"1.5 GiB"`. Parts of a byte are left out.

    Raises:
        ValueError: it is negative, or text that says no number of bytes; the message has its name.
        TypeError: it is neither an integer nor text.
    """
    if not isinstance(memory, str):
        if isinstance(memory, bool) or not hasattr(memory, "__index__"):
            raise TypeError(f"{name} must be bytes, as an int or as text such as '2GiB', got {memory!r}")
        return integer(name, memory, 0)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(TiB|GiB|MiB|KiB)", memory, re.ASCII)
    if found is None:
        raise ValueError(f"{name} must be a number of TiB, GiB, MiB or KiB, as '2GiB' is, got {memory!r}")
    return int(Decimal(found[1]) * _UNITS[found[2]])
