"""What users may pass for an array: one rule for all ops, which the package's docstring states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kvcore.contract.checks import is_number

ArrayLike = jax.Array | np.ndarray | list[Any]
Scale = ArrayLike | float | np.floating[Any] | np.integer[Any]
Index = ArrayLike | int | np.integer[Any]


def as_array(x: Any) -> Any:
    """An array of JAX, or still of NumPy, so that the contract sees a dtype that JAX would narrow.

    Refs are read. Lists of numbers are float32, as single numbers are.
    """
    if isinstance(x, jax.Ref):
        return x[...]
    if hasattr(x, "dtype"):
        return x
    found = _numbers(x)
    if found is None:
        return jnp.asarray(x)
    return found.astype(np.float32) if found.dtype.kind in "iuf" else found


def as_scale(x: Any) -> Any:
    """A scale, or scales, likewise; None and what is no array stay, for the contract to judge."""
    if is_number(x):
        return jnp.float32(x)
    return as_array(x) if isinstance(x, (list, tuple, jax.Ref)) else x


def as_indices(x: Any, lengths: bool = False) -> Any:
    """Integers as int32, or int64 where JAX has it; bools and floats stay, for the contract to refuse.

    What does not fit stays as far outside as it was: a slot or block becomes -1, lengths and starts the nearest number.
    """
    if isinstance(x, jax.Ref):
        x = x[...]
    if not hasattr(x, "dtype"):
        found = _numbers(x)
        x = jnp.asarray(x) if found is None else found if found.size else found.astype(np.int32)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == np.int32:
        return x
    target = np.dtype(np.int64 if jax.config.jax_enable_x64 and x.dtype.itemsize > 2 else np.int32)
    if np.can_cast(x.dtype, target):
        return x.astype(target)
    dtype: Any = x.dtype
    limits, xp = np.iinfo(target), np if isinstance(x, (np.ndarray, np.generic)) else jnp
    above, below = x > dtype.type(limits.max), x < dtype.type(max(limits.min, np.iinfo(dtype).min))
    high, low = (target.type(n) for n in ((limits.max, limits.min) if lengths else (-1, -1)))
    return xp.where(above, high, xp.where(below, low, x.astype(target)))


def as_layer(x: Any) -> Any:
    """A static layer as a Python integer, one in memory as `as_indices` has it."""
    if isinstance(x, np.integer):
        return int(x)
    return as_indices(x) if isinstance(x, (list, tuple)) or hasattr(x, "shape") else x


def as_static(name: str, x: Any) -> Any:
    """A size that shapes depend on: an integer in an array as Python's, for which a traced one has no value.

    Raises:
        TypeError: it is traced.
    """
    if isinstance(x, Tracer):
        raise TypeError(f"{name} must be a static int, got a traced value: give {name!r} to jax.jit's static_argnames")
    return int(x) if hasattr(x, "dtype") and x.shape == () and jnp.issubdtype(x.dtype, jnp.integer) else x


def dtype_name(dtype: Any) -> str:
    """The dtype's name; of what is none, what was given, for the contract to refuse."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _numbers(x: Any) -> np.ndarray | None:
    """Numbers in lists as an array of NumPy's; None where there are arrays among them."""
    return None if any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x)) else np.asarray(x)
