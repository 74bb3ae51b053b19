"""Sums, maxima and minima along an axis: `tl.sum`, `tl.max`, `tl.min`, for processes that compile and interpret.

Those three are functions in Triton's language: interpreted or compiled, as was decided when the process imported it.
`tl.reduce` is built in, and works either way, with the functions that combine two elements.
"""

import triton
import triton.language as tl


@triton.jit
def maximum(x, AXIS: tl.constexpr):
    """The largest along an axis."""
    return tl.reduce(x, AXIS, tl.standard._elementwise_max)


@triton.jit
def minimum(x, AXIS: tl.constexpr):
    """The smallest along an axis."""
    return tl.reduce(x, AXIS, tl.standard._elementwise_min)


@triton.jit
def total(x, AXIS: tl.constexpr):
    """The sum along an axis."""
    return tl.reduce(x, AXIS, tl.standard._sum_combine)
