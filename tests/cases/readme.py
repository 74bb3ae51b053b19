"""Code of README, and of other pages."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def python_blocks(text: str) -> list[str]:
    """The blocks of a page, or of a part of it, that are Python."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


BLOCKS = python_blocks(README.read_text())
