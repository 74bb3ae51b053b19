"""What is known of an array without its data, whichever framework it is of."""

from typing import NamedTuple

from kvcore.layout import contiguous_strides


class ArraySpec(NamedTuple):
    """What the contract asks of an array.

    Attributes:
        shape: Sizes of its axes.
        dtype: The name that NumPy, JAX and torch share: "bfloat16", "float8_e4m3fn", "int32", …
        strides: In elements; None means C order.
        device: Name of the device; None where the framework takes care of devices itself.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    device: str | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Strides, also where they are C order."""
        return self.strides or contiguous_strides(self.shape)
