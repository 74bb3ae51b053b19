"""Views of heads for tests: given rows, in larger arrays of every kind, with poison beside them."""

import jax.numpy as jnp
import numpy as np

import jaxkv
from tests.cases.arrays import random_bits

KINDS = ("heads", "all heads", "flat", "one of a group", "two of a group", "one group", "whole groups")
"""Ways for heads to lie in an array; "two of a group" needs an even number."""


def hide(rows, kind, seed=0):
    """The arguments of `jaxkv.heads` for a view of rows `[…, num_tokens, num_heads, head_size]` of NumPy's.

    Returns:
        An array with poison beside the rows, and start, stop and head_size. Axes in front stay there.
    """
    *front, heads, size = rows.shape
    if kind == "all heads":
        return rows, 0, heads, None
    if kind in ("heads", "flat"):
        whole = random_bits(np.random.default_rng(seed), (*front, heads + 3, size), rows.dtype.name)
        whole[..., 2 : 2 + heads, :] = rows
        if kind == "heads":
            return whole, 2, 2 + heads, None
        return whole.reshape(*front, -1), 2, 2 + heads, size
    taken, beside = {"one of a group": (1, 3), "two of a group": (2, 3), "one group": (heads, 2)}.get(kind, (heads, 0))
    if kind == "whole groups":
        taken = 2 if heads % 2 == 0 else 1
    start = beside // 2
    grouped = rows.reshape(*front, heads // taken, taken, size)
    whole = random_bits(np.random.default_rng(seed), (*front, heads // taken, taken + beside, size), rows.dtype.name)
    whole[..., start : start + taken, :] = grouped
    return whole, start, start + taken, None


def view_of(rows, kind, seed=0):
    """A view that has these rows."""
    array, start, stop, size = hide(rows, kind, seed)
    return jaxkv.heads(jnp.asarray(array), start, stop, head_size=size)


def columns_of(rows, seed=0, left=3, right=2):
    """A view of columns that has these rows, `[num_tokens, columns]`."""
    tokens, columns = rows.shape
    whole = random_bits(np.random.default_rng(seed), (tokens, left + columns + right), rows.dtype.name)
    whole[:, left : left + columns] = rows
    return jaxkv.heads(jnp.asarray(whole), left, left + columns)


def write_views(case, kind, kind_v=None, **more):
    """A write's new arrays, with views for key and value."""
    views = {id(case.key): view_of(case.key, kind, 1), id(case.value): view_of(case.value, kind_v or kind, 2)}

    def convert(array):
        return views.get(id(array), array if array.dtype == np.int64 else jnp.asarray(array))

    new = case.call(jaxkv, convert, list(map(jnp.asarray, case.memory)), **more)
    return list(new) if isinstance(new, tuple) else [new]


def attend_view(case, kind, **more):
    """A read's result and log-sum-exp, with a view for query."""
    query = view_of(case.query, kind, 3)
    return case.call(jaxkv, lambda a: query if a is case.query else jnp.asarray(a), return_lse=True, **more)
