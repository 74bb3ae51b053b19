"""What is known of arrays without their data, whichever framework they are of: specs, names, sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class HeadGroups(NamedTuple):
    """Heads that lie in groups, each followed by what belongs to other arrays.

    Attributes:
        size: Heads of a group, which are a head's stride apart.
        stride: From a group's first element to the next one's.
    """

    size: int
    stride: int


class ArraySpec(NamedTuple):
    """What the contract asks of an array.

    Attributes:
        shape: Sizes of its axes.
        dtype: The name that NumPy, JAX and torch share: "bfloat16", "float8_e4m3fn", "int32", …
        strides: In elements; None means C order.
        device: Name of the device; None where the framework takes care of devices itself.
        offset: Of the first element, in a larger array that is passed in place of this one.
        groups: How the heads of `[tokens, heads, dim]` lie where one stride does not say it.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    device: str | None = None
    offset: int = 0
    groups: HeadGroups | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Strides, also where they are C order."""
        return self.strides or contiguous_strides(self.shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """C-order strides, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def with_unit_axis(spec: ArraySpec, axis: int) -> ArraySpec:
    """The spec of an array with an axis of size 1 in front of one of its axes."""
    size, strides = spec.shape[axis], spec.strides
    if strides is not None:
        strides = (*strides[:axis], size * strides[axis], *strides[axis:])
    return spec._replace(shape=(*spec.shape[:axis], 1, *spec.shape[axis:]), strides=strides)


def shape_of(spec: ArraySpec) -> str:
    """The shape, as errors print it."""
    return str(tuple(spec.shape))


def array_names(num_caches: int, num_scale_caches: int = 0) -> tuple[str, ...]:
    """What schemas and errors call caches, and the scale caches that follow them."""
    caches = ("key_cache", "value_cache") if num_caches == 2 else ("kv_cache",)
    return (*caches, *("k_scale_cache", "v_scale_cache")[:num_scale_caches])


def check_integers(**sizes: Any) -> None:
    """Integers of Python, of NumPy, or as a framework traces them; None is left out.

    Raises:
        TypeError: one is no integer; the message has its name.
    """
    for name, size in sizes.items():
        if size is not None and (isinstance(size, (bool, np.bool_)) or not hasattr(size, "__index__")):
            raise TypeError(f"{name} must be an int, got {size!r}")


def python_integers(*sizes: Any) -> tuple[Any, ...]:
    """The same sizes, with Python's integers for NumPy's, whose products would overflow."""
    return tuple(int(size) if isinstance(size, np.integer) else size for size in sizes)
