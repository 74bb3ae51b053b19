"""How the site's API pages read docstrings: an extension of Griffe, which mkdocstrings reads code with."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Shows docstrings' examples as code: Griffe knows `Examples:` only."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Called for each thing that has a docstring."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
