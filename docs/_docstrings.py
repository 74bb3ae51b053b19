"""How the site's API pages read docstrings: an extension of Griffe, which mkdocstrings reads code with."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Shows docstrings' examples as code, as Griffe knows `Examples:` only, and results with their type.

    Griffe takes what stands before a colon in `Returns:` for the type. Here types are annotations and the text is
    prose, so the type is put before it.
    """

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Called for each thing that has a docstring."""
        if not obj.is_alias and obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            if isinstance(obj, griffe.Function) and obj.returns is not None:
                text = re.sub(r"^Returns:\n +", lambda match: f"{match[0]}{obj.returns}: ", text, flags=re.M)
            obj.docstring.value = text
