"""The contract of `heads`: which heads of an array a view may have."""

from collections.abc import Sequence
from typing import Any

from kvcore.arrays import check_integers
from kvcore.contract.checks import either

_HEADS, _FLAT = "(num_tokens, heads, head_size)", "(num_tokens, heads * head_size)"
_COLUMNS, _GROUPS = "(num_tokens, columns)", "(num_tokens, groups, heads, head_size)"

SHAPES = {"heads": _HEADS, "flat": _FLAT, "columns": _COLUMNS, "row": _COLUMNS, "groups": _GROUPS}
"""Kinds of views, and the shapes of their arrays. "row" is columns that are one head."""


def kind_of_view(shape: Sequence[int], start: Any, stop: Any, head_size: Any) -> str:
    """Checks the arguments of `heads`.

    Returns:
        The kind of the view.

    Raises:
        ValueError: a shape or a number does not fit.
        TypeError: a number is no integer.
    """
    for name, number in (("start", start), ("stop", stop)):
        if number is None:
            raise TypeError(f"{name} must be an int, got None")
    check_integers(start=start, stop=stop, head_size=head_size)
    rank = len(shape)
    if rank not in (2, 3, 4):
        raise ValueError(f"array must have shape {either(dict.fromkeys(SHAPES.values()))}, got {tuple(shape)}")
    kind = {2: "columns" if head_size is None else "flat", 3: "heads", 4: "groups"}[rank]
    if head_size is not None and rank != 2:
        raise ValueError(f"head_size must be None for an array of shape {SHAPES[kind]}, got {head_size}")
    check_view(kind, shape, start, stop, head_size)
    return kind


def check_view(kind: str, shape: Sequence[int], start: int, stop: int, head_size: int | None) -> None:
    """Checks that an array has a view's heads: also one that JAX put in the place of the first.

    Raises:
        ValueError: it has not.
    """
    if len(shape) != SHAPES[kind].count(",") + 1:
        raise ValueError(f"the array of a view must have shape {SHAPES[kind]}, got {tuple(shape)}")
    size, what = shape[1], "heads of array"
    if kind == "flat":
        assert head_size is not None
        if head_size < 1 or size % head_size:
            raise ValueError(f"head_size must divide the {size} columns of array, got {head_size}")
        size = size // head_size
    elif kind == "groups":
        size, what = shape[2], "heads of a group"
    elif kind != "heads":
        what = "columns of array"
    if not 0 <= start <= stop <= size:
        raise ValueError(
            f"start and stop must be at least 0, in order, and at most {size}, the {what}, got {start} and {stop}"
        )


def split_error(name: str, shape: Sequence[int], devices: int) -> ValueError:
    """The error for a view of heads that follow each other, and are split over devices."""
    return ValueError(
        f"{name} must be a view of [num_tokens, num_kv_heads, q_per_kv + 2, head_size], start and stop on its third "
        f"axis, where heads are split over devices, got a view of {tuple(shape)} and {devices} devices; jax.shard_map "
        "can give each device an array of its own heads"
    )


def groups_error(name: str, shape: Sequence[int], devices: int) -> ValueError:
    """The error for a view of heads in groups, which cannot be split over devices as heads are."""
    return ValueError(
        f"{name} must be a view of [num_tokens, num_kv_heads, …, head_size] with num_kv_heads a multiple of {devices}, "
        f"the devices over which heads are split, got a view of {tuple(shape)}"
    )
