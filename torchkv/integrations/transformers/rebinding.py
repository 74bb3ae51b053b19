"""Functions of transformers with other names in them, where transformers has no hook; its modules stay as they are."""

import inspect
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from torchkv.integrations.transformers.handle import UnsupportedError


def with_globals(function: Any, **values: Any) -> Callable[..., Any]:
    """A function like another one, without its decorators, in which some global names have other values.

    Raises:
        UnsupportedError: it does not use one of the names.
    """
    function = inspect.unwrap(function)
    missing = [name for name in values if name not in function.__code__.co_names]
    if missing:
        raise unknown_version(f"{function.__qualname__} does not use {', '.join(missing)}")
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **values},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__, made.__doc__, made.__qualname__ = (
        function.__kwdefaults__,
        function.__doc__,
        function.__qualname__,
    )
    return made


def unknown_version(what: str) -> UnsupportedError:
    """The error for a transformers whose continuous batching is another than those that this was written for."""
    return UnsupportedError(
        f"continuous_batching works with transformers 5.17 to 5.24, got {version('transformers')}: {what}"
    )
