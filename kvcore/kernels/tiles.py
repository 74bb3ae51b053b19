"""One tile of positions after the other: scores, mask, weights, sums.

    scores    [ROWS, POSITIONS]    query · K, a sum over the head
    logits    [ROWS, POSITIONS]    scores times a factor of the row, under a cap if there is one; -inf where masked
    weights   [ROWS, POSITIONS]    2^(logit - running maximum)
    acc       [ROWS, head_size_v]  a sum over positions, weights · V

P is kvcore.plan.attention_constants.AttentionConstants, T the Tile of it that is used.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .products import add_scores, add_seen_values, add_values
from .reduce import maximum
from .softmax import LOG2E, fold_logits, tanh
from .words import find_slots, load_position_scales, load_word_scales, load_words

_SMALLEST = tl.constexpr(2.0**-126)  # the smallest normal float32


class Sums(NamedTuple):
    """What has been summed over the positions so far; see `softmax.py`."""

    m: tl.tensor  # [ROWS] running maximum
    l: tl.tensor  # [ROWS] normalizer
    acc: tl.tuple  # [ROWS, words] for each element of a word
    v_scale_max: tl.tensor  # [ROWS], or one number: the largest scale of a position of V; acc is in multiples of it


@triton.jit
def no_sums(P: tl.constexpr, T: tl.constexpr):
    """The sums of no positions."""
    V: tl.constexpr = P.v
    ELEMENTS: tl.constexpr = V.elements_per_word
    m = tl.full([T.rows], float("-inf"), tl.float32)
    l = tl.full([T.rows], 0.0, tl.float32)
    acc = (tl.full([T.rows, V.main], 0.0, tl.float32),)
    for _ in tl.static_range(1, ELEMENTS):
        acc = acc + (tl.full([T.rows, V.main], 0.0, tl.float32),)
    return Sums(m, l, acc, tl.full([], _SMALLEST, tl.float32))  # not 0: what is divided by it stays finite


@triton.jit
def _scores(query, k, pages, slots, MASKED: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Scores of a tile, `[ROWS, POSITIONS]`, times the scales of positions.

    `k` are the main words of K, `[POSITIONS, words]`; others are loaded here.
    """
    K: tl.constexpr = P.k
    KS: tl.constexpr = K.scales
    ROPE: tl.constexpr = P.rope
    k_scales = load_word_scales(pages.key_cache_ptr, pages, slots, 0, K.main, T.positions, K, P)
    scores = tl.full([T.rows, T.positions], 0.0, tl.float32)
    scores = add_scores(scores, query.main, k, k_scales, K, P)
    if K.rest > 0:
        k = load_words(pages.key_cache_ptr, pages, slots, K.main, K.rest, MASKED, K)
        k_scales = load_word_scales(pages.key_cache_ptr, pages, slots, K.main, K.rest, T.positions, K, P)
        scores = add_scores(scores, query.rest, k, k_scales, K, P)
    if ROPE is not None:
        rope_ptr = pages.key_cache_ptr.to(tl.pointer_type(tl.bfloat16))
        k = load_words(rope_ptr, pages, slots, 0, ROPE.main, MASKED, ROPE)
        scores = add_scores(scores, query.rope, k, None, ROPE, P)
    if KS is not None:
        if not KS.inside:
            scores = scores * load_position_scales(pages.k_scale_ptr, pages, slots, KS)[None, :]
    return scores


@triton.jit
def _seen(query, n, slots, P: tl.constexpr):
    """Which positions rows see, `[ROWS, POSITIONS]`, or `[1, POSITIONS]` where all see the same."""
    OPTIONS: tl.constexpr = P.options
    seen = slots.exists[None, :]
    if P.by_row:
        seen = seen & (n[None, :] <= query.position[:, None])
        if OPTIONS.sliding_window is not None:
            seen = seen & (query.position[:, None] - n[None, :] < OPTIONS.sliding_window)
    return seen


@triton.jit
def _weigh_by_scale(weights, shrink, old, v_scale, seen, MASKED: tl.constexpr, CAREFUL: tl.constexpr, P: tl.constexpr):
    """Multiplies weights by the scales of their positions, `[POSITIONS]`, in multiples of the largest so far.

    Products with the scales themselves could be too large or too small for float16. `old` is the largest scale before
    this tile, `[ROWS]` or one number. Returns the weights; shrink, which takes sums from the old largest to the new
    one; and the new one.
    """
    magnitude = tl.where(tl.abs(v_scale) < float("inf"), tl.abs(v_scale), 0.0)
    if MASKED and P.by_row:  # the largest that the row sees: what it does not see changes nothing
        largest = tl.maximum(old, maximum(tl.where(seen, magnitude[None, :], 0.0), 1))
        factor = v_scale[None, :] * (1 / largest)[:, None]
        if CAREFUL:
            factor = tl.where(seen & (tl.abs(v_scale) < float("inf"))[None, :], factor, 0.0)
    else:
        largest = tl.maximum(old, maximum(magnitude, 0))
        factor = (v_scale / largest)[None, :]
    return weights * factor, shrink * (old / largest), largest


@triton.jit
def fold_tiles(
    sums, query, pages, first_tile, end_tile, first, limit,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Takes tiles of positions into the sums.

    Args:
        sums: `Sums` of the tiles before.
        query: The rows, a `Query`.
        pages: The cache, as `Pages`.
        first_tile: Tiles first_tile … end_tile - 1 are taken.
        end_tile: See first_tile.
        first: Positions first … limit - 1 exist.
        limit: See first.
        MASKED: False promises that every position of the tiles exists, and that every row sees it.
        CAREFUL: Whether values that a row does not see leave its sums alone even if they are infinite or NaN.
        P: All constants.
        T: The tile.
    """
    K: tl.constexpr = P.k
    V: tl.constexpr = P.v
    VS: tl.constexpr = V.scales
    OPTIONS: tl.constexpr = P.options
    SCALED: tl.constexpr = MASKED or OPTIONS.soft_cap is not None
    for tile in tl.range(first_tile, end_tile, num_stages=T.stages):
        # ---- scores, [ROWS, POSITIONS]
        m, l, acc, v_scale_max = sums
        n = tile * T.positions + tl.arange(0, T.positions)
        slots = find_slots(pages, n, first, limit, MASKED, P)
        k = load_words(pages.key_cache_ptr, pages, slots, 0, K.main, MASKED, K)
        scores = _scores(query, k, pages, slots, MASKED, P, T)

        # ---- logits, [ROWS, POSITIONS]; without a cap or a mask, fold_logits scales them
        logits = scores
        if OPTIONS.soft_cap is not None:
            CAP: tl.constexpr = OPTIONS.soft_cap * LOG2E
            logits = CAP * tanh(scores * (query.scale * (1 / CAP))[:, None])
        seen = None
        if MASKED:
            seen = _seen(query, n, slots, P)
            if OPTIONS.soft_cap is None:
                logits = scores * query.scale[:, None]
            logits = tl.where(seen, logits, float("-inf"))

        # ---- weights, [ROWS, POSITIONS]
        m, l, weights, shrink = fold_logits(m, l, logits, query.scale, SCALED, MASKED, P.weight_bits)

        v_scales = load_word_scales(pages.value_cache_ptr, pages, slots, 0, V.main, T.positions, V, P)
        v_scale = None
        if VS is not None:
            if not VS.inside:
                v_scale = load_position_scales(pages.v_scale_ptr, pages, slots, VS)
                weights, shrink, v_scale_max = _weigh_by_scale(
                    weights, shrink, v_scale_max, v_scale, seen, MASKED, CAREFUL, P
                )

        # ---- sums, [ROWS, words] for each element of a word; v is [POSITIONS, words]
        if P.v_in_k:
            v = k
        else:
            v = load_words(pages.value_cache_ptr, pages, slots, 0, V.main, MASKED, V)
        if CAREFUL:
            acc = add_seen_values(acc, weights, seen, v, v_scales, v_scale, shrink, V, P)
        else:
            acc = add_values(acc, weights, v, v_scales, shrink, V, P)
        sums = Sums(m, l, acc, v_scale_max)
    return sums
