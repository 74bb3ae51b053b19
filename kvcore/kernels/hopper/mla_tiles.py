"""What warpgroups of `hopper_mla_kernel` do with a block: scores, weights, sums. See `tiles.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from ..softmax import LOG2E, fold_logits, tanh
from .mla_producer import nth_chunk
from .mla_shared import BLOCK, CHUNKS, HALF, ROWS, chunk, full
from .tiles import products, rows_of, seen_by


@gluon.jit
def start_scores(shared, i, S: gl.constexpr, WAITS: gl.constexpr):
    """Issues the product of query with K in block S of shared memory; WAITS: as chunks of pair i arrive."""
    scores = gl.zeros([ROWS, BLOCK], gl.float32, products(BLOCK))
    for k in gl.static_range(CHUNKS):
        scores = _add_product(scores, shared, i, S, nth_chunk(S, k), k > 0, WAITS)
    return scores


@gluon.jit
def _add_product(scores, shared, i, S: gl.constexpr, C: gl.constexpr, ADDS: gl.constexpr, WAITS: gl.constexpr):
    if WAITS:
        mbarrier.wait(full(shared, S, C), i & 1)
    # i >> 30 is 0, but the compiler does not know: else it would keep descriptors of all chunks in registers.
    keys = chunk(shared.keys, S + (i >> 30), C).permute((1, 0))
    return warpgroup_mma(chunk(shared.query, i >> 30, C), keys, scores, use_acc=ADDS, is_async=True)


@gluon.jit
def weigh(scores, m, l, arrays, work, i, S: gl.constexpr, position, P: gl.constexpr):
    """Makes weights of the scores of block S of pair i: see `kvcore.kernels.softmax.fold_logits`."""
    OPTIONS: gl.constexpr = P.options
    SCALE: gl.constexpr = OPTIONS.scale * LOG2E if OPTIONS.scale >= 0 else -OPTIONS.scale * LOG2E
    SCALED: gl.constexpr = OPTIONS.soft_cap is not None or SCALE == 0
    logits = scores
    if OPTIONS.soft_cap is not None:
        CAP: gl.constexpr = OPTIONS.soft_cap * LOG2E
        logits = CAP * tanh(scores * (SCALE / CAP))
    elif SCALE == 0:
        logits = scores * 0.0
    if (i < work.begin_whole) | (i >= work.end_whole):
        logits = masked(logits, (2 * (work.first_tile + i) + S) * BLOCK, arrays, work, position, P)
    scale = gl.full([ROWS], SCALE, gl.float32, rows_of(BLOCK))
    return fold_logits(m, l, logits, scale, SCALED, True, P.weight_bits)


@gluon.jit
def masked(logits, begin, arrays, work, position, P: gl.constexpr):
    """Logits of a block, -inf where rows do not see a position."""
    Q: gl.constexpr = P.query
    n = begin + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, products(BLOCK)))
    logits = gl.where(seen_by(n, position, work, P), logits, float("-inf"))
    if work.holes:
        exists = n < work.limit
        block = gl.load(arrays.table_ptr + n // P.block_size * Q.table_step, mask=exists, other=-1)
        exists = (block >= 0) & (block < arrays.num_blocks)
        logits = gl.where(exists[None, :], logits, float("-inf"))
    return logits


@gluon.jit
def shrunk(acc, shrink):
    """Sums, brought to a new running maximum."""
    return acc * gl.convert_layout(shrink, rows_of(HALF))[:, None]
