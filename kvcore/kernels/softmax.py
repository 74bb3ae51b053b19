"""Softmax over positions that come tile by tile: online, to base 2, in float32.

Of the positions so far, each query row has

    m     the running maximum of its logits, to base 2: -inf where it has seen nothing
    l     the normalizer, the sum of 2^(logit - m)
    acc   the sum of values, each times its weight 2^(logit - m)

A logit above m makes a new maximum; l and acc are then multiplied by 2^(m - new m).
"""

import triton
import triton.language as tl

from .reduce import maximum, total

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """The hyperbolic tangent. Near 0, where the usual form cancels, its series."""
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, near, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def origin_of(m):
    """What logits are counted from: the maximum, or 0 where all logits are -inf, as -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def fold_logits(m, l, logits, scale, SCALED: tl.constexpr, MASKED: tl.constexpr, WEIGHT_BITS: tl.constexpr):
    """Takes a tile's logits into m and l.

    Args:
        m: `[ROWS]`.
        l: `[ROWS]`, in weights that are multiplied by 2^WEIGHT_BITS.
        logits: `[ROWS, POSITIONS]`.
        scale: `[ROWS]`, never negative, so that the largest logit is the largest product times scale.
        SCALED: Whether logits are multiplied by scale already. If not, one multiply-add scales and subtracts.
        MASKED: Whether a row may have seen nothing yet.
        WEIGHT_BITS: Weights are multiplied by two to this power.

    Returns:
        The new m and l, the weights `[ROWS, POSITIONS]`, and what sums in older weights are to be multiplied by.
    """
    if SCALED:
        m_new = tl.maximum(m, maximum(logits, 1))
    else:
        m_new = tl.maximum(m, maximum(logits, 1) * scale)
        logits = logits * scale[:, None]
    origin = m_new
    if MASKED:
        origin = origin_of(m_new)
    weights = tl.exp2(logits - (origin - WEIGHT_BITS)[:, None])
    shrink = tl.exp2(m - origin)
    return m_new, l * shrink + total(weights, 1), weights, shrink


@triton.jit
def finish(m, l, sink):
    """Once all positions are in: the factor that makes acc the result, and the base-2 logarithm of the normalizer.

    A sink is one more logit, whose value is 0. Where there is nothing at all, the result is 0 and the logarithm -inf.
    """
    if sink is not None:
        sink = sink.to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        origin = origin_of(m_new)
        factor = tl.exp2(m - origin)
        l = l * factor + tl.exp2(sink - origin)
        m = m_new
    else:
        factor = 1.0
    nothing = l == 0
    log = tl.where(nothing, float("-inf"), m + tl.log2(l))
    return factor / tl.where(nothing, 1.0, l), log
