"""Merge the partial results of splits into the result of attention.

A program takes COLUMNS elements of one query head of one token: `row = token * NUM_HEADS + query head`.
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
    PARTS: tl.constexpr,        # tiles of partial results that are loaded before the first is used
    LANES: tl.constexpr,        # partial results of a tile
    COLUMNS: tl.constexpr,      # elements of a head that a program takes, a power of two
):  # fmt: skip
    """The average of a row's partial results, weighted by their normalizers."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_head = dim < HEAD_SIZE
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.full([1], 0.0, tl.float32)
    acc = tl.full([COLUMNS], 0.0, tl.float32)
    for first in range(0, splits, PARTS * LANES):
        # ---- partial results: PARTS times log [LANES] and x [LANES, COLUMNS]; no load waits for what another brings
        logs = ()
        parts = ()
        for i in tl.static_range(PARTS):
            split = first + i * LANES + tl.arange(0, LANES)
            part = row * splits + split
            exists = split < splits
            x = part_ptr + part[:, None] * HEAD_SIZE + dim[None, :]
            logs = logs + (tl.load(part_lse_ptr + part, mask=exists, other=float("-inf")),)
            parts = parts + (tl.load(x, mask=exists[:, None] & in_head[None, :], other=0.0),)

        # ---- sums of lanes, then of all: m and l are [1], acc is [COLUMNS]
        highest = logs[0]
        for i in tl.static_range(1, PARTS):
            highest = tl.maximum(highest, logs[i])
        m_new = tl.maximum(m, maximum(highest, 0))
        origin = origin_of(m_new)
        l_lanes = tl.full([LANES], 0.0, tl.float32)
        acc_lanes = tl.full([LANES, COLUMNS], 0.0, tl.float32)
        for i in tl.static_range(PARTS):
            weight = tl.exp2(logs[i] - total(origin, 0))
            saw = logs[i] != float("-inf")  # what a split that saw nothing has left may be NaN
            l_lanes += weight
            acc_lanes += tl.where(saw[:, None], parts[i], 0.0) * weight[:, None]
        shrink = tl.exp2(m - origin)
        l = l * shrink + total(l_lanes, 0)
        acc = acc * shrink + total(acc_lanes, 0)
        m = m_new

    # ---- result
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (row % NUM_HEADS) * SINK_STRIDE + tl.arange(0, 1))
    factor, log = finish(m, l, sink)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + row + tl.arange(0, 1), log * LN2)
    store_rounded(out_ptr + row * HEAD_SIZE + dim, acc * factor, in_head, OUT)
