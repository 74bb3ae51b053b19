"""Checks of the arguments of Pallas's functions, by Pallas's names."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv._arguments import dtype_name
from kvcore.contract.checks import either, is_number
from kvcore.formats import FLOATS, FP8, INT8

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.dtype("float32")).max)
"""Pallas's: the logit of what is masked, which leaves it no weight."""

LARGEST_MASK_VALUE = -1e4
"""A mask_value above it could leave weight to what is masked, which it has never here."""

PAGES = (*FLOATS, *FP8, INT8.name)
"""What pages may hold."""


def check_shape(name: str, array: Any, shape: Sequence[int | str]) -> None:
    """Checks an array's shape, of which sizes that may be anything are names.

    Raises:
        ValueError: it has another.
    """
    got = tuple(array.shape)
    if len(got) != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, got, strict=True)):
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({wanted}), got {got}")


def check_heads(name: str, num_q_heads: int, num_kv_heads: int) -> None:
    """Checks that query heads can share KV heads.

    Raises:
        ValueError: they are no multiple.
    """
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(f"q must have a multiple of {num_kv_heads} heads, as {name} has, got {num_q_heads}")


def check_dtype(name: str, array: Any, allowed: Sequence[str]) -> str:
    """Checks an array's dtype, and says what it is.

    Raises:
        TypeError: it is another.
    """
    dtype = dtype_name(array.dtype)
    if dtype not in allowed:
        raise TypeError(f"{name} must have dtype {either(allowed)}, got {dtype}")
    return dtype


def check_integers(**arrays: Any) -> None:
    """Checks that arrays hold integers.

    Raises:
        TypeError: one does not.
    """
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must have an integer dtype, got {dtype_name(array.dtype)}")


def check_mask_value(mask_value: Any) -> None:
    """Checks that what is masked would have no weight in Pallas either.

    Raises:
        ValueError: it could have some.
        TypeError: it is no number.
    """
    if mask_value is None:
        return
    if not is_number(mask_value):
        raise TypeError(f"mask_value must be a static number, got {mask_value!r}")
    if not mask_value <= LARGEST_MASK_VALUE:
        raise ValueError(
            f"mask_value must be at most {LARGEST_MASK_VALUE:g}, as what is masked has no weight here, got {mask_value}"
        )


def check_soft_cap(name: str, soft_cap: Any) -> None:
    """Checks the cap of logits.

    Raises:
        ValueError: it is 0, negative, or not finite.
        TypeError: it is no number.
    """
    if soft_cap is None:
        return
    if not is_number(soft_cap):
        raise TypeError(f"{name} must be None or a static number, got {soft_cap!r}")
    if soft_cap == 0:
        raise ValueError(f"{name} must not be 0.0; None is for no cap")
    if not 0 < soft_cap < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {soft_cap}")
