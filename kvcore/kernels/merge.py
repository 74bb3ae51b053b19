"""Merge the partial results of splits into the result of attention.

A program takes one query head of one token: `row = token * NUM_HEADS + query head`.
"""

import triton
import triton.language as tl

from .encode import store_rounded
from .reduce import maximum, total
from .softmax import LN2, finish, origin_of


@triton.jit
def merge_attention_kernel(
    part_ptr,      # [num_tokens, num_q_heads, splits, head_size_v] float32
    part_lse_ptr,  # [num_tokens, num_q_heads, splits] float32, to base 2; -inf where a split saw nothing
    sinks_ptr,     # [num_q_heads], or None
    splits,        # partial results of a row
    out_ptr,       # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,       # [num_tokens, num_q_heads] float32
    NUM_HEADS: tl.constexpr,    # query heads
    HEAD_SIZE: tl.constexpr,    # elements of a value head
    SINK_STRIDE: tl.constexpr,  # elements from one entry of sinks to the next
    OUT: tl.constexpr,          # kvcore.formats.FloatFormat to round to with integers; None: the target's cast is good
    PARTS: tl.constexpr,        # partial results that are loaded at a time
    COLUMNS: tl.constexpr,      # a power of two that covers a head
):  # fmt: skip
    """The average of a row's partial results, weighted by their normalizers."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, COLUMNS)
    in_head = dim < HEAD_SIZE
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.full([1], 0.0, tl.float32)
    acc = tl.full([COLUMNS], 0.0, tl.float32)
    for first in range(0, splits, PARTS):
        # ---- partial results: log is [PARTS], x is [PARTS, COLUMNS]
        split = first + tl.arange(0, PARTS)
        log = tl.load(part_lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
        saw = log != float("-inf")
        part = part_ptr + (row * splits + split)[:, None] * HEAD_SIZE + dim[None, :]
        x = tl.load(part, mask=saw[:, None] & in_head[None, :], other=0.0)

        # ---- sums: m and l are [1], acc is [COLUMNS]
        m_new = tl.maximum(m, maximum(log, 0))
        origin = origin_of(m_new)
        weight = tl.exp2(log - total(origin, 0))
        shrink = tl.exp2(m - origin)
        l = l * shrink + total(weight, 0)
        acc = acc * shrink + total(x * weight[:, None], 0)
        m = m_new

    # ---- result
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (row % NUM_HEADS) * SINK_STRIDE + tl.arange(0, 1))
    factor, log = finish(m, l, sink)
    tl.store(lse_ptr + row + tl.arange(0, 1), log * LN2)
    store_rounded(out_ptr + row * HEAD_SIZE + dim, acc * factor, in_head, OUT)
