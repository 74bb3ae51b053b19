"""What warpgroups of `hopper_mla_kernel` do with a block: scores, weights, sums. See `tiles.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from ..softmax import LOG2E, fold_logits
from .mla_shared import BLOCK, HALF, ROWS, STRIPES, full, stripe
from .tiles import cap, masked, products, rows_of, seen_by


@gluon.jit
def start_scores(shared, i, S: gl.constexpr, WAITS: gl.constexpr):
    """Issues the product of query with K in block S of shared memory; WAITS: as stripes of pair i arrive."""
    scores = gl.zeros([ROWS, BLOCK], gl.float32, products(BLOCK))
    for k in gl.static_range(STRIPES):
        scores = _add_product(scores, shared, i, S, k, WAITS)
    return scores


@gluon.jit
def _add_product(scores, shared, i, S: gl.constexpr, C: gl.constexpr, WAITS: gl.constexpr):
    if WAITS:
        mbarrier.wait(full(shared, S, C), i & 1)
    # i >> 30 is 0, but the compiler does not know: else it would keep descriptors of all stripes in registers.
    keys = stripe(shared.keys, S + (i >> 30), C).permute((1, 0))
    return warpgroup_mma(stripe(shared.query, i >> 30, C), keys, scores, use_acc=C > 0, is_async=True)


@gluon.jit
def weigh(scores, m, l, arrays, work, holes, j, position, P: gl.constexpr):
    """Makes weights of the scores of block j, counted from the first: see `kvcore.kernels.softmax.fold_logits`."""
    OPTIONS: gl.constexpr = P.options
    SCALE: gl.constexpr = OPTIONS.scale * LOG2E if OPTIONS.scale >= 0 else -OPTIONS.scale * LOG2E
    SCALED: gl.constexpr = SCALE == 0 or OPTIONS.soft_cap is not None
    n = (2 * work.first_tile + j) * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, products(BLOCK)))
    in_part = (j < 2 * work.begin_whole) | (j >= 2 * work.end_whole) | holes
    logits = scores
    if SCALE == 0:
        logits = scores * SCALE
    if OPTIONS.soft_cap is not None:
        if in_part:  # four elements share a reciprocal
            logits = gl.where(seen_by(n, position, work, P), logits, 0.0)
        CAP: gl.constexpr = OPTIONS.soft_cap * LOG2E
        logits = cap(logits, SCALE, CAP)
    if in_part:
        logits = masked(logits, n, position, arrays, work, holes, P)
    scale = gl.full([ROWS], SCALE, gl.float32, rows_of(BLOCK))
    return fold_logits(m, l, logits, scale, SCALED, True, P.weight_bits)


@gluon.jit
def shrunk(acc, shrink):
    """Sums, brought to a new running maximum."""
    return acc * gl.convert_layout(shrink, rows_of(HALF))[:, None]
