"""What a row does not see must not touch it: neither values that are infinite or NaN, nor their scales.

A tile of positions holds what only some of its rows see: later tokens of a chunk, and what a window has passed. Their
weight is zero, but zero times NaN is NaN. What a row sees follows IEEE 754.
"""

import numpy as np
import pytest

from kvcore.formats import KV_CACHE_DTYPES
from kvcore.oracle import write as reference
from tests.cases.gpu import HAS_GPU
from tests.cases.gpu_reads import KERNELS
from tests.cases.reads import BOUNDS, CPU_IMPLEMENTATIONS, make_read, oracle


def of_value(number):
    def poison(case, at):
        case.caches[-1][at][..., 0, 1] = number

    return poison


def of_key(number):
    def poison(case, at):
        case.caches[0][at][..., 0, 1] = number

    return poison


def of_scale(number):
    def poison(case, at):
        case.options["v_scale"][at][..., 0] = number

    return poison


def of_block_scale(code):
    def poison(case, at):
        size = case.query.shape[2]
        _, (_, blocks) = reference.views(case.caches, case.layout, size, size, KV_CACHE_DTYPES["nvfp4"])
        blocks[0][at][..., 0, 0] = code

    return poison


def of_mla_scale(number):
    def poison(case, at):
        scales = case.caches[0][..., 512:528].view(np.float32)
        scales[at][..., 1] = number

    return poison


MLA = dict(layout="MLA", head_size=576, head_size_v=512, kv_cache_dtype="fp8_ds_mla")
PER_TOKEN = dict(granularity="token_head", kv_cache_dtype="int8")
POISONS = {
    "NaN": (of_value(np.nan), {}),
    "infinity": (of_value(np.inf), {}),
    "minus infinity": (of_value(-np.inf), {}),
    "NaN in K": (of_key(np.nan), {}),
    "infinity in K": (of_key(np.inf), {}),
    "NaN of e4m3": (of_value(0x7F), dict(kv_cache_dtype="fp8")),
    "infinity of e5m2": (of_value(0x7C), dict(kv_cache_dtype="fp8_e5m2")),
    "scale NaN": (of_scale(np.nan), PER_TOKEN),
    "scale infinite": (of_scale(np.inf), PER_TOKEN),
    "scale huge": (of_scale(1e30), PER_TOKEN),
    "scale of int4 NaN": (of_scale(np.nan), PER_TOKEN | dict(kv_cache_dtype="int4")),
    "block scale NaN": (of_block_scale(0x7F), dict(kv_cache_dtype="nvfp4")),
    "MLA scale NaN": (of_mla_scale(np.nan), MLA),
    "MLA scale infinite": (of_mla_scale(np.inf), MLA),
}
LENGTHS = {
    "chunks": dict(seq_lens=(7, 40), query_lens=(4, 12)),
    "speculative": dict(seq_lens=(9, 33), query_lens=(3, 3)),
    "window": dict(seq_lens=(7, 40), query_lens=(4, 12), sliding_window=3),
    "splits": dict(seq_lens=(600, 6), query_lens=(5, 3), block_size=16),
}


def poisoned(poison, dtype="float32", **options):
    """A case with poison in the last position but one of each sequence, which its last two queries see."""
    case = make_read(np.random.default_rng(0), dtype=dtype, num_heads=1, **options)
    block_size = options.get("block_size", 4)
    for table, length in zip(case.block_tables, case.seq_lens, strict=True):
        n = length - 2
        poison(case, (int(table[n // block_size]), n % block_size))
    return case


def assert_as_oracle(case, implementations):
    want, want_lse = oracle(case)
    hidden = np.isfinite(want).all((1, 2))
    assert hidden.any(), "every row sees the poison"
    size = np.abs(want[np.isfinite(want)]).max()
    for name, run in implementations.items():
        got, lse = (x.astype(np.float64) for x in run(case))
        for x, y in ((got, want), (lse, want_lse)):
            np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=name)
            infinite = np.isinf(y)
            np.testing.assert_array_equal(x[infinite], y[infinite], err_msg=name)
        finite = np.isfinite(want)
        error = np.abs(np.subtract(got, want, where=finite, out=np.zeros_like(want)))
        # Rows that see a number far larger than the others may be off by as much more.
        rows = error.reshape(len(want), -1).max(1)
        sizes = np.abs(np.where(finite, want, 0)).reshape(len(want), -1).max(1)
        bound = BOUNDS[case.query.dtype.name] * np.maximum(sizes, min(size, 1.0))
        assert (rows <= bound).all(), f"{name}: {rows} where {bound} is allowed"


CASES = [(name, "chunks") for name in POISONS]
CASES += [(name, lengths) for name in ("NaN", "scale NaN", "scale huge") for lengths in list(LENGTHS)[1:]]


@pytest.mark.parametrize(("name", "lengths"), CASES)
def test_hidden_values_touch_nothing(name, lengths):
    function, options = POISONS[name]
    assert_as_oracle(poisoned(function, **options, **LENGTHS[lengths]), CPU_IMPLEMENTATIONS)


ON_A_GPU = {  # by kernels
    "auto": ("NaN", "infinity", "minus infinity", "NaN in K", "infinity in K"),
    "fp8": ("NaN of e4m3",),
    "fp8_e5m2": ("infinity of e5m2",),
    "int8": ("scale NaN", "scale infinite", "scale huge"),
    "int4": ("scale of int4 NaN",),
    "nvfp4": ("block scale NaN",),
    "fp8_ds_mla": ("MLA scale NaN", "MLA scale infinite"),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format",
    [pytest.param(f, marks=pytest.mark.gpu_smoke if f in ("auto", "int8", "nvfp4") else ()) for f in ON_A_GPU],
)
def test_hidden_values_touch_nothing_on_a_gpu(format):
    for lengths in ("chunks", "splits") if HAS_GPU else ("chunks",):
        for name in ON_A_GPU[format]:
            function, options = POISONS[name]
            head = {} if "layout" in options else dict(head_size=128, group=4)
            assert_as_oracle(poisoned(function, "bfloat16", **options, **head, **LENGTHS[lengths]), KERNELS)


def test_every_poison_is_tried_on_a_gpu():
    assert {name for names in ON_A_GPU.values() for name in names} == set(POISONS)


def test_a_scale_of_nan_leaves_rows_that_see_nothing_zero():
    for sinks in (None, np.array([0.5, -1.0], np.float32)):
        case = make_read(
            np.random.default_rng(1), kv_cache_dtype="fp8", num_heads=1, seq_lens=(0, 5), query_lens=(2, 7),
            scales=(np.nan, np.nan),
        )  # fmt: skip
        if sinks is not None:
            case.options["sinks"] = sinks
        assert_as_oracle(case, CPU_IMPLEMENTATIONS)


def test_rows_of_nan_have_a_logarithm_of_nan():
    case = make_read(np.random.default_rng(2), num_heads=1, seq_lens=(5, 9))
    case.query[1] = np.nan
    want = oracle(case)[1]
    assert np.isnan(want[1]).all()
    for name, run in CPU_IMPLEMENTATIONS.items():
        np.testing.assert_array_equal(np.isnan(run(case)[1]), np.isnan(want), err_msg=name)
