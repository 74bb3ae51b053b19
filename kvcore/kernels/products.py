"""The two products of attention: of query with K, and of weights with V.

K and V come in words; each element of a word is multiplied on its own, so query and sums are tuples with one matrix for
each element of a word. P is kvcore.plan.attention_constants.AttentionConstants, C the CacheRows of what is multiplied.
"""

import triton
import triton.language as tl

from .decode import narrow, widen
from .words import element_of


@triton.jit
def add_scores(scores, query, words, word_scales, C: tl.constexpr, P: tl.constexpr):
    """Scores `[ROWS, POSITIONS]`, plus the product of a piece of query with words of K.

    `query` has `[ROWS, words]` for each element of a word; words are `[POSITIONS, words]`, and so are their scales.
    """
    ELEMENTS: tl.constexpr = C.elements_per_word
    for element in tl.static_range(ELEMENTS):
        k = element_of(words, word_scales, element, C, P)
        scores = tl.dot(query[element], tl.trans(k), scores, input_precision="ieee")
    return scores


@triton.jit
def add_values(acc, weights, words, word_scales, shrink, C: tl.constexpr, P: tl.constexpr):
    """The sums of values, times shrink, plus weights times values.

    Args:
        acc: The sums so far, `[ROWS, words]` for each element of a word.
        weights: `[ROWS, POSITIONS]`, 0 where a row does not see a position. A value there that is infinite or NaN
            spoils the sum, as 0 times that is NaN: see `add_seen_values`.
        words: `[POSITIONS, words]` of V.
        word_scales: Their scales, `[POSITIONS, words]`, or None.
        shrink: `[ROWS]`, which takes the sums so far to the new running maximum.
        C: CacheRows of V.
        P: All constants.
    """
    v = element_of(words, word_scales, 0, C, P)
    weights = weights.to(v.dtype)
    sums = (tl.dot(weights, v, acc[0] * shrink[:, None], input_precision="ieee"),)
    ELEMENTS: tl.constexpr = C.elements_per_word
    for element in tl.static_range(1, ELEMENTS):
        v = element_of(words, word_scales, element, C, P)
        sums = sums + (tl.dot(weights, v, acc[element] * shrink[:, None], input_precision="ieee"),)
    return sums


@triton.jit
def add_seen_values(acc, weights, seen, words, word_scales, v_scale, shrink, C: tl.constexpr, P: tl.constexpr):
    """What `add_values` does, for values that may be infinite or NaN: they change only rows that see them.

    Finite values are multiplied as usual. Infinite ones and NaN are counted, row by row, where the row sees them: one
    is enough to make the sum infinite or NaN, whatever its weight. But one that is a part of the key (MLA) may have
    made its own weight 0, and then the sum is NaN. A sum that is not finite is not shrunk, as 0 times it would be NaN.

    Args:
        acc: The sums so far, `[ROWS, words]` for each element of a word.
        weights: `[ROWS, POSITIONS]`, times the positions' scales if there are any.
        seen: Which positions rows see, `[ROWS, POSITIONS]`.
        words: `[POSITIONS, words]` of V.
        word_scales: Their scales, `[POSITIONS, words]`, or None.
        v_scale: The positions' scales, `[POSITIONS]`, or None: with it, a finite value may become infinite or NaN.
        shrink: `[ROWS]`, which takes the sums so far to the new running maximum.
        C: CacheRows of V.
        P: All constants.
    """
    COMPUTE: tl.constexpr = P.compute
    ELEMENTS: tl.constexpr = C.elements_per_word
    infinity = float("inf")
    saw = narrow(tl.where(seen, 1.0, 0.0), COMPUTE)
    sums = ()
    for element in tl.static_range(ELEMENTS):
        v = widen(element_of(words, word_scales, element, C, P))
        scaled = v
        if v_scale is not None:
            scaled = v * v_scale[:, None]
        finite = tl.abs(scaled) < infinity
        v = narrow(tl.where(finite, v, 0.0), COMPUTE)
        updated = tl.where(tl.abs(acc[element]) < infinity, acc[element] * shrink[:, None], acc[element])
        updated = tl.dot(weights.to(v.dtype), v, updated, input_precision="ieee")
        # How many infinities of each sign a row sees; NaN counts as both, so that their sum is NaN.
        nan = scaled != scaled
        above = tl.dot(saw, narrow(tl.where(nan | (scaled == infinity), 1.0, 0.0), COMPUTE), input_precision="ieee")
        below = tl.dot(saw, narrow(tl.where(nan | (scaled == -infinity), 1.0, 0.0), COMPUTE), input_precision="ieee")
        updated = tl.where(above > 0, updated + infinity, updated)
        updated = tl.where(below > 0, updated - infinity, updated)
        if P.v_in_k:
            unweighted = narrow(tl.where(seen & (weights == 0), 1.0, 0.0), COMPUTE)
            spoilt = tl.dot(unweighted, narrow(tl.where(finite, 0.0, 1.0), COMPUTE), input_precision="ieee")
            updated = tl.where(spoilt > 0, float("nan"), updated)
        sums = sums + (updated,)
    return sums
