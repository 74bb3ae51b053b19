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
    PARTS: tl.constexpr,        # partial results of a lane that are loaded at a time
    LANES: tl.constexpr,        # sums made side by side, each of every LANES-th partial result
    COLUMNS: tl.constexpr,      # a power of two that covers a head
):  # fmt: skip
    """The average of a row's partial results, weighted by their normalizers."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, COLUMNS)
    in_head = dim < HEAD_SIZE
    m = tl.full([LANES], float("-inf"), tl.float32)
    l = tl.full([LANES], 0.0, tl.float32)
    acc = tl.full([LANES, COLUMNS], 0.0, tl.float32)
    for first in range(0, splits, PARTS * LANES):
        # ---- partial results: PARTS times logs [LANES] and x [LANES, COLUMNS]; no load waits for what another brings
        logs = ()
        parts = ()
        for i in tl.static_range(PARTS):
            split = first + i * LANES + tl.arange(0, LANES)
            part = row * splits + split
            exists = split < splits
            log = tl.load(part_lse_ptr + part, mask=exists, other=float("-inf"))
            x = part_ptr + part[:, None] * HEAD_SIZE + dim[None, :]
            logs = logs + (log,)
            parts = parts + (tl.load(x, mask=exists[:, None] & in_head[None, :], other=0.0),)

        # ---- sums of lanes
        m_new = m
        for i in tl.static_range(PARTS):
            m_new = tl.maximum(m_new, logs[i])
        origin = origin_of(m_new)
        shrink = tl.exp2(m - origin)
        l = l * shrink
        acc = acc * shrink[:, None]
        for i in tl.static_range(PARTS):
            weight = tl.exp2(logs[i] - origin)
            saw = logs[i] != float("-inf")
            l += weight
            acc += tl.where(saw[:, None], parts[i], 0.0) * weight[:, None]
        m = m_new

    # ---- sums of all: m and l are [1], acc is [COLUMNS]
    highest = maximum(m, 0) + tl.full([1], 0.0, tl.float32)
    shrink = tl.exp2(m - total(origin_of(highest), 0))
    l = total(l * shrink, 0) + tl.full([1], 0.0, tl.float32)
    acc = total(acc * shrink[:, None], 0)

    # ---- result
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (row % NUM_HEADS) * SINK_STRIDE + tl.arange(0, 1))
    factor, log = finish(highest, l, sink)
    tl.store(lse_ptr + row + tl.arange(0, 1), log * LN2)
    store_rounded(out_ptr + row * HEAD_SIZE + dim, acc * factor, in_head, OUT)
