"""Rotate queries and keys by their positions, norm them before that, and write keys and values into a paged KV cache.

A program takes ROWS heads of tokens, of K, of V, or of query (axis 0 of the grid: first all of K); a *row* is here a
head of a token, `row = token * num_heads + head`. What is rotated are the first `dim` elements of a row, in pairs
(x, y), by the angle of the token's position p and the pair's index i:

    x' = x · cos[p, i] - y · sin[p, i],   y' = y · cos[p, i] + x · sin[p, i]

All of it is float32 arithmetic in the order that kvcore.oracle.rope writes down: every operation is rounded.
`quantize.py` stores the rows of K and V, `address.py` says where everything is. ROTARY is kvcore.plan.rope.Rotary.
"""

import triton
import triton.language as tl

from .address import in_layer, layer_index, scales_of_layer
from .decode import widen
from .encode import encode
from .quantize import find_rows, load_rows, row_offsets, static_scales, store_rows, store_units
from .reduce import total


@triton.jit
def _inverse_norm(x, in_head, SIZE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`1 / sqrt(mean(x²) + EPS)` of rows of SIZE elements, `[ROWS, 1]`.

    Squares are added in pairs of neighbours, their sums in pairs, and so on: the order is part of the result.
    """
    sums = tl.where(in_head, x * x, 0.0)
    for level in tl.static_range(1, 32):
        if (WIDTH >> level) > 0:
            sums = total(tl.reshape(sums, [ROWS, WIDTH >> level, 2]), 2)
    mean = tl.div_rn(sums, tl.full(sums.shape, SIZE, tl.float32))
    return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + EPS))


@triton.jit
def _find_positions(positions_ptr, token, in_batch, pair, max_position, ROTARY: tl.constexpr):
    """Where tokens, `[ROWS]`, stand for pairs, `[pairs]`; and whether the table has it.

    Returns `[ROWS, 1]`, or `[ROWS, pairs]` where pairs have positions of their own; and `[ROWS]`.
    """
    positions_ptr += token * ROTARY.position_stride
    position = tl.load(positions_ptr, mask=in_batch, other=-1).to(tl.int64)
    exists = (position >= 0) & (position < max_position)
    position = position[:, None]
    SECTIONS: tl.constexpr = ROTARY.sections
    if SECTIONS is not None:
        second = tl.load(positions_ptr + ROTARY.section_stride, mask=in_batch, other=-1).to(tl.int64)
        third = tl.load(positions_ptr + 2 * ROTARY.section_stride, mask=in_batch, other=-1).to(tl.int64)
        exists = exists & (second >= 0) & (second < max_position) & (third >= 0) & (third < max_position)
        later = tl.where((pair < SECTIONS[0] + SECTIONS[1])[None, :], second[:, None], third[:, None])
        position = tl.where((pair < SECTIONS[0])[None, :], position, later)
    return position, exists


@triton.jit
def _repeat(x, ROWS: tl.constexpr):
    """Rows, `[loaded, runs, RUN]`, over and over, as `[ROWS, runs, RUN]`.

    What rows have in common is loaded for as many as a program's threads take at a time (SHARED): the others are in the
    same threads, in registers beside those, and from one row's threads nothing need go to another's.
    """
    LOADED: tl.constexpr = x.shape[0]
    RUNS: tl.constexpr = x.shape[1]
    RUN: tl.constexpr = x.shape[2]
    return tl.reshape(tl.broadcast_to(x[None, :, :, :], [ROWS // LOADED, LOADED, RUNS, RUN]), [ROWS, RUNS, RUN])


@triton.jit
def _load_angles(
    positions_ptr, cos_sin_ptr, token, in_batch, pair, max_position, ROTARY: tl.constexpr, ROWS: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of tokens for pairs, `[ROWS, runs, RUN]`, and whether the table has those of a token, `[ROWS]`.

    `pair` is `[runs, RUN]`. Pairs outside the rotation have none.
    """
    RUNS: tl.constexpr = pair.shape[0]
    RUN: tl.constexpr = pair.shape[1]
    position, exists = _find_positions(
        positions_ptr, token, in_batch, tl.reshape(pair, [RUNS * RUN]), max_position, ROTARY
    )  # fmt: skip
    if ROTARY.sections is None:
        position = position[:, :, None]
    else:
        position = tl.reshape(position, [position.shape[0], RUNS, RUN])
    offset = position * ROTARY.row_stride + (pair * ROTARY.column_stride)[None, :, :]
    LOADED: tl.constexpr = SHARED if position.shape[0] == 1 else ROWS
    angle_ptr = cos_sin_ptr + tl.broadcast_to(offset, [LOADED, RUNS, RUN])
    mask = exists[:, None, None] & ((pair >= 0) & (pair < ROTARY.dim // 2))[None, :, :]
    cosine = tl.load(angle_ptr, mask=mask, other=0)
    sine = tl.load(angle_ptr + (ROTARY.dim // 2) * ROTARY.column_stride, mask=mask, other=0)
    return _repeat(widen(cosine), ROWS), _repeat(widen(sine), ROWS), exists


@triton.jit
def _load_weights(norm_ptr, element, in_head, NORM_STRIDE: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """The norm's weights of elements, `[runs, RUN]`, as `[ROWS, runs, RUN]`."""
    SHAPE: tl.constexpr = [SHARED, element.shape[0], element.shape[1]]
    weight_ptr = norm_ptr + tl.broadcast_to((element * NORM_STRIDE)[None, :, :], SHAPE)
    return _repeat(widen(tl.load(weight_ptr, mask=in_head[None, :, :], other=0)), ROWS)


@triton.jit
def _load_rotated(
    array_ptr, norm_ptr, positions_ptr, cos_sin_ptr, token, head, in_batch, max_position,
    R: tl.constexpr, ROTATES: tl.constexpr, NORM_STRIDE: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows in float32, `[ROWS, elements]`, normed unless norm_ptr is None, and rotated if ROTATES.

    Also which elements a head has, `[1, elements]`.

    Pairs that are neighbours lie in registers of one thread. Of those that are half of ROTARY.dim apart, the other
    element of each is loaded, too: registers of another thread are further away than the cache. Elements are then taken
    in runs that stay side by side, which have an axis of their own, `[runs, RUN]`, and begin at multiples of RUN: only
    so does the compiler see that it may load many at a time. To `tl.where` it is blind.

    All is loaded before the first is used: the norm's division has branches, behind which the compiler leaves loads.
    """
    WIDTH: tl.constexpr = R.columns * R.elements_per_unit
    HALF: tl.constexpr = ROTARY.dim // 2
    HALVES: tl.constexpr = ROTATES and not ROTARY.interleaved
    RUN: tl.constexpr = ROTARY.run if HALVES else WIDTH
    SHARED: tl.constexpr = min(ROWS, max(1, ROTARY.at_once // WIDTH))  # rows that threads load at a time
    x, in_head = load_rows(array_ptr, token, head, in_batch, R)
    x = widen(x)
    run = tl.arange(0, WIDTH // RUN)[:, None]
    within = tl.arange(0, RUN)[None, :]
    first = (run < HALF // RUN).to(tl.int32)  # 1 for runs of the first half
    turns = run < ROTARY.dim // RUN
    other = (run + (2 * first - 1) * (HALF // RUN)) * RUN + within
    if norm_ptr is not None:
        element = run * RUN + within
        in_run = element < R.head_units * R.elements_per_unit
        weight = tl.reshape(_load_weights(norm_ptr, element, in_run, NORM_STRIDE, ROWS, SHARED), [ROWS, WIDTH])
    if HALVES:
        offset = other.to(tl.int64) if R.wide else other
        y = tl.load(
            array_ptr + row_offsets(token, head, R)[:, None, None] + (offset * R.dim_stride)[None, :, :],
            mask=in_batch[:, None, None] & turns[None, :, :],
            other=1,
        )
        y = tl.reshape(widen(y), [ROWS, WIDTH])
        if norm_ptr is not None:
            other_weight = tl.reshape(_load_weights(norm_ptr, other, turns, NORM_STRIDE, ROWS, SHARED), [ROWS, WIDTH])
        pair = (run + (first - 1) * (HALF // RUN)) * RUN + within
        cosine, sine, exists = _load_angles(
            positions_ptr, cos_sin_ptr, token, in_batch, pair, max_position, ROTARY, ROWS, SHARED
        )
        cosine, sine = tl.reshape(cosine, [ROWS, WIDTH]), tl.reshape(sine, [ROWS, WIDTH])
    elif ROTATES:
        pair = tl.arange(0, WIDTH // 2)[None, :]
        cosine, sine, exists = _load_angles(
            positions_ptr, cos_sin_ptr, token, in_batch, pair, max_position, ROTARY, ROWS, SHARED
        )
        cosine, sine = tl.reshape(cosine, [ROWS, WIDTH // 2]), tl.reshape(sine, [ROWS, WIDTH // 2])

    if norm_ptr is not None:
        inverse = _inverse_norm(x, in_head, R.head_units * R.elements_per_unit, ROTARY.eps, ROWS, WIDTH)
        x = x * inverse * weight
        if HALVES:
            y = y * inverse * other_weight
    if ROTATES:
        element = tl.arange(0, WIDTH)[None, :]
        if HALVES:
            kept = x * cosine
            mixed = y * sine
            # Not the sine is negated: to the compiler that is 0 - sine, and 0 - 0 has the wrong sign.
            turned = tl.where(element < HALF, kept - mixed, kept + mixed)
        else:
            one, two = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
            turned = tl.reshape(tl.join(one * cosine - two * sine, two * cosine + one * sine), [ROWS, WIDTH])
        x = tl.where(element < ROTARY.dim, turned, x)
        x = tl.where(exists[:, None], x, 0.0)
    return x, in_head


@triton.jit
def _rotate_query(
    query_ptr, positions_ptr, cos_sin_ptr, norm_ptr, num_tokens, max_position, out_ptr, program,
    Q: tl.constexpr, FORMAT: tl.constexpr, HARDWARE_CAST: tl.constexpr, ROTARY: tl.constexpr,
    NORM_STRIDE: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotates a program's rows of query."""
    token, head = find_rows(program, Q, ROWS)
    in_batch = token < num_tokens
    x, _ = _load_rotated(
        query_ptr, norm_ptr, positions_ptr, cos_sin_ptr, token, head, in_batch, max_position,
        Q, True, NORM_STRIDE, ROTARY, ROWS,
    )  # fmt: skip
    if IN_PLACE:
        tl.debug_barrier()  # other threads of the program may still be loading these elements
    store_units(out_ptr, encode(x, None, FORMAT, HARDWARE_CAST), head, 0, token, 0, in_batch, Q)


@triton.jit
def _write_side(
    array_ptr, cache_ptr, scale_cache_ptr, positions_ptr, cos_sin_ptr, slot_mapping_ptr, norm_ptr, scale_ptr,
    layer, num_written, num_slots, num_layers, max_position, program,
    R: tl.constexpr, S: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOT_STRIDE: tl.constexpr, FORMAT: tl.constexpr,
    HARDWARE_CAST: tl.constexpr, HARDWARE_SCALES: tl.constexpr, LAYER_IS_POINTER: tl.constexpr,
    ROTARY: tl.constexpr, ROTATES: tl.constexpr, NORM_STRIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes a program's rows of K, or of V: normed unless norm_ptr is None, rotated if ROTATES, else as they are."""
    token, head = find_rows(program, R, ROWS)
    in_batch = token < num_written
    slot = tl.load(slot_mapping_ptr + token * SLOT_STRIDE, mask=in_batch, other=-1).to(tl.int64)
    written = (slot >= 0) & (slot < num_slots)
    index = layer_index(layer, LAYER_IS_POINTER)
    written = in_layer(written, layer, index, num_layers)
    if scale_ptr is not None:
        scale_ptr = scales_of_layer(scale_ptr, layer, num_layers, LAYER_IS_POINTER, R.layer_scale_stride)
    if norm_ptr is None and not ROTATES:
        x, in_head = load_rows(array_ptr, token, head, in_batch, R)
    else:
        x, in_head = _load_rotated(
            array_ptr, norm_ptr, positions_ptr, cos_sin_ptr, token, head, in_batch, max_position,
            R, ROTATES, NORM_STRIDE, ROTARY, ROWS,
        )  # fmt: skip
    static_scale = static_scales(scale_ptr, head, R)
    store_rows(
        x, in_head, cache_ptr, scale_cache_ptr, static_scale, head, slot, index, written,
        R, S, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, BLOCK_SIZE, ROWS,
    )  # fmt: skip


@triton.jit
def rope_and_cache_kernel(
    query_ptr,          # [num_tokens, num_q_heads, head_size]
    key_ptr,            # [num_tokens, num_heads, head_size]
    value_ptr,          # [num_tokens, num_heads, head_size_v]
    key_cache_ptr,      # K's array, or the array of both
    value_cache_ptr,    # V's array; None: key_cache_ptr
    k_scale_cache_ptr,  # float32; None: there are none, or they lie in the cache
    v_scale_cache_ptr,  # … of V
    positions_ptr,      # [num_tokens], or [3, num_tokens], int32 or int64
    cos_sin_ptr,        # [max_position, dim]
    slot_mapping_ptr,   # [num_slots_given] int32 or int64
    q_norm_ptr,         # [head_size], or None for no norm
    k_norm_ptr,         # [head_size] of K, or None for no norm
    k_scale_ptr,        # static float32: one, one a head, or rows of such for all layers; None for 1. Also of nvfp4
    v_scale_ptr,        # … of V
    layer,              # one integer in memory (LAYER_IS_POINTER), an integer, or None
    num_tokens,         # rows of query
    num_written,        # entries of slot_mapping
    num_slots,          # of one layer
    num_layers,         # 1 where the cache has no axis layer
    max_position,       # rows of cos_sin
    out_ptr,            # query, rotated
    Q: tl.constexpr,             # kvcore.plan.rows.Rows of query and out, whose tokens are blocks of one slot
    K: tl.constexpr,             # … of key and key cache; columns cover a head
    V: tl.constexpr,             # … of value and value cache
    KS: tl.constexpr,            # kvcore.plan.rows.ScaleRows of k's computed scales, or None
    VS: tl.constexpr,            # … of v's
    BLOCK_SIZE: tl.constexpr,    # slots of a block
    SLOT_STRIDE: tl.constexpr,   # elements from one entry of slot_mapping to the next
    FORMAT_Q: tl.constexpr,      # kvcore.formats.FloatFormat of out
    FORMAT: tl.constexpr,        # … of K's elements; None: copied
    FORMAT_V: tl.constexpr,      # … of V's
    HARDWARE_Q: tl.constexpr,    # whether the compiler's cast to FORMAT_Q is exact on the target
    HARDWARE_CAST: tl.constexpr,  # … to FORMAT
    HARDWARE_SCALES: tl.constexpr,  # … to the format of computed scales
    LAYER_IS_POINTER: tl.constexpr,
    ROTARY: tl.constexpr,        # kvcore.plan.rope.Rotary
    LATENT: tl.constexpr,        # whether V is rotated, not K
    Q_NORM_STRIDE: tl.constexpr,  # elements from one weight of q_norm to the next
    K_NORM_STRIDE: tl.constexpr,
    IN_PLACE: tl.constexpr,      # whether out is query
    Q_ROWS: tl.constexpr,        # rows of query of a program
    ROWS: tl.constexpr,          # rows of K, or of V, of a program
):  # fmt: skip
    """Write a tile of rows of K, or of V, or rotate a tile of rows of query."""
    program = tl.program_id(0)
    if K.num_heads % ROWS == 0:
        programs = num_written * (K.num_heads // ROWS)
    else:
        programs = ((tl.cast(num_written, tl.int64) * K.num_heads + (ROWS - 1)) // ROWS).to(tl.int32)
    if program < programs:
        _write_side(
            key_ptr, key_cache_ptr, k_scale_cache_ptr, positions_ptr, cos_sin_ptr, slot_mapping_ptr, k_norm_ptr,
            k_scale_ptr, layer, num_written, num_slots, num_layers, max_position, program,
            K, KS, BLOCK_SIZE, SLOT_STRIDE, FORMAT, HARDWARE_CAST, HARDWARE_SCALES, LAYER_IS_POINTER,
            ROTARY, not LATENT, K_NORM_STRIDE, ROWS,
        )  # fmt: skip
    elif program < 2 * programs:
        _write_side(
            value_ptr, key_cache_ptr if value_cache_ptr is None else value_cache_ptr, v_scale_cache_ptr,
            positions_ptr, cos_sin_ptr, slot_mapping_ptr, None,
            v_scale_ptr, layer, num_written, num_slots, num_layers, max_position, program - programs,
            V, VS, BLOCK_SIZE, SLOT_STRIDE, FORMAT_V, HARDWARE_CAST, HARDWARE_SCALES, LAYER_IS_POINTER,
            ROTARY, LATENT, 0, ROWS,
        )  # fmt: skip
    else:
        _rotate_query(
            query_ptr, positions_ptr, cos_sin_ptr, q_norm_ptr, num_tokens, max_position, out_ptr,
            program - 2 * programs,
            Q, FORMAT_Q, HARDWARE_Q, ROTARY, Q_NORM_STRIDE, IN_PLACE, Q_ROWS,
        )  # fmt: skip
