"""README's code."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
