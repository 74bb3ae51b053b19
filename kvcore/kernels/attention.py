"""Attention over a paged KV cache, for any mix of decode, speculative decoding and chunked prefill.

The queries of a sequence that share a KV head are its *rows*: `row = token * GROUP + q_head_in_group`. A program takes
ROWS of them, one KV head, and one of the splits of the KV positions that they see, in tiles of TILE positions:

    tile  of rows   first_row = (tile - first tile of the sequence) * ROWS
                    first tile of sequence s: begin[s] * GROUP // ROWS + s + 1,   begin[s] = max(start[0], …, start[s])
    position        n = 0 … seq_len - 1, token t of query stands at seq_len - start[s + 1] + t
    block           block_tables[s, n // BLOCK_SIZE],   place = n % BLOCK_SIZE
    cache element   offset + layer·L + block·B + place·S + head·H + (dim // x)·D + (dim % x)·X

The cache is read in words of one element, or of several that lie side by side: its *lanes*. Each lane has a product of
its own with those elements of query, or a sum of its own of values.

Scales of tensors and heads go into the logits and into the result; scales of positions into logits and weights; only
scales of groups within a head are multiplied with elements.

Softmax is online, to base 2, in float32. Where positions are split, each program leaves its part and the logarithm of
its denominator, and `merge_attention_kernel` joins them.
"""

import triton
import triton.language as tl

from .address import dim_offset, layer_index, slot_offset
from .decode import decode, decode_lane, narrow, widen
from .encode import encode, spread
from .reduce import maximum, minimum, total

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Weights in float16 are up to 2^14, not 1: they then lose nothing that a sum over millions would notice.
FLOAT16_WEIGHT_BITS = tl.constexpr(14.0)

LEAST_UNIT = tl.constexpr(2.0**-126)


@triton.jit
def _cdiv(a, b):  # tl.cdiv, which the interpreter cannot call
    return (a + b - 1) // b


@triton.jit
def _begins(query_start_loc_ptr, s, num_seqs, num_tokens, START_STRIDE: tl.constexpr):
    """Where sequences s begin in query, or where they would if it had such tokens."""
    start = tl.load(query_start_loc_ptr + s * START_STRIDE, mask=s <= num_seqs, other=0)
    return tl.minimum(tl.maximum(start, 0), num_tokens).to(tl.int32)


@triton.jit
def _find_sequence(query_start_loc_ptr, tile, num_seqs, num_tokens, START_STRIDE: tl.constexpr, GROUP: tl.constexpr,
                   ROWS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The sequence that a tile of rows belongs to, and where in query that begins: not before any earlier start.

    -1 and num_seqs stand for the tokens before and after all sequences.
    """
    # Sequence s begins past the tile if for any j ≤ s  begin[j] * GROUP // ROWS + s + 1 > tile. The first that does:
    after = num_seqs + 1
    for first in range(0, num_seqs + 1, CHUNK):
        j = first + tl.arange(0, CHUNK)
        begin = _begins(query_start_loc_ptr, j, num_seqs, num_tokens, START_STRIDE)
        past = tl.maximum(j, tile - begin * GROUP // ROWS)
        after = tl.minimum(after, minimum(tl.where(j <= num_seqs, past, after), 0))
    start = 0
    for first in range(0, after, CHUNK):
        j = first + tl.arange(0, CHUNK)
        begin = _begins(query_start_loc_ptr, j, num_seqs, num_tokens, START_STRIDE)
        start = tl.maximum(start, maximum(tl.where(j < after, begin, 0), 0))
    return after - 1, start


@triton.jit
def _words(cache_ptr, C: tl.constexpr):
    if C.word == 2:
        cache_ptr = cache_ptr.to(tl.pointer_type(tl.uint16))
    return cache_ptr


@triton.jit
def _row_of_cache(block, place, head, layer, C: tl.constexpr):
    """Where the head of a slot begins."""
    if C.wide:
        block = block.to(tl.int64)
    else:
        block = block.to(tl.int32)
        layer = layer.to(tl.int32)
    return slot_offset(layer, block, place, C) + head * C.head_stride


@triton.jit
def _load(cache_ptr, row, good, FIRST: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr):
    """Words FIRST … FIRST + SIZE - 1 of rows of the cache, `[TILE, SIZE]`; zeros where there are none."""
    word = FIRST + tl.arange(0, SIZE)
    at = cache_ptr + row[:, None] + dim_offset(word, C)[None, :]
    if C.head_size < FIRST + SIZE:
        x = tl.load(at, mask=good[:, None] & (word < C.head_size)[None, :], other=0)
    elif MASKED:
        x = tl.load(at, mask=good[:, None], other=0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _scales_of_positions(scale_ptr, block, place, head, layer, good, S: tl.constexpr):
    """Each position's own scale, `[TILE]`."""
    at = slot_offset(layer, block.to(tl.int64), place, S) + head * S.head_stride
    return tl.load(scale_ptr + at, mask=good, other=0)


@triton.jit
def _scales_of_words(
    cache_ptr, block, place, head, layer, good, FIRST: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The scales of words FIRST … FIRST + SIZE - 1, `[TILE, SIZE]`, out of the cache's own memory.

    In COMPUTE where products with elements are exact, else in float32.
    """
    GROUP: tl.constexpr = S.group // C.pack  # words that share one
    group = FIRST // GROUP + tl.arange(0, SIZE // GROUP)
    row = slot_offset(layer, block.to(tl.int64), place, S) + head * S.head_stride
    at = row[:, None] + dim_offset(group, S)[None, :]
    mask = good[:, None] & (group * GROUP < C.head_size)[None, :]
    if S.bits == 8:
        scale = tl.load(cache_ptr.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0)
        scale = narrow(decode(scale, S, False), COMPUTE)
    else:
        scale = tl.load(cache_ptr.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0)
    return spread(scale, TILE, SIZE, GROUP)


@triton.jit
def _lane(x, own, LANE: tl.constexpr, C: tl.constexpr, CACHE: tl.constexpr, COMPUTE: tl.constexpr,
          HARDWARE: tl.constexpr):  # fmt: skip
    """One lane of words, times their own scales if they have any, as floats of COMPUTE."""
    if own is None:
        x = decode_lane(x, LANE, C.pack, CACHE, COMPUTE, HARDWARE)
    elif own.dtype == tl.float32:
        x = narrow(widen(decode((x >> (LANE * CACHE.bits)).to(tl.uint8), CACHE, HARDWARE)) * own, COMPUTE)
    else:
        x = decode_lane(x, LANE, C.pack, CACHE, COMPUTE, HARDWARE) * own
    return x


@triton.jit
def _load_query(query_ptr, row, inside, BASE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
                LANE: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """The elements of query that meet one lane of the words FIRST … FIRST + SIZE - 1, which begin at dim BASE."""
    word = FIRST + tl.arange(0, SIZE)
    dim = BASE + word * C.pack + LANE
    q = tl.load(
        query_ptr + row[:, None] + dim[None, :] * Q.dim_stride,
        mask=inside[:, None] & (word < C.head_size)[None, :],
        other=0,
    )
    if COMPUTE.mantissa_bits != 7:  # bfloat16 goes to the tensor cores as it is
        q = widen(q)
    return q


@triton.jit
def _load_query_lanes(query_ptr, row, inside, BASE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
                      Q: tl.constexpr, C: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    q = (_load_query(query_ptr, row, inside, BASE, FIRST, SIZE, 0, Q, C, COMPUTE),)
    PACK: tl.constexpr = C.pack
    for lane in tl.static_range(1, PACK):
        q = q + (_load_query(query_ptr, row, inside, BASE, FIRST, SIZE, lane, Q, C, COMPUTE),)
    return q


@triton.jit
def _largest(q, PACK: tl.constexpr):
    """The largest magnitude of each row, in all lanes."""
    largest = maximum(tl.abs(q[0]), 1)
    for lane in tl.static_range(1, PACK):
        largest = tl.maximum(largest, maximum(tl.abs(q[lane]), 1))
    return largest


@triton.jit
def _scaled(q, factor, COMPUTE: tl.constexpr, PACK: tl.constexpr):
    """Lanes times a factor for each row, as floats of COMPUTE."""
    scaled = (narrow(q[0] * factor[:, None], COMPUTE),)
    for lane in tl.static_range(1, PACK):
        scaled = scaled + (narrow(q[lane] * factor[:, None], COMPUTE),)
    return scaled


@triton.jit
def _scores(s, q, x, own, C: tl.constexpr, CACHE: tl.constexpr, COMPUTE: tl.constexpr, HARDWARE: tl.constexpr):
    """Adds q times K's words x to s."""
    PACK: tl.constexpr = C.pack
    for lane in tl.static_range(PACK):
        k = _lane(x, own, lane, C, CACHE, COMPUTE, HARDWARE)
        s = tl.dot(q[lane], tl.trans(k), s, input_precision="ieee")
    return s


@triton.jit
def _accumulate(acc, p, x, own, shrink, C: tl.constexpr, CACHE: tl.constexpr, COMPUTE: tl.constexpr,
                HARDWARE: tl.constexpr):  # fmt: skip
    """Each lane's sum of values, times shrink, plus weights p times V's words x."""
    v = _lane(x, own, 0, C, CACHE, COMPUTE, HARDWARE)
    p = p.to(v.dtype)
    new = (tl.dot(p, v, acc[0] * shrink[:, None], input_precision="ieee"),)
    PACK: tl.constexpr = C.pack
    for lane in tl.static_range(1, PACK):
        v = _lane(x, own, lane, C, CACHE, COMPUTE, HARDWARE)
        new = new + (tl.dot(p, v, acc[lane] * shrink[:, None], input_precision="ieee"),)
    return new


@triton.jit
def _accumulate_seen(acc, p, seen, x, own, v_scale, shrink, C: tl.constexpr, CACHE: tl.constexpr,
                     COMPUTE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """As `_accumulate`, for values that may be infinite or NaN, which rows must not notice unless they see them."""
    infinity = float("inf")
    saw = narrow(tl.where(seen, 1.0, 0.0), COMPUTE)
    new = ()
    PACK: tl.constexpr = C.pack
    for lane in tl.static_range(PACK):
        v = widen(_lane(x, own, lane, C, CACHE, COMPUTE, HARDWARE))
        scaled = v
        if v_scale is not None:
            scaled = v * v_scale[:, None]
        finite = tl.abs(scaled) < infinity
        v = narrow(tl.where(finite, v, 0.0), COMPUTE)
        rest = tl.where(tl.abs(acc[lane]) < infinity, acc[lane] * shrink[:, None], acc[lane])
        rest = tl.dot(p.to(v.dtype), v, rest, input_precision="ieee")
        # How many infinities of each sign a row sees; NaN counts as both.
        nan = scaled != scaled
        above = tl.dot(saw, narrow(tl.where(nan | (scaled == infinity), 1.0, 0.0), COMPUTE), input_precision="ieee")
        below = tl.dot(saw, narrow(tl.where(nan | (scaled == -infinity), 1.0, 0.0), COMPUTE), input_precision="ieee")
        rest = tl.where(above > 0, rest + infinity, rest)
        new = new + (tl.where(below > 0, rest - infinity, rest),)
    return new


@triton.jit
def _tanh(x):
    """The hyperbolic tangent. Near 0, where the usual form cancels, its series."""
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, near, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def _tiles(
    m, norm, acc, unit, q_low, q_high, first_tile, end_tile, first, limit, row_position,
    key_cache_ptr, value_cache_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head, layer, num_blocks, qk_scale,
    K: tl.constexpr, V: tl.constexpr, HIGH: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr,
    CACHE: tl.constexpr, HIGH_FORMAT: tl.constexpr, COMPUTE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TABLE_STEP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, BY_ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    V_IN_K: tl.constexpr, WEIGHT_BITS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Folds tiles of positions into the running maximum m, denominator norm and sum acc.

    Where positions have scales of their own, the sum is relative to `unit`, the largest of V's so far: weights stay
    what float16 can hold. Unless MASKED, every position of the tiles exists and is seen by every row. BY_ROW: rows
    differ in what they see. CAREFUL: even where hidden values are infinite or NaN; else these spoil the sum, as zero
    times NaN is NaN.
    """
    for t in tl.range(first_tile, end_tile, num_stages=STAGES):
        n = t * TILE + tl.arange(0, TILE)
        if MASKED:
            good = n < limit
            if WINDOW is not None:  # what all rows have passed may have been freed, and hold anything
                good = good & (n >= first)
            block = tl.load(table_ptr + n // BLOCK_SIZE * TABLE_STEP, mask=good, other=-1)
            good = good & (block >= 0) & (block < num_blocks)
        else:
            block = tl.load(table_ptr + n // BLOCK_SIZE * TABLE_STEP)
            good = n >= 0
        place = n % BLOCK_SIZE
        k_row = _row_of_cache(block, place, head, layer, K)
        k = _load(_words(key_cache_ptr, K), k_row, good, 0, K.low, MASKED, K)
        k_own = None
        if KS is not None:
            if KS.inside:
                k_own = _scales_of_words(key_cache_ptr, block, place, head, layer, good, 0, K.low, TILE, K, KS, COMPUTE)
        s = tl.full([ROWS, TILE], 0.0, tl.float32)
        s = _scores(s, q_low, k, k_own, K, CACHE, COMPUTE, HARDWARE)
        if K.high > 0:
            if HIGH is None:
                k_high = _load(_words(key_cache_ptr, K), k_row, good, K.low, K.high, MASKED, K)
                if KS is not None:
                    if KS.inside:
                        k_own = _scales_of_words(
                            key_cache_ptr, block, place, head, layer, good, K.low, K.high, TILE, K, KS, COMPUTE
                        )
                s = _scores(s, q_high, k_high, k_own, K, CACHE, COMPUTE, HARDWARE)
            else:
                rope_ptr = key_cache_ptr.to(tl.pointer_type(tl.bfloat16))
                rope_row = _row_of_cache(block, place, head, layer, HIGH)
                k_high = _load(rope_ptr, rope_row, good, 0, K.high, MASKED, HIGH)
                s = _scores(s, q_high, k_high, None, HIGH, HIGH_FORMAT, COMPUTE, HARDWARE)
        if KS is not None:
            if not KS.inside:
                s = s * _scales_of_positions(k_scale_ptr, block, place, head, layer, good, KS)[None, :]

        if SOFT_CAP is not None:
            CAP: tl.constexpr = SOFT_CAP * LOG2E
            s = CAP * _tanh(s * (qk_scale * (1 / CAP))[:, None])
        if MASKED:
            seen = good[None, :]
            if BY_ROW and CAUSAL:
                seen = seen & (n[None, :] <= row_position[:, None])
                if WINDOW is not None:
                    seen = seen & (row_position[:, None] - n[None, :] < WINDOW)
            if SOFT_CAP is None:
                s = s * qk_scale[:, None]
            s = tl.where(seen, s, float("-inf"))
        if MASKED or SOFT_CAP is not None:
            m_new = tl.maximum(m, maximum(s, 1))
        else:  # qk_scale is not negative: one multiply-add scales a logit and subtracts
            m_new = tl.maximum(m, maximum(s, 1) * qk_scale)
            s = s * qk_scale[:, None]
        origin = m_new
        if MASKED:  # a row may have seen nothing yet
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - (origin - WEIGHT_BITS)[:, None])
        shrink = tl.exp2(m - origin)
        norm = norm * shrink + total(p, 1)
        m = m_new

        v_own = None
        v_scale = None
        if VS is not None:
            if VS.inside:
                v_own = _scales_of_words(
                    value_cache_ptr, block, place, head, layer, good, 0, V.low, TILE, V, VS, COMPUTE
                )
            else:
                v_scale = _scales_of_positions(v_scale_ptr, block, place, head, layer, good, VS)
                size = tl.where(tl.abs(v_scale) < float("inf"), tl.abs(v_scale), 0.0)
                if MASKED and BY_ROW and CAUSAL:  # of each row, by what it sees
                    new_unit = tl.maximum(unit, maximum(tl.where(seen, size[None, :], 0.0), 1))
                    factor = v_scale[None, :] * (1 / new_unit)[:, None]
                    if CAREFUL:
                        factor = tl.where(seen & (tl.abs(v_scale) < float("inf"))[None, :], factor, 0.0)
                else:
                    new_unit = tl.maximum(unit, maximum(size, 0))
                    factor = (v_scale / new_unit)[None, :]
                p = p * factor
                shrink = shrink * (unit / new_unit)
                unit = new_unit
        if V_IN_K:
            v = k
        else:
            v_row = _row_of_cache(block, place, head, layer, V)
            v = _load(_words(value_cache_ptr, V), v_row, good, 0, V.low, MASKED, V)
        if CAREFUL:
            acc = _accumulate_seen(acc, p, seen, v, v_own, v_scale, shrink, V, CACHE, COMPUTE, HARDWARE)
        else:
            acc = _accumulate(acc, p, v, v_own, shrink, V, CACHE, COMPUTE, HARDWARE)
    return m, norm, acc, unit


@triton.jit
def _all_blocks_exist(table_ptr, num_entries, num_blocks, TABLE_STEP: tl.constexpr, CHUNK: tl.constexpr):
    missing = 0
    for first in range(0, num_entries, CHUNK):
        i = first + tl.arange(0, CHUNK)
        block = tl.load(table_ptr + i * TABLE_STEP, mask=i < num_entries, other=0)
        missing += total(((block < 0) | (block >= num_blocks)).to(tl.int32), 0)
    return missing == 0


@triton.jit
def _store(ptr, x, mask, OUT: tl.constexpr, AS_IT_IS: tl.constexpr):
    """Stores float32: as it is, or rounded, to OUT with integers where the target's cast is not to be trusted."""
    if AS_IT_IS or OUT is None:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        bits = encode(x, None, OUT, False)
        tl.store(ptr.to(tl.pointer_type(bits.dtype)), bits, mask=mask)


@triton.jit
def _finish(m, norm, sink):
    """Denominator, factor of the sum, and base-2 logarithm of the denominator, once all positions are in."""
    if sink is not None:
        sink = sink.to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        factor = tl.exp2(m - origin)
        norm = norm * factor + tl.exp2(sink - origin)
        m = m_new
    else:
        factor = tl.full(m.shape, 1.0, tl.float32)
    nothing = norm == 0
    log = tl.where(nothing, float("-inf"), m + tl.log2(norm))
    return factor / tl.where(nothing, 1.0, norm), log


@triton.jit
def _attend(
    query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, layer,
    table_stride, num_blocks, out_ptr, lse_ptr, head, seq, start, length, first_row, offset, first, limit,
    first_position, end_position,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HIGH: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr,
    CACHE: tl.constexpr, HIGH_FORMAT: tl.constexpr, COMPUTE: tl.constexpr, OUT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    V_IN_K: tl.constexpr, HARDWARE: tl.constexpr, LAYER_IS_POINTER: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, UNMASKED: tl.constexpr, BY_ROW: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over positions from first_position to below end_position. Stores its results.

    Returns 0, or NaN if a sum is not finite.
    """
    # ---- rows
    row = first_row + tl.arange(0, ROWS)
    row_inside = row < length * Q.group
    token = row // Q.group
    q_head = head * Q.group + row % Q.group
    q_row = (start + token).to(tl.int64) * Q.token_stride + q_head * Q.head_stride
    q_low = _load_query_lanes(query_ptr, q_row, row_inside, 0, 0, K.low, Q, K, COMPUTE)
    q_high = q_low
    HIGH_PACK: tl.constexpr = K.pack if HIGH is None else 1
    if K.high > 0:
        if HIGH is None:
            q_high = _load_query_lanes(query_ptr, q_row, row_inside, 0, K.low, K.high, Q, K, COMPUTE)
        else:
            BASE: tl.constexpr = K.head_size * K.pack
            q_high = _load_query_lanes(query_ptr, q_row, row_inside, BASE, 0, K.high, Q, HIGH, COMPUTE)
    qk_scale = tl.full([ROWS], SCALE * LOG2E, tl.float32)
    if k_scale_ptr is not None:
        if KS is None or KS.inside:
            qk_scale = qk_scale * tl.load(k_scale_ptr + head * Q.k_scale_stride)
    # The sign goes to query: the unmasked loop takes the maximum before it scales.
    factor = tl.where(qk_scale < 0, -1.0, 1.0)
    qk_scale = tl.abs(qk_scale)
    if COMPUTE.mantissa_bits == 10:
        # Rows in float16, divided by a power of two of their own: exact but for what is 2^-24 of the largest.
        largest = tl.maximum(_largest(q_low, K.pack), _largest(q_high, HIGH_PACK))
        exponent = tl.minimum(largest.to(tl.uint32, bitcast=True) & 0x7F800000, 253 << 23)
        factor = factor * ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        qk_scale = qk_scale * exponent.to(tl.float32, bitcast=True)
    q_low = _scaled(q_low, factor, COMPUTE, K.pack)
    q_high = _scaled(q_high, factor, COMPUTE, HIGH_PACK)

    # ---- online softmax
    at_layer = layer_index(layer, LAYER_IS_POINTER)
    row_position = offset
    if BY_ROW:
        row_position = offset + token
    first_tile = first_position // TILE
    end_tile = _cdiv(end_position, TILE)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.full([ROWS], 0.0, tl.float32)
    acc = (tl.full([ROWS, V.low], 0.0, tl.float32),)
    LANES: tl.constexpr = V.pack
    for _ in tl.static_range(1, LANES):
        acc = acc + (tl.full([ROWS, V.low], 0.0, tl.float32),)
    unit = LEAST_UNIT
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
    WEIGHT_BITS: tl.constexpr = FLOAT16_WEIGHT_BITS if COMPUTE.mantissa_bits == 10 else 0.0
    whole_tile = first_tile
    if UNMASKED:
        whole = tl.minimum(limit, offset + first_row // Q.group + 1) if CAUSAL else limit
        exist = _all_blocks_exist(table_ptr, _cdiv(tl.maximum(limit, 0), BLOCK_SIZE), num_blocks, Q.table_step, 1024)
        end_whole = tl.maximum(tl.minimum(whole // TILE, end_tile), first_tile)
        whole_tile = tl.where(exist, end_whole, first_tile)
        m, norm, acc, unit = _tiles(
            m, norm, acc, unit, q_low, q_high, first_tile, whole_tile, first, limit, row_position,
            key_cache_ptr, value_cache_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head, at_layer, num_blocks,
            qk_scale, K, V, HIGH, KS, VS, CACHE, HIGH_FORMAT, COMPUTE, HARDWARE, BLOCK_SIZE, Q.table_step, ROWS,
            TILE, STAGES, False, BY_ROW, CAUSAL, WINDOW, SOFT_CAP, V_IN_K, WEIGHT_BITS, False,
        )  # fmt: skip
    if BY_ROW and CAUSAL:
        unit = tl.full([ROWS], 0.0, tl.float32) + unit
    m, norm, acc, unit = _tiles(
        m, norm, acc, unit, q_low, q_high, whole_tile, end_tile, first, limit, row_position,
        key_cache_ptr, value_cache_ptr, k_scale_ptr, v_scale_ptr, table_ptr, head, at_layer, num_blocks,
        qk_scale, K, V, HIGH, KS, VS, CACHE, HIGH_FORMAT, COMPUTE, HARDWARE, BLOCK_SIZE, Q.table_step, ROWS,
        TILE, STAGES, True, BY_ROW, CAUSAL, WINDOW, SOFT_CAP, V_IN_K, WEIGHT_BITS, CAREFUL,
    )  # fmt: skip
    # ---- result
    sink = None
    if sinks_ptr is not None and not SPLIT:
        sink = tl.load(sinks_ptr + q_head * Q.sink_stride, mask=row_inside, other=0)
    WEIGHT: tl.constexpr = 2.0**-WEIGHT_BITS
    factor, log = _finish(m, norm * WEIGHT, sink)
    factor = factor * WEIGHT
    saw_nothing = norm == 0
    if VS is not None:
        if not VS.inside:
            factor = factor * unit
    if v_scale_ptr is not None:
        if VS is None or VS.inside:
            factor = factor * tl.load(v_scale_ptr + head * Q.v_scale_stride)
    factor = tl.where(saw_nothing, 0.0, factor)  # even where a scale is NaN
    result_row = (start + token).to(tl.int64) * Q.num_heads + q_head
    if SPLIT:
        result_row = result_row * tl.num_programs(1) + tl.program_id(1)
    else:
        log = log * LN2
    tl.store(lse_ptr + result_row, log, mask=row_inside)
    word = tl.arange(0, V.low)
    out_mask = row_inside[:, None] & (word < V.head_size)[None, :]
    at = out_ptr + result_row[:, None] * (V.head_size * V.pack) + word[None, :] * V.pack
    for lane in tl.static_range(LANES):
        _store(at + lane, acc[lane] * factor[:, None], out_mask, OUT, SPLIT)
    sums = 0.0
    for lane in tl.static_range(LANES):
        sums += total(total(acc[lane] * 0.0, 1), 0)
    return sums


@triton.jit(noinline=True)
def _attend_with_care(
    query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, layer,
    table_stride, num_blocks, out_ptr, lse_ptr, head, seq, start, length, first_row, offset, first, limit,
    first_position, end_position,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HIGH: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr,
    CACHE: tl.constexpr, HIGH_FORMAT: tl.constexpr, COMPUTE: tl.constexpr, OUT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    V_IN_K: tl.constexpr, HARDWARE: tl.constexpr, LAYER_IS_POINTER: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `_attend`, but CAREFUL. It stays a function when compiled, so that the usual way keeps its registers."""
    _attend(
        query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, layer,
        table_stride, num_blocks, out_ptr, lse_ptr, head, seq, start, length, first_row, offset, first, limit,
        first_position, end_position,
        Q, K, V, HIGH, KS, VS, CACHE, HIGH_FORMAT, COMPUTE, OUT, BLOCK_SIZE, SCALE, CAUSAL, WINDOW, SOFT_CAP,
        V_IN_K, HARDWARE, LAYER_IS_POINTER, SPLIT, ROWS, TILE, 1, False, True, True,
    )  # fmt: skip


@triton.jit
def paged_attention_kernel(
    query_ptr,            # [num_tokens, num_q_heads, head_size]
    key_cache_ptr,        # K's array
    value_cache_ptr,      # V's array
    block_tables_ptr,     # [num_seqs, max_blocks] int32 or int64
    seq_lens_ptr,         # [num_seqs] int32 or int64
    query_start_loc_ptr,  # [num_seqs + 1] int32 or int64, or None for one token a sequence
    sinks_ptr,            # [num_q_heads], or None
    k_scale_ptr,          # one float32, or one a head, or one a token and head (KS), or None for 1
    v_scale_ptr,
    layer,                # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,
    num_seqs,
    max_blocks,           # entries of a row of block_tables
    table_stride,         # elements from one row of block_tables to the next
    num_blocks,           # of one layer
    num_layers,
    out_ptr,              # [num_tokens, num_q_heads, head_size_v]; SPLIT: [num_tokens, num_q_heads, splits, …] float32
    lse_ptr,              # [num_tokens, num_q_heads] float32; SPLIT: [num_tokens, num_q_heads, splits], to base 2
    Q: tl.constexpr,              # kvcore.plan_attention.QueryRows
    K: tl.constexpr,              # kvcore.plan_attention.CacheRows
    V: tl.constexpr,
    HIGH: tl.constexpr,           # … of the part of fp8_ds_mla in bfloat16, or None
    KS: tl.constexpr,             # kvcore.plan.rows.ScaleRows of computed scales, or None
    VS: tl.constexpr,
    CACHE: tl.constexpr,          # kvcore.formats.FloatFormat of the cache
    HIGH_FORMAT: tl.constexpr,    # … of the part that HIGH describes
    COMPUTE: tl.constexpr,        # … in which K, V and the weights are multiplied
    OUT: tl.constexpr,            # … to round the result to with integers, or None for the target's cast
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,         # positions seen, or None
    SOFT_CAP: tl.constexpr,       # or None
    V_IN_K: tl.constexpr,         # whether V is the first K.low elements of K
    HARDWARE: tl.constexpr,       # whether the target has the instructions that convert CACHE
    LAYER_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,          # whether axis 1 of the grid splits the positions
    MIN_TILES: tl.constexpr,      # fewest tiles of a split
    UNMASKED: tl.constexpr,       # whether tiles that all rows see wholly have a loop of their own; without WINDOW
):  # fmt: skip
    """Attention of ROWS rows over one split of the positions."""
    # Later tiles of a prefill see more: they start first, so that short ones fill the gaps at the end.
    head = tl.program_id(0) % Q.num_kv_heads
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // Q.num_kv_heads
    if query_start_loc_ptr is None:
        TILES_PER_SEQ: tl.constexpr = (Q.group + ROWS - 1) // ROWS
        seq = tile // TILES_PER_SEQ
        first_row = (tile % TILES_PER_SEQ) * ROWS
        start = seq
        end = start + 1
        length = start * 0 + 1
        seq_len = tl.load(seq_lens_ptr + seq * Q.lens_stride)
    else:
        seq, start = _find_sequence(
            query_start_loc_ptr, tile, num_seqs, num_tokens, Q.start_stride, Q.group, ROWS, 1024
        )
        first_row = (tile - (start * Q.group // ROWS + seq + 1)) * ROWS
        end = tl.load(query_start_loc_ptr + (seq + 1) * Q.start_stride, mask=seq < num_seqs, other=num_tokens)
        length = tl.maximum(tl.minimum(end, num_tokens), 0).to(tl.int32) - start
        seq_len = tl.load(seq_lens_ptr + seq * Q.lens_stride, mask=(seq >= 0) & (seq < num_seqs), other=0)
    seq_len = tl.minimum(tl.maximum(seq_len, 0), 2**31 - 1).to(tl.int32)
    if first_row < length * Q.group:
        BY_ROW: tl.constexpr = query_start_loc_ptr is not None
        # ---- positions that its rows see
        # Position of the first token. All far below 0 see as little.
        offset = tl.maximum(seq_len.to(tl.int64) - end + start, -(2**30)).to(tl.int32)
        limit = tl.minimum(seq_len, max_blocks * BLOCK_SIZE)
        first = 0
        if CAUSAL:
            last_token = tl.minimum((first_row + ROWS - 1) // Q.group, length - 1)
            limit = tl.minimum(limit, offset + last_token + 1)
            if WINDOW is not None:
                first = tl.maximum(tl.maximum(offset + first_row // Q.group, -1) - (WINDOW - 1), 0)
        if layer is not None:
            at_layer = layer_index(layer, LAYER_IS_POINTER)
            there = total(((at_layer >= 0) & (at_layer < num_layers)).to(tl.int32), 0)
            limit = tl.where(there > 0, limit, 0)
        end_tile = _cdiv(tl.maximum(limit, 0), TILE)
        first_tile = tl.minimum(first // TILE, end_tile)
        if SPLIT:
            share = tl.maximum(_cdiv(end_tile - first_tile, tl.num_programs(1)), MIN_TILES)
            first_tile = tl.minimum(first_tile + tl.program_id(1) * share, end_tile)
            end_tile = tl.minimum(first_tile + share, end_tile)
        first_position = first_tile * TILE
        end_position = end_tile * TILE

        sums = _attend(
            query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, layer,
            table_stride, num_blocks, out_ptr, lse_ptr, head, seq, start, length, first_row, offset, first, limit,
            first_position, end_position,
            Q, K, V, HIGH, KS, VS, CACHE, HIGH_FORMAT, COMPUTE, OUT, BLOCK_SIZE, SCALE, CAUSAL, WINDOW, SOFT_CAP,
            V_IN_K, HARDWARE, LAYER_IS_POINTER, SPLIT, ROWS, TILE, STAGES, UNMASKED, BY_ROW, False,
        )  # fmt: skip
        if BY_ROW and CAUSAL:
            # A value that only some rows see spoils others if it is not finite: 0 · NaN. Then once more with care, and
            # a few rows at a time: slow, but little code.
            if sums != 0.0:
                tl.debug_barrier()  # other threads of the program may write the same elements
                PART: tl.constexpr = 16
                for part in range(ROWS // PART):
                    part_row = first_row + part * PART
                    _attend_with_care(
                        query_ptr, key_cache_ptr, value_cache_ptr, block_tables_ptr, sinks_ptr, k_scale_ptr,
                        v_scale_ptr, layer, table_stride, num_blocks, out_ptr, lse_ptr, head, seq, start, length,
                        part_row, offset, first, limit, first_position, end_position,
                        Q, K, V, HIGH, KS, VS, CACHE, HIGH_FORMAT, COMPUTE, OUT, BLOCK_SIZE, SCALE, CAUSAL, WINDOW,
                        SOFT_CAP, V_IN_K, HARDWARE, LAYER_IS_POINTER, SPLIT, PART, min(TILE, 32),
                    )  # fmt: skip


@triton.jit
def merge_attention_kernel(
    part_ptr,      # [num_tokens, num_q_heads, splits, head_size_v] float32
    part_lse_ptr,  # [num_tokens, num_q_heads, splits] float32, to base 2; -inf where a part saw nothing
    sinks_ptr,     # [num_q_heads], or None
    splits,
    out_ptr,       # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,       # [num_tokens, num_q_heads] float32
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SINK_STRIDE: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,  # parts taken at a time
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one row: their average, weighted by their denominators."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, COLUMNS)
    dim_inside = dim < HEAD_SIZE
    m = tl.full([1], float("-inf"), tl.float32)
    norm = tl.full([1], 0.0, tl.float32)
    acc = tl.full([COLUMNS], 0.0, tl.float32)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        log = tl.load(part_lse_ptr + row * splits + part, mask=part < splits, other=float("-inf"))
        saw = log != float("-inf")
        at = part_ptr + (row * splits + part)[:, None] * HEAD_SIZE + dim[None, :]
        x = tl.load(at, mask=saw[:, None] & dim_inside[None, :], other=0.0)
        m_new = tl.maximum(m, maximum(log, 0))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(log - total(origin, 0))
        shrink = tl.exp2(m - origin)
        norm = norm * shrink + total(weight, 0)
        acc = acc * shrink + total(x * weight[:, None], 0)
        m = m_new
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (row % NUM_HEADS) * SINK_STRIDE + tl.arange(0, 1))
    factor, log = _finish(m, norm, sink)
    tl.store(lse_ptr + row + tl.arange(0, 1), log * LN2)
    _store(out_ptr + row * HEAD_SIZE + dim, acc * factor, dim_inside, OUT, False)
