"""Sums, maxima and minima along an axis: `tl.sum`, `tl.max`, `tl.min`, for processes that compile and interpret.

Those are functions of Triton's own, interpreted or compiled as the process decided at their import; `tl.reduce` is
built in, and the interpreter knows its combining functions.
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
