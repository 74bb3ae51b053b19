"""What a row does not see must not touch it: neither values that are infinite or NaN, nor their scales.

A tile of positions holds what only some of its rows see: later tokens of a chunk, and what a window has passed. Their
weight is zero, but zero times NaN is NaN. What a row sees follows IEEE 754.
"""

import numpy as np
import pytest

from tests.cases.gpu import HAS_GPU
from tests.cases.gpu_reads import KERNELS
from tests.cases.hidden import POISONS, assert_as_oracle
from tests.cases.reads import CPU_IMPLEMENTATIONS, make_read, oracle

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


CASES = [(name, "chunks") for name in POISONS]
CASES += [(name, lengths) for name in ("NaN", "scale NaN", "scale huge") for lengths in list(LENGTHS)[1:]]


@pytest.mark.parametrize(("name", "lengths"), CASES)
def test_hidden_values_touch_nothing(name, lengths):
    function, options = POISONS[name]
    assert_as_oracle(poisoned(function, **options, **LENGTHS[lengths]), CPU_IMPLEMENTATIONS)


ON_A_GPU = {  # by kernels
    "auto": ("NaN", "infinity", "minus infinity", "NaN in K", "infinity in K"),
    "latent": ("NaN in a latent", "infinity in a latent", "minus infinity in a latent"),
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
