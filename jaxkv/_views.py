"""Views of heads: parts of larger arrays, which kernels read where they lie, and the portable paths slice.

A view is a pytree with one leaf, its array. Whatever JAX does to arrays, it does to the leaf: it batches or splits it,
and puts types, shardings and objects of its own in its place. All else is static, and counts heads of the array at
hand.
"""

import functools
import json
import operator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from kvcore.arrays import ArraySpec, HeadGroups
from kvcore.contract.views import check_view


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["kind", "start", "stop", "head_size"]
)
@dataclass(frozen=True, eq=False)
class Heads:
    """A view of heads, as `jaxkv.heads` makes them. The class itself checks nothing, as JAX makes views of anything.

    Attributes:
        array: What has the heads.
        kind: A key of `kvcore.contract.views.SHAPES`.
        start: The first head, or the first of each group, or the first column.
        stop: The one after the last.
        head_size: Elements of a head where the array's shape does not tell.
    """

    array: Any
    kind: str
    start: int
    stop: int
    head_size: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(num_tokens, num_heads, head_size)`; of columns `(num_tokens, columns)`."""
        tokens, size = self.array.shape[0], self.stop - self.start
        if self.kind == "columns":
            return tokens, size
        if self.kind == "row":
            return tokens, 1, size
        if self.kind == "flat":
            return tokens, size, self.head_size or 0
        if self.kind == "heads":
            return tokens, size, self.array.shape[2]
        return tokens, self.array.shape[1] * size, self.array.shape[3]

    @property
    def dtype(self) -> Any:
        """The array's."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """Axes of `shape`."""
        return 2 if self.kind == "columns" else 3

    @property
    def num_groups(self) -> int | None:
        """The groups that the heads are in; None where they follow each other whatever the array's sizes."""
        return self.array.shape[1] if self.kind == "groups" else None

    @property
    def spec(self) -> ArraySpec:
        """What the contract asks of an array, and where the heads lie in the larger one."""
        shape, array = self.shape, self.array.shape
        size = 1 if self.kind in ("columns", "row") else shape[2]
        head_stride, groups = shape[-1], None
        if self.kind == "groups":
            in_view, in_group = self.stop - self.start, array[2]
            if in_view == 1:
                head_stride = in_group * size
            elif in_view < in_group and array[1] != 1:
                groups = HeadGroups(in_view, in_group * size)
        row = functools.reduce(operator.mul, array[1:])
        strides = (row, 1) if self.kind == "columns" else (row, head_stride, 1)
        return ArraySpec(shape, np.dtype(self.dtype).name, strides, offset=self.start * size, groups=groups)

    def check(self) -> "Heads":
        """The view itself.

        Raises:
            ValueError: the array has not the heads.
        """
        check_view(self.kind, self.array.shape, self.start, self.stop, self.head_size)
        return self

    def with_array(self, array: Any) -> "Heads":
        """The same heads of another array, or with whatever stands for one."""
        return replace(self, array=array)

    def sliced(self) -> Any:
        """The heads as an array of their own, a copy."""
        start, stop = self.start, self.stop
        if self.kind == "flat":
            start, stop = start * (self.head_size or 0), stop * (self.head_size or 0)
        part = self.array[:, :, start:stop] if self.kind == "groups" else self.array[:, start:stop]
        return part if part.shape == self.shape else part.reshape(self.shape)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.sliced())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.sliced(), dtype, copy=copy)

    def __repr__(self) -> str:
        size = "" if self.head_size is None else f", head_size={self.head_size}"
        array = self.array
        if hasattr(array, "shape") and hasattr(array, "dtype"):
            array = f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"
        return f"heads({array}, {self.start}, {self.stop}{size})"


export.register_pytree_node_serialization(
    Heads,
    serialized_name="jaxkv.heads",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda static: tuple(json.loads(static)),
)


def array_of(operand: Any) -> Any:
    """What a kernel is given for an operand: the array that a view is of, or the operand itself."""
    return operand.array if isinstance(operand, Heads) else operand


def sliced(operands: Any) -> Any:
    """Operands, a pytree, with arrays in place of views: for implementations that take no views."""
    return jax.tree.map(lambda x: x.sliced() if is_view(x) else x, operands, is_leaf=is_view)


def is_view(x: Any) -> bool:
    """Whether it is a view of heads."""
    return isinstance(x, Heads)


def as_head(columns: Any) -> Any:
    """Columns `(num_tokens, columns)`, an array or a view, as the one head of each token."""
    return replace(columns, kind="row") if isinstance(columns, Heads) else jnp.asarray(columns)[:, None]


def split_columns(columns: Any, at: int) -> tuple[Any, Any]:
    """Columns `(num_tokens, columns)`, an array or a view, in two parts: `at` of them, and the rest."""
    if isinstance(columns, Heads):
        middle = columns.start + at
        return replace(columns, stop=middle), replace(columns, start=middle)
    first, rest = jnp.split(jnp.asarray(columns), [at], axis=1)
    return first, rest
