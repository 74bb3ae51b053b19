"""The public function that compiles ahead of time."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import jax
import numpy as np

from kvcore.contract.checks import check_callable


def precompile(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
    """Compiles all that a call would need, without running or changing anything: a server's warm-up.

    The call is `function(*args, **kwargs)`. What is compiled is a program for these shapes: Triton's kernels, XLA's
    part, and machine code of both. Several threads may each compile something.

    A function that `jax.jit` made keeps its donation and static arguments, and its own calls at these shapes compile
    nothing afterwards, if args say all that jit asks of the calls' arrays: beside shape and dtype, the sharding of
    those that were put on devices, and whether a type is weak. Calls of any other function find Triton's kernels, but
    not XLA's part: call what is returned instead.

    Args:
        function: An op, a method of `PagedKVCache`, a `functools.partial`, or a whole step of a model.
        args: Its arguments. In place of arrays, whether alone, in a `PagedKVCache` or in another pytree, there may be
            `jax.ShapeDtypeStruct`s, so that no memory is needed.
        kwargs: Its arguments by name.

    Returns:
        The program. It is called as function is, without static arguments. A method's cache is its first argument, and
        what a partial holds comes before the rest. Unless `jax.jit` made function, nothing is donated, and all that is
        no array (a number or a list of them, a string, a layout) is a constant of the program: an argument without an
        array is static, and beside arrays in a pytree there is None instead.

    Raises:
        TypeError: function is not callable, or the call raises it.
        ValueError: the call raises it.

    Example:
        >>> cache = jax.ShapeDtypeStruct((3, 2, 1, 2), jnp.float32)  # 3 blocks of 2 slots, 1 head of 2 elements
        >>> integers = jax.ShapeDtypeStruct((1,), jnp.int32)
        >>> query, block_tables = jax.ShapeDtypeStruct((1, 1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
        >>> attend = jaxkv.precompile(
        ...     jaxkv.paged_attention, query, (cache, cache), block_tables, integers, sliding_window=2
        ... )
        >>> caches = (jnp.zeros((3, 2, 1, 2)), jnp.arange(12.0).reshape(3, 2, 1, 2))
        >>> attend(jnp.ones((1, 1, 2)), caches, jnp.array([[2, 0]]), jnp.array([3])).tolist()
        [[[5.0, 6.0]]]
    """
    check_callable("function", function)
    jitted, args, kwargs = _opened(function, args, kwargs)
    if not isinstance(jitted, jax.stages.Wrapped):
        jitted, args, kwargs = _of_arrays(jitted, args, kwargs)
    return jitted.lower(*args, **kwargs).compile()


def _opened(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same call with the arrays of partials and of a method's object among the arguments, not in the function."""
    while not isinstance(function, jax.stages.Wrapped):
        if isinstance(function, functools.partial):
            function, args, kwargs = function.func, (*function.args, *args), function.keywords | kwargs
        elif isinstance(function, MethodType):
            function, args = function.__func__, (function.__self__, *args)
        else:
            break
    return function, args, kwargs


def _of_arrays(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call of a new jitted function, which has all but the arrays in it."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    constants = [None if _is_array(leaf) else leaf for leaf in leaves]
    places = [_is_array(leaf) for leaf in leaves]

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays = iter(jax.tree.leaves((args, kwargs)))
        filled = [next(arrays) if place else leaf for leaf, place in zip(constants, places, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return function(*args, **kwargs)

    call.__name__ = getattr(function, "__name__", call.__name__)  # XLA calls the program so
    args = tuple(_arrays_of(arg) for arg in args if _has_arrays(arg))
    return jax.jit(call), args, {name: _arrays_of(arg) for name, arg in kwargs.items() if _has_arrays(arg)}


def _has_arrays(argument: Any) -> bool:
    return any(map(_is_array, jax.tree.leaves(argument)))


def _arrays_of(argument: Any) -> Any:
    """A pytree with None for all leaves that are no arrays."""
    return jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, argument)


def _is_array(leaf: Any) -> bool:
    """Whether it is an array or describes one. NumPy's scalars are numbers; its types only have the attributes."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, (type, np.generic))
