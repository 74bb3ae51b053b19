"""What users may pass for an array: one rule for all ops, which the package's docstring states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxkv._views import Heads, is_view
from kvcore.contract.checks import is_number

ArrayLike = jax.Array | np.ndarray | list[Any]
TokenRows = ArrayLike | Heads
Scale = ArrayLike | float | np.floating[Any] | np.integer[Any]
Index = ArrayLike | int | np.integer[Any]

BACKENDS = ("triton", "xla", "interpret")
"""What `backend` may be, beside None."""


def as_array(argument: Any) -> Any:
    """An array of JAX, or still of NumPy, so that the contract sees a dtype that JAX would narrow.

    Refs are read, and views sliced. Lists of numbers are float32, as single numbers are. NumPy's arrays are copied: on
    a CPU, JAX reads them where they are (`jnp.array` too), and maybe after the call, when the caller may have changed
    them: a server fills its block tables anew each step.
    """
    if isinstance(argument, jax.Ref):
        return argument[...]
    if is_view(argument):
        return argument.check().sliced()
    if isinstance(argument, np.ndarray):
        return argument.copy()
    if hasattr(argument, "dtype"):
        return argument
    numbers = _numbers(argument)
    if numbers is None:
        return jnp.asarray(argument)
    return numbers.astype(np.float32) if numbers.dtype.kind in "iuf" else numbers


def is_ref(x: Any) -> bool:
    """Whether it is a Ref outside jit: it has a buffer, which to read there is to copy."""
    return isinstance(x, jax.Ref) and not isinstance(x, Tracer)


def as_rows(argument: Any) -> Any:
    """Key, value or query: an array as `as_array` has it, or a view, whose array is checked to have the heads."""
    return argument.check() if is_view(argument) else as_array(argument)


def as_scale(scale: Any) -> Any:
    """A number as float32, a list or Ref as an array; None and what is no array stay, for the contract to judge."""
    if is_number(scale):
        return jnp.float32(scale)
    return as_array(scale) if isinstance(scale, (list, tuple, np.ndarray, jax.Ref)) else scale


def with_axis(scale: Any) -> jax.Array | None:
    """A static scale as an array with an axis, which one element may come without."""
    return None if scale is None else jnp.atleast_1d(jnp.asarray(scale))


def as_indices(indices: Any, lengths: bool = False) -> Any:
    """Integers as int32, or int64 where JAX has it; bools and floats stay, for the contract to refuse.

    What does not fit stays as far outside as it was: a slot or block becomes -1, lengths and starts the nearest number.
    """
    if isinstance(indices, (jax.Ref, np.ndarray)) or is_view(indices):
        indices = as_array(indices)
    if not hasattr(indices, "dtype"):
        numbers = _numbers(indices)
        indices = jnp.asarray(indices) if numbers is None else numbers
        if numbers is not None and not numbers.size:  # NumPy takes an empty list for floats
            indices = numbers.astype(np.int32)
    if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.dtype == np.int32:
        return indices
    target = np.dtype(np.int64 if jax.config.jax_enable_x64 and indices.dtype.itemsize > 2 else np.int32)
    if np.can_cast(indices.dtype, target):
        return indices.astype(target)
    return _narrowed(indices, target, lengths)


def _narrowed(indices: Any, target: np.dtype, lengths: bool) -> Any:
    """Integers in a dtype that cannot hold every number of their own dtype."""
    dtype: Any = indices.dtype
    limits = np.iinfo(target)
    xp = np if isinstance(indices, (np.ndarray, np.generic)) else jnp
    above = indices > dtype.type(limits.max)
    below = indices < dtype.type(max(limits.min, np.iinfo(dtype).min))
    high, low = (limits.max, limits.min) if lengths else (-1, -1)
    fitting = xp.where(below, target.type(low), indices.astype(target))
    return xp.where(above, target.type(high), fitting)


def as_layer(layer: Any) -> Any:
    """A static layer as a Python integer, one in memory as `as_indices` has it."""
    if isinstance(layer, np.integer):
        return int(layer)
    return as_indices(layer) if isinstance(layer, (list, tuple)) or hasattr(layer, "shape") else layer


def as_static(name: str, size: Any) -> Any:
    """A size that shapes depend on: an integer in an array as Python's, for which a traced one has no value.

    Raises:
        TypeError: it is traced.
    """
    if isinstance(size, Tracer):
        raise TypeError(f"{name} must be a static int, got a traced value: give {name!r} to jax.jit's static_argnames")
    is_integer = hasattr(size, "dtype") and size.shape == () and jnp.issubdtype(size.dtype, jnp.integer)
    return int(size) if is_integer else size


def dtype_name(dtype: Any) -> str:
    """The dtype's name; of what is none, what was passed, for the contract to refuse."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _numbers(argument: Any) -> np.ndarray | None:
    """Numbers in lists as an array of NumPy's; None where there are arrays among them.

    Copied, as what is no list may show someone's memory: a memoryview. Lists of different lengths are an array of
    lists, for the contract to refuse.
    """
    if any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(argument)):
        return None
    try:
        return np.array(argument)
    except ValueError:
        return np.array(argument, object)
