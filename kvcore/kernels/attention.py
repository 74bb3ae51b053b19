"""Attention over a paged KV cache, for any mix of decode, speculative decoding and chunked prefill.

A program takes a tile of query rows of one sequence, which share a KV head, and one of the splits of the positions that
they see, in tiles of POSITIONS:

    position        n = 0 … seq_len - 1; token t of a sequence's query stands at seq_len - its tokens + t
    block           block_tables[seq, n // BLOCK_SIZE],   place = n % BLOCK_SIZE
    scores          [ROWS, POSITIONS] = query [ROWS, head_size] · K [POSITIONS, head_size]
    weights         [ROWS, POSITIONS] = 2^(logit - running maximum), the logit being the scaled score
    acc             [ROWS, head_size_v] = weights · V [POSITIONS, head_size_v], summed up over tiles

`sequences.py` finds rows and positions, `query.py` loads rows, `words.py` loads K and V, `products.py` multiplies,
`softmax.py` makes weights. Scales of tensors and of heads go into logits and into the result, scales of positions into
logits and weights; only scales of groups within a head are multiplied with elements.

Where positions are split, each program leaves a partial result and the logarithm of its normalizer, which
`merge_attention_kernel` merges.

P is kvcore.plan.constants.AttentionConstants, T the Tile of it that is used.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .address import layer_index
from .encode import store_rounded
from .products import add_scores, add_seen_values, add_values
from .query import load_query
from .reduce import maximum, total
from .sequences import Rows, all_blocks_exist, cdiv, find_rows, find_span
from .softmax import LN2, LOG2E, finish, fold_logits, tanh
from .words import Pages, find_slots, load_position_scales, load_word_scales, load_words

_SMALLEST = tl.constexpr(2.0**-126)  # the smallest normal float32


class Arrays(NamedTuple):
    """What the kernel is given, but for what only finds rows."""

    query_ptr: tl.tensor
    key_cache_ptr: tl.tensor
    value_cache_ptr: tl.tensor
    block_tables_ptr: tl.tensor
    sinks_ptr: tl.tensor
    k_scale_ptr: tl.tensor
    v_scale_ptr: tl.tensor
    layer: tl.tensor
    table_stride: tl.tensor
    num_blocks: tl.tensor
    out_ptr: tl.tensor
    lse_ptr: tl.tensor


class Sums(NamedTuple):
    """What is known of the positions so far; see `softmax.py`."""

    m: tl.tensor  # [ROWS] running maximum
    l: tl.tensor  # [ROWS] normalizer
    acc: tl.tuple  # [ROWS, words] for each element of a word
    v_scale_max: tl.tensor  # [ROWS] or one number: where positions of V have scales, the largest; acc is relative to it


@triton.jit
def _scores(query, k, pages, slots, MASKED: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Scores of a tile, `[ROWS, POSITIONS]`, before they are scaled; `k` are the main words of K."""
    K: tl.constexpr = P.key
    KS: tl.constexpr = K.scales
    ROPE: tl.constexpr = P.rope
    k_scales = load_word_scales(pages.key_cache_ptr, pages, slots, 0, K.main, T.positions, K, P.compute)
    scores = tl.full([T.rows, T.positions], 0.0, tl.float32)
    scores = add_scores(scores, query.main, k, k_scales, K, P)
    if K.rest > 0:
        k = load_words(pages.key_cache_ptr, pages, slots, K.main, K.rest, MASKED, K)
        k_scales = load_word_scales(pages.key_cache_ptr, pages, slots, K.main, K.rest, T.positions, K, P.compute)
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
    """Multiplies weights by the scales of their positions, `[POSITIONS]`, relative to the largest so far.

    Products with the scales themselves could be too large or too small for float16. `old` is the largest before this
    tile; the new one is returned with weights and with shrink, which takes sums from the old to the new.
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
def _fold_tiles(
    sums, query, pages, first_tile, end_tile, first, limit,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Takes tiles of positions into the sums.

    Args:
        sums: `Sums` of what was before.
        query: The rows.
        pages: The cache.
        first_tile: Tiles first_tile … end_tile - 1 are taken.
        end_tile: See first_tile.
        first: Positions first … limit - 1 exist.
        limit: See first.
        MASKED: False promises that every position of the tiles exists, and that every row sees it.
        CAREFUL: Whether values that a row does not see leave its sums alone even if they are infinite or NaN.
        P: All constants.
        T: The tile.
    """
    K: tl.constexpr = P.key
    V: tl.constexpr = P.value
    VS: tl.constexpr = V.scales
    OPTIONS: tl.constexpr = P.options
    SCALED: tl.constexpr = MASKED or OPTIONS.soft_cap is not None
    for tile in tl.range(first_tile, end_tile, num_stages=T.stages):
        m, l, acc, v_scale_max = sums
        n = tile * T.positions + tl.arange(0, T.positions)
        slots = find_slots(pages, n, first, limit, MASKED, P)
        k = load_words(pages.key_cache_ptr, pages, slots, 0, K.main, MASKED, K)
        scores = _scores(query, k, pages, slots, MASKED, P, T)

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
        m, l, weights, shrink = fold_logits(m, l, logits, query.scale, SCALED, MASKED, P.weight_bits)

        v_scales = load_word_scales(pages.value_cache_ptr, pages, slots, 0, V.main, T.positions, V, P.compute)
        v_scale = None
        if VS is not None:
            if not VS.inside:
                v_scale = load_position_scales(pages.v_scale_ptr, pages, slots, VS)
                weights, shrink, v_scale_max = _weigh_by_scale(
                    weights, shrink, v_scale_max, v_scale, seen, MASKED, CAREFUL, P
                )
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


@triton.jit
def _no_sums(P: tl.constexpr, T: tl.constexpr):
    """The sums of no positions."""
    V: tl.constexpr = P.value
    ELEMENTS: tl.constexpr = V.elements_per_word
    m = tl.full([T.rows], float("-inf"), tl.float32)
    l = tl.full([T.rows], 0.0, tl.float32)
    acc = (tl.full([T.rows, V.main], 0.0, tl.float32),)
    for _ in tl.static_range(1, ELEMENTS):
        acc = acc + (tl.full([T.rows, V.main], 0.0, tl.float32),)
    return Sums(m, l, acc, tl.full([], _SMALLEST, tl.float32))  # not 0: what is divided by it stays finite


@triton.jit
def _attend(arrays, rows, span, CAREFUL: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Attention of a tile of rows over a span of positions. Stores the result, and tells whether a sum is not finite.

    Returns 0.0, or NaN if so.
    """
    # ---- rows, [ROWS]
    Q: tl.constexpr = P.query
    row = rows.first + tl.arange(0, T.rows)
    inside = row < rows.length * Q.q_per_kv
    token = row // Q.q_per_kv
    q_head = rows.head * Q.q_per_kv + row % Q.q_per_kv
    row_offset = (rows.start + token).to(tl.int64) * Q.token_stride + q_head * Q.head_stride
    position = span.first_token
    if P.by_row:
        position = span.first_token + token
    query = load_query(arrays.query_ptr, arrays.k_scale_ptr, rows.head, row_offset, inside, position, P, T)

    # ---- positions
    table_ptr = arrays.block_tables_ptr + rows.seq.to(tl.int64) * arrays.table_stride
    pages = Pages(
        arrays.key_cache_ptr, arrays.value_cache_ptr, arrays.k_scale_ptr, arrays.v_scale_ptr, table_ptr,
        arrays.num_blocks, rows.head, layer_index(arrays.layer, P.layer_is_pointer),
    )  # fmt: skip
    first_tile = span.begin // T.positions
    end_tile = cdiv(span.end, T.positions)
    sums = _no_sums(P, T)
    if P.whole_tiles and not CAREFUL:
        sums, first_tile = _fold_whole_tiles(sums, query, pages, rows, span, first_tile, end_tile, P, T)
    if P.by_row:  # from here on rows differ
        sums = Sums(sums.m, sums.l, sums.acc, tl.full([T.rows], 0.0, tl.float32) + sums.v_scale_max)
    sums = _fold_tiles(sums, query, pages, first_tile, end_tile, span.first, span.limit, True, CAREFUL, P, T)

    # ---- result
    return _store_result(arrays, sums, rows, token, q_head, inside, P)


@triton.jit
def _fold_whole_tiles(sums, query, pages, rows, span, first_tile, end_tile, P: tl.constexpr, T: tl.constexpr):
    """Takes the tiles that every row sees wholly into the sums, without masks. Returns the first tile that remains."""
    Q: tl.constexpr = P.query
    OPTIONS: tl.constexpr = P.options
    limit = span.limit
    if OPTIONS.causal:
        limit = tl.minimum(limit, span.first_token + rows.first // Q.q_per_kv + 1)
    num_entries = cdiv(tl.maximum(span.limit, 0), P.block_size)
    exist = all_blocks_exist(pages.table_ptr, num_entries, pages.num_blocks, P)
    end_whole = tl.maximum(tl.minimum(limit // T.positions, end_tile), first_tile)
    end_whole = tl.where(exist, end_whole, first_tile)
    sums = _fold_tiles(sums, query, pages, first_tile, end_whole, span.first, span.limit, False, False, P, T)
    return sums, end_whole


@triton.jit
def _store_result(arrays, sums, rows, token, q_head, inside, P: tl.constexpr):
    """Stores the result of rows, or their partial result, and the logarithm of their normalizers.

    Returns 0.0, or NaN if a sum is not finite.
    """
    Q: tl.constexpr = P.query
    V: tl.constexpr = P.value
    VS: tl.constexpr = V.scales
    m, l, acc, v_scale_max = sums
    sink = None
    if arrays.sinks_ptr is not None and not P.split:
        sink = tl.load(arrays.sinks_ptr + q_head * Q.sink_stride, mask=inside, other=0)
    WEIGHT: tl.constexpr = 2.0**-P.weight_bits
    factor, log = finish(m, l * WEIGHT, sink)
    factor = factor * WEIGHT
    if VS is not None:
        if not VS.inside:
            factor = factor * v_scale_max
    if arrays.v_scale_ptr is not None:
        if VS is None or VS.inside:
            factor = factor * tl.load(arrays.v_scale_ptr + rows.head * Q.v_scale_stride)
    factor = tl.where(l == 0, 0.0, factor)  # what saw nothing is 0, even where a scale is NaN

    result = (rows.start + token).to(tl.int64) * Q.num_heads + q_head
    if P.split:
        result = result * tl.num_programs(1) + tl.program_id(1)
    else:
        log = log * LN2
    tl.store(arrays.lse_ptr + result, log, mask=inside)
    OUT: tl.constexpr = None if P.split else P.out
    ELEMENTS: tl.constexpr = V.elements_per_word
    word = tl.arange(0, V.main)
    mask = inside[:, None] & (word < V.words)[None, :]
    out = arrays.out_ptr + result[:, None] * (V.words * ELEMENTS) + word[None, :] * ELEMENTS
    for element in tl.static_range(ELEMENTS):
        store_rounded(out + element, acc[element] * factor[:, None], mask, OUT)
    zeros = 0.0
    for element in tl.static_range(ELEMENTS):
        zeros += total(total(acc[element] * 0.0, 1), 0)
    return zeros


@triton.jit(noinline=True)
def _attend_with_care(arrays, rows, span, P: tl.constexpr):
    """Attention of few rows, CAREFUL. It stays a function when compiled, so that the usual way keeps its registers."""
    TILE: tl.constexpr = P.careful_tile
    _attend(arrays, rows, span, True, P, TILE)


@triton.jit
def paged_attention_kernel(
    query_ptr,            # [num_tokens, num_q_heads, head_size]
    key_cache_ptr,        # K's array
    value_cache_ptr,      # V's array
    block_tables_ptr,     # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,         # [num_seqs] int32 or int64
    query_start_loc_ptr,  # [num_seqs + 1] int32 or int64, or None for one token a sequence
    sinks_ptr,            # [num_q_heads], or None
    k_scale_ptr,          # one float32, or one a head, or one a token and head, or None for 1
    v_scale_ptr,
    layer,                # one integer in memory (P.layer_is_pointer), an integer, or None
    num_tokens,
    num_seqs,
    max_blocks,           # entries of a row of block_tables
    table_stride,         # elements from one row of block_tables to the next
    num_blocks,           # of one layer
    num_layers,
    out_ptr,              # [num_tokens, num_q_heads, head_size_v]; P.split: […, splits, head_size_v] float32
    lse_ptr,              # [num_tokens, num_q_heads] float32; P.split: [num_tokens, num_q_heads, splits], to base 2
    P: tl.constexpr,      # kvcore.plan.constants.AttentionConstants
):  # fmt: skip
    """Attention of a tile of rows over one split of the positions."""
    TILE: tl.constexpr = P.tile
    Q: tl.constexpr = P.query
    rows, end, seq_len = find_rows(query_start_loc_ptr, seq_lens_ptr, num_tokens, num_seqs, P, TILE)
    if rows.first < rows.length * Q.q_per_kv:
        span = find_span(rows, end, seq_len, max_blocks, layer, num_layers, P, TILE)
        arrays = Arrays(
            query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, layer,
            table_stride, num_blocks, out_ptr, lse_ptr,
        )  # fmt: skip
        zeros = _attend(arrays, rows, span, False, P, TILE)
        if P.by_row:
            # An infinite or NaN value that only some rows see spoils the others, as 0 times that is NaN. Then once more
            # with care, and a few rows at a time: slow, but little code.
            if zeros != 0.0:
                tl.debug_barrier()  # other threads of the program may write the same elements
                CAREFUL: tl.constexpr = P.careful_tile
                for part in range(TILE.rows // CAREFUL.rows):
                    part_rows = Rows(rows.head, rows.seq, rows.start, rows.length, rows.first + part * CAREFUL.rows)
                    _attend_with_care(arrays, part_rows, span, P)
