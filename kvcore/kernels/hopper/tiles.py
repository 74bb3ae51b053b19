"""What consumers do with a tile: scores, weights, sums; all in the layouts of wgmma's registers.

    scores   [64, POSITIONS]     query · K
    weights  [64, POSITIONS]     2^(logit - running maximum): see `kvcore.kernels.softmax`
    acc      [64, head_size_v]   weights · V, summed

Vectors of rows come in two layouts, those of rows of scores and of rows of sums, which put a row into the same thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from ..address import head_offset
from ..sequences import CHUNK, all_blocks_exist, cdiv
from ..softmax import LOG2E, fold_logits, tanh
from .shared import ROWS

_RECIPROCALS = gl.constexpr("""{
    .reg .f32 a, b, c, d, ab, cd, all;
    min.NaN.f32 a, $4, 0f4E800000;
    min.NaN.f32 b, $5, 0f4E800000;
    min.NaN.f32 c, $6, 0f4E800000;
    min.NaN.f32 d, $7, 0f4E800000;
    mul.f32 ab, a, b;
    mul.f32 cd, c, d;
    mul.f32 all, ab, cd;
    rcp.approx.ftz.f32 all, all;
    mul.f32 ab, ab, all;
    mul.f32 cd, cd, all;
    mul.f32 $0, b, cd;
    mul.f32 $1, a, cd;
    mul.f32 $2, d, ab;
    mul.f32 $3, c, ab;
}""")
"""PTX of the reciprocals of four numbers from 1 on, of which one is computed. Those above 2^30 count as 2^30."""


@gluon.constexpr_function
def products(columns):
    """The layout of a product of 64 rows with so many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operands(columns):
    """The layout of what is multiplied from registers, for such a product."""
    return gl.DotOperandLayout(operand_index=0, parent=products(columns), k_width=2)


@gluon.constexpr_function
def rows_of(columns):
    """The layout of vectors of rows of such a product."""
    return gl.SliceLayout(1, products(columns))


@gluon.jit
def load_query(arrays, rows, first_row, shared, CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Copies 64 rows of query into shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for piece in gl.static_range(H.pieces):
        q = load_rows(arrays, rows, first_row, piece * H.piece, H.piece, layout, P)
        shared.q_rows.index(CONSUMER * H.pieces + piece).store(q)
    fence_async_shared()
    gl.barrier()


@gluon.jit
def load_rows(arrays, rows, first_row, FIRST: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr,
              P: gl.constexpr):  # fmt: skip
    """Columns FIRST … FIRST + COLUMNS - 1 of 64 rows of query, zeros where there are no rows."""
    Q: gl.constexpr = P.query
    OPTIONS: gl.constexpr = P.options
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dim = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    token = row // Q.q_per_kv
    q_head = rows.head * Q.q_per_kv + row % Q.q_per_kv
    offset = Q.offset + (rows.start + token).to(gl.int64) * Q.token_stride + head_offset(q_head, Q)
    offset = offset[:, None] + dim[None, :] * Q.dim_stride
    q = gl.load(arrays.query_ptr + offset, mask=(row < rows.length * Q.q_per_kv)[:, None], other=0)
    if OPTIONS.scale < 0:  # the sign goes to query: the largest score is found before it is scaled
        q = -q
    return q


@gluon.jit
def start_scores(shared, i, stage, CONSUMER: gl.constexpr, P: gl.constexpr, H: gl.constexpr):
    """Issues the product of query with K of tile i, which is in a stage."""
    T: gl.constexpr = P.tile
    scores = gl.zeros([ROWS, T.positions], gl.float32, products(T.positions))
    for piece in gl.static_range(H.pieces):
        # i >> 30 is 0, but the compiler does not know: else it would keep descriptors of all of query in registers.
        q = shared.q_rows.index(CONSUMER * H.pieces + piece + (i >> 30))
        k = shared.k_tiles.index(stage * H.pieces + piece).permute((1, 0))
        scores = warpgroup_mma(q, k, scores, use_acc=piece > 0, is_async=True)
    return scores


@gluon.jit
def has_holes(arrays, work, P: gl.constexpr):
    """Whether a block table has entries, of positions of a program's tiles, that name no block."""
    T: gl.constexpr = P.tile
    Q: gl.constexpr = P.query
    index: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lanes = gl.arange(0, CHUNK, layout=index)
    begin = work.first_tile * T.positions // P.block_size
    end = gl.minimum(work.limit, (work.first_tile + work.num_tiles) * T.positions)
    table_ptr = arrays.table_ptr + begin * Q.table_step
    return all_blocks_exist(table_ptr, cdiv(end, P.block_size) - begin, arrays.num_blocks, lanes, P) == 0


@gluon.jit
def weigh(scores, m, l, arrays, work, holes, tile, position, MASKED: gl.constexpr, P: gl.constexpr):
    """Makes weights of the scores of a tile.

    Returns the new m and l, the weights, and what sums of older weights are to be multiplied by.
    """
    OPTIONS: gl.constexpr = P.options
    T: gl.constexpr = P.tile
    SCALE: gl.constexpr = OPTIONS.scale * LOG2E if OPTIONS.scale >= 0 else -OPTIONS.scale * LOG2E
    logits = scores  # without a cap, fold_logits scales them
    if SCALE == 0:
        logits = scores * SCALE
    if OPTIONS.soft_cap is not None:
        if MASKED:  # four elements share a reciprocal
            n = tile * T.positions + gl.arange(0, T.positions, layout=gl.SliceLayout(0, products(T.positions)))
            scores = gl.where(seen_by(n, position, work, P), scores, 0.0)
        CAP: gl.constexpr = OPTIONS.soft_cap * LOG2E
        logits = cap(scores, SCALE, CAP)
    if MASKED:
        n = tile * T.positions + gl.arange(0, T.positions, layout=gl.SliceLayout(0, products(T.positions)))
        logits = masked(logits, n, position, arrays, work, holes, P)
    scale = gl.full([m.shape[0]], SCALE, gl.float32, rows_of(T.positions))
    # -inf times a scale of 0 would be NaN.
    SCALED: gl.constexpr = SCALE == 0 or OPTIONS.soft_cap is not None
    return fold_logits(m, l, logits, scale, SCALED, MASKED, P.weight_bits)


@gluon.jit
def masked(logits, n, position, arrays, work, holes, P: gl.constexpr):
    """Logits, -inf where rows do not see positions n."""
    Q: gl.constexpr = P.query
    logits = gl.where(seen_by(n, position, work, P), logits, float("-inf"))
    if holes:
        exists = n < work.limit
        block = gl.load(arrays.table_ptr + n // P.block_size * Q.table_step, mask=exists, other=-1)
        exists = (block >= 0) & (block < arrays.num_blocks)
        logits = gl.where(exists[None, :], logits, float("-inf"))
    return logits


@gluon.jit
def cap(scores, SCALE: gl.constexpr, CAP: gl.constexpr):
    """CAP * tanh(scores * SCALE / CAP), none of which may be NaN by what a row does not see.

    Exponentials and reciprocals are few a cycle, and a softmax needs one exponential already. So four elements share a
    reciprocal, and small caps go without the series near 0: what cancels there is 2^-22 of the cap.
    """
    if CAP > 256:
        return CAP * tanh(scores * (SCALE / CAP))
    down = 1 + gl.exp2(scores * (-2 * LOG2E * SCALE / CAP))
    part = gl.inline_asm_elementwise(
        _RECIPROCALS, "=f,=f,=f,=f,f,f,f,f", [down], dtype=gl.float32, is_pure=True, pack=4
    )
    return part * (2 * CAP) - CAP


@gluon.jit
def seen_by(n, position, work, P: gl.constexpr):
    """Which positions n rows see, but for holes: `[64, POSITIONS]`, or `[1, POSITIONS]` where all see the same."""
    OPTIONS: gl.constexpr = P.options
    if P.by_row:
        seen = n[None, :] < gl.minimum(position + 1, work.limit)[:, None]
        if OPTIONS.sliding_window is not None:
            seen = seen & (position[:, None] - n[None, :] < OPTIONS.sliding_window)
    else:
        seen = (n < work.limit) & (n >= work.first)
        seen = seen[None, :]
    return seen


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, P: gl.constexpr):
    """Weights as they are multiplied with V."""
    V: gl.constexpr = P.v
    return gl.convert_layout(weights.to(dtype), operands(V.main))


@gluon.jit
def shrunk(acc, shrink, P: gl.constexpr):
    """Sums, brought to the new running maximum."""
    V: gl.constexpr = P.v
    return acc * gl.convert_layout(shrink, rows_of(V.main))[:, None]
