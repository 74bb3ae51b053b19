"""Which transformers this is written for."""

import re

MINIMUM = (5, 17)
"""The oldest that was tried. From 5.24 on, models hand the keyword arguments of attention to the cache."""

_NEEDED = f"torchkv.integrations.transformers needs transformers {'.'.join(map(str, MINIMUM))} or newer"

MISSING = f"transformers is not installed: {_NEEDED}; install jaxkv[transformers]"


def check_version(version: str) -> None:
    """Raises an ImportError for a version of transformers that is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < MINIMUM:
        raise ImportError(f"{_NEEDED}, got {version}")
