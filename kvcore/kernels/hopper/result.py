"""What consumers of both kernels for Hopper do with the sums of 64 rows in the end."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..softmax import LN2, finish
from .tiles import products, rows_of


@gluon.jit
def store_result(
    m, l, acc, arrays, rows, first_row, FIRST_COLUMN: gl.constexpr, STORES_LSE: gl.constexpr, P: gl.constexpr
):
    """Stores columns of the result of 64 rows, or of their partial result, and the logarithm of their normalizers.

    Args:
        m: The running maximum of each row.
        l: The normalizer of each row.
        acc: The sums, `[64, columns]`.
        arrays: As all below, of the program.
        rows: The program's rows.
        first_row: The first of the 64.
        FIRST_COLUMN: The column of the result that the first one of acc is.
        STORES_LSE: Whether to store logarithms, too: one of the warpgroups with columns of the same rows does.
        P: All constants.
    """
    Q: gl.constexpr = P.query
    V: gl.constexpr = P.v
    COLUMNS: gl.constexpr = acc.shape[1]
    m = gl.convert_layout(m, rows_of(COLUMNS))
    l = gl.convert_layout(l, rows_of(COLUMNS))
    row = first_row + gl.arange(0, acc.shape[0], layout=rows_of(COLUMNS))
    inside = row < rows.length * Q.q_per_kv
    q_head = rows.head * Q.q_per_kv + row % Q.q_per_kv
    sink = None
    if arrays.sinks_ptr is not None and not P.split:
        sink = gl.load(arrays.sinks_ptr + q_head * Q.sink_stride, mask=inside, other=0)
    WEIGHT: gl.constexpr = 2.0**-P.weight_bits
    factor, log = finish(m, l * WEIGHT, sink)
    factor = gl.where(l == 0, 0.0, factor * WEIGHT)

    result = (rows.start + row // Q.q_per_kv).to(gl.int64) * Q.num_heads + q_head
    if P.split:
        result = result * gl.num_programs(1) + gl.program_id(1)
    else:
        log = log * LN2
    if STORES_LSE:
        gl.store(arrays.lse_ptr + result, log, mask=inside)
    dim = FIRST_COLUMN + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, products(COLUMNS)))
    out = arrays.out_ptr + (result * V.words)[:, None] + dim[None, :]
    gl.store(out, (acc * factor[:, None]).to(arrays.out_ptr.dtype.element_ty), mask=inside[:, None])
