"""On a GPU, Pallas's two functions on jaxkv's kernels, jitted."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxkv.integrations import pallas
from tests.cases.gpu import params
from tests.cases.pallas import close, decode_case, dequantised, quantise, ragged_case, ragged_wanted, wanted

pytestmark = pytest.mark.gpu
HALVES = [(np.float16,), (ml_dtypes.bfloat16,)]


def called(function, arrays, **options):
    """The result of a jitted call."""
    return jax.jit(functools.partial(function, **options))(*arrays)


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("dtype", params(HALVES, smoke=HALVES[1:]))
def test_decode(dtype, cap):
    q, k, v, *tables, rows = decode_case(dtype=dtype)
    got = called(pallas.paged_attention, (q, k.astype(dtype), v.astype(dtype), *tables), attn_logits_soft_cap=cap)
    assert got.dtype == dtype
    assert not got[0].any()
    close(got, wanted(q, [[x.astype(dtype) for x in kv] for kv in rows], cap=cap), 2e-2)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_scales_of_slots(dtype):
    q, k, v, tables, lengths, _ = decode_case(dtype=np.float16)
    (k, k_scales), (v, v_scales) = quantise(k, dtype), quantise(v, dtype)
    got = called(pallas.paged_attention, (q, k, v, tables, lengths, k_scales, v_scales))
    rows = zip(*(dequantised(*each, tables, lengths) for each in ((k, k_scales), (v, v_scales))), strict=True)
    close(got, wanted(q, list(rows)), 2e-2)


def test_pages_that_differ_are_copied_first():
    q, k, v, tables, lengths, _ = decode_case((0, 5, 12), np.float16)
    k, k_scales = quantise(k, np.int8)
    v = v.astype(np.float16)
    got = called(pallas.paged_attention, (q, k, v, tables, lengths, k_scales, None))
    rows = zip(*(dequantised(*each, tables, lengths) for each in ((k, k_scales), (v, None))), strict=True)
    close(got, wanted(q, list(rows)), 2e-2)


@pytest.mark.parametrize(
    ("options", "also"),
    [
        ({}, {}),
        ({"sliding_window": 2, "sm_scale": 0.25}, {"window": 2, "scale": 0.25}),
        ({"soft_cap": 0.6}, {"cap": 0.6}),
    ],
)
def test_ragged(options, also):
    dtype = ml_dtypes.bfloat16
    (q, pages, *rest), rows = ragged_case(dtype=dtype)
    got = called(pallas.ragged_paged_attention, (q, pages.astype(dtype), *rest), **options)
    close(got, ragged_wanted([q, pages, *rest], rows, **also), 2e-2)
    assert not got[8:].any()
