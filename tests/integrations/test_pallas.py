"""Pallas's names on jaxkv's kernels, beside plain NumPy: options, formats, errors, transformations."""

import doctest
import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxkv import read
from jaxkv.integrations import pallas
from tests.cases.pallas import (
    PAGE,
    PAGES,
    close,
    decode_case,
    dequantised,
    quantise,
    ragged_case,
    ragged_wanted,
    wanted,
)


@pytest.fixture(params=("xla", "interpret"))
def backend(request, monkeypatch):
    """Runs what the functions call with this backend, though Pallas's parameters have no place for it."""
    whole = read.paged_attention
    monkeypatch.setattr(read, "paged_attention", lambda *a, **o: whole(*a, **o, backend=request.param))
    return request.param


@pytest.mark.parametrize("cap", [None, 0.7])
def test_decode(cap, backend):
    *arrays, rows = decode_case()
    got = pallas.paged_attention(*arrays, attn_logits_soft_cap=cap)
    assert got.shape == arrays[0].shape
    close(got, wanted(arrays[0], rows, cap=cap))
    assert not got[0].any()


def test_what_says_how_to_launch_has_no_effect():
    *arrays, _ = decode_case()
    hints = dict(block_h=7, pages_per_compute_block=5, k_splits=11, num_warps=3, num_stages=9, debug=True)
    got = pallas.paged_attention(*arrays, **hints, interpret=True, mask_value=-1e9)
    np.testing.assert_array_equal(got, pallas.paged_attention(*arrays))


def test_without_lengths_all_slots_of_the_tables_are_seen(backend):
    *arrays, lengths, rows = decode_case((12, 12))
    assert (lengths == 3 * PAGE).all()
    close(pallas.paged_attention(*arrays, None), wanted(arrays[0], rows))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype):
    *arrays, rows = decode_case(dtype=dtype)
    arrays[1:3] = [pages.astype(dtype) for pages in arrays[1:3]]
    got = pallas.paged_attention(*arrays)
    assert got.dtype == dtype
    rows = [[x.astype(dtype) for x in kv] for kv in rows]
    close(got, wanted(arrays[0], rows), 2e-2)


BYTES = [np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", BYTES)
def test_scales_of_slots(dtype, scale_dtype, backend):
    q, k, v, tables, lengths, _ = decode_case()
    (k, k_scales), (v, v_scales) = quantise(k, dtype, scale_dtype), quantise(v, dtype, scale_dtype)
    got = pallas.paged_attention(q, k, v, tables, lengths, k_scales, v_scales)
    rows = zip(*(dequantised(*each, tables, lengths) for each in ((k, k_scales), (v, v_scales))), strict=True)
    close(got, wanted(q, list(rows)))


@pytest.mark.parametrize("dtype", BYTES)
def test_quantised_pages_without_scales(dtype):
    q, k, v, tables, lengths, _ = decode_case()
    (k, _), (v, _) = quantise(k, dtype), quantise(v, dtype)
    q /= 400
    got = pallas.paged_attention(q, k, v, tables, lengths)
    rows = zip(*(dequantised(each, None, tables, lengths) for each in (k, v)), strict=True)
    want = wanted(q, list(rows))
    close(got, want, 1e-4 * np.abs(want).max())


@pytest.mark.parametrize("which", ["key", "value", "both, of two dtypes", "floats with scales"])
def test_pages_that_differ_are_copied_first(which, backend):
    """Entries of tables that are no page are left out there, too."""
    q, k, v, tables, lengths, _ = decode_case((0, 5, 12))
    k_dtype, v_dtype = {"key": (np.int8, None), "value": (None, np.int8)}.get(which, BYTES[:2])
    k, k_scales = (k, None) if k_dtype is None else quantise(k, k_dtype, np.float16)
    v, v_scales = (v, None) if v_dtype is None else quantise(v, v_dtype)
    if which == "floats with scales":
        k, v = k.astype(np.float32), v.astype(np.float32)
    tables[2, 1] = PAGES
    got = pallas.paged_attention(q, k, v, tables, lengths, k_scales, v_scales)
    tables[2, 1], rest = 0, [*range(PAGE), *range(2 * PAGE, 3 * PAGE)]
    rows = [list(each) for each in zip(
        *(dequantised(*each, tables, lengths) for each in ((k, k_scales), (v, v_scales))), strict=True
    )]  # fmt: skip
    rows[2] = [x[rest] for x in rows[2]]
    want = wanted(q, rows)
    close(got, want, 1e-4 * max(1, np.abs(want).max()))


# ---- ragged


@pytest.mark.parametrize(
    ("options", "also"),
    [
        ({}, {}),
        ({"sm_scale": 0.25}, {"scale": 0.25}),
        ({"sliding_window": 2, "mask_value": None}, {"window": 2}),
        ({"soft_cap": 0.6}, {"cap": 0.6}),
    ],
)
def test_ragged(options, also, backend):
    arrays, rows = ragged_case()
    got = pallas.ragged_paged_attention(*arrays, **options)
    close(got, ragged_wanted(arrays, rows, **also))
    assert not got[8:].any()


@pytest.mark.parametrize("function", [pallas.paged_attention, pallas.ragged_paged_attention])
def test_lists_are_taken_for_every_array(function):
    arrays = decode_case()[:-1] if function is pallas.paged_attention else ragged_case()[0]
    want = function(*arrays)
    for i, array in enumerate(arrays):
        given = [x.tolist() if i == n else x for n, x in enumerate(arrays)]
        np.testing.assert_array_equal(function(*given), want)
        if array.dtype.kind == "i":
            given[i] = array.astype(np.float64).tolist()
            with pytest.raises(TypeError, match=r"^\w+ must have an integer dtype, got float64$"):
                function(*given)


@pytest.mark.parametrize("tail", [5, 10, 99, -7])
def test_what_comes_after_the_starts_of_sequences_is_not_used(tail):
    arrays, rows = ragged_case(tail=tail)
    got = pallas.ragged_paged_attention(*arrays)
    close(got, ragged_wanted(arrays, rows))
    assert not got[8:].any()


def test_sequences_of_a_ragged_batch_are_counted_on_the_device():
    """One program for any number of sequences."""
    arrays, rows = ragged_case()
    call = jax.jit(pallas.ragged_paged_attention, static_argnames=("sm_scale", "num_queries_per_block"))
    for count in (4, 2, 0):
        arrays[5] = np.array([count], np.int32)
        want = ragged_wanted(arrays, rows)
        want[arrays[4][count] :] = 0
        got = call(*arrays, sm_scale=1.0, num_queries_per_block=1)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert call._cache_size() == 1


@pytest.mark.parametrize("dtype", [np.float32, *BYTES])
@pytest.mark.parametrize(("k_scale", "v_scale"), [(0.5, 0.25), (None, 0.5), (2.0, None)])
def test_ragged_scales(k_scale, v_scale, dtype, backend):
    arrays, rows = ragged_case()
    times = 20 if dtype == np.int8 else 1
    arrays[0] /= times
    arrays[1] = np.nan_to_num(arrays[1] * times, nan=9).astype(dtype)
    rows = [[(x * times).astype(dtype).astype(np.float32) for x in kv] for kv in rows]
    got = pallas.ragged_paged_attention(*arrays, sm_scale=0.5, k_scale=k_scale, v_scale=v_scale)
    want = ragged_wanted(arrays, rows, scale=0.5 * (k_scale or 1)) * (v_scale or 1)
    close(got, want, 1e-4 * times)


# ---- as Pallas has them


def theirs(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
    return {"paged_attention": paged_attention, "ragged_paged_attention": ragged_paged_attention}[name]


@pytest.mark.parametrize("name", ["paged_attention", "ragged_paged_attention"])
def test_parameters_are_pallas_s(name):
    ours, others = (inspect.signature(f).parameters for f in (getattr(pallas, name), theirs(name)))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in others.values()
    ]


@pytest.mark.parametrize("cap", [None, 0.7])
def test_the_same_as_pallas_in_its_interpreter(cap):
    *arrays, _ = decode_case((1, 7, 12, 16), pages_per_sequence=4)
    arrays[1:3] = [np.nan_to_num(pages) for pages in arrays[1:3]]
    arrays[3] = np.where(arrays[3] < PAGES, arrays[3], 0)
    hints = dict(k_splits=2, pages_per_compute_block=2, interpret=True, attn_logits_soft_cap=cap)
    close(pallas.paged_attention(*arrays, **hints), theirs("paged_attention")(*arrays, **hints), 1e-3)


@pytest.mark.parametrize("function", [pallas.paged_attention, pallas.ragged_paged_attention])
def test_examples(function):
    names = {"pallas": pallas, "jnp": jnp}
    (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=names)
    assert doctest.DocTestRunner().run(test).attempted > 2


def test_jit_and_vmap_of_decode():
    *arrays, rows = decode_case()
    want = wanted(arrays[0], rows)
    close(jax.jit(pallas.paged_attention, static_argnames="k_splits")(*arrays, k_splits=4), want)
    each = jax.vmap(lambda q, table, n: pallas.paged_attention(q[None], *arrays[1:3], table[None], n[None])[0])
    close(each(arrays[0], arrays[3], arrays[4]), want)


def test_no_gradients():
    *arrays, _ = decode_case()
    with pytest.raises(NotImplementedError, match="stop_gradient"):
        jax.grad(lambda q: pallas.paged_attention(q, *arrays[1:]).sum())(jnp.asarray(arrays[0]))


# ---- errors


def with_change(arrays, index, change):
    return [change(a) if i == index else a for i, a in enumerate(arrays)]


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda q: q[0], ValueError, r"q must have shape \(batch_size, num_heads, head_dim\), got \(6, 16\)"),
        (0, lambda q: q[:, :5], ValueError, "q must have a multiple of 2 heads, as k_pages has, got 5"),
        (0, lambda q: q.astype(np.int32), TypeError, "q must have dtype float32, bfloat16 or float16, got int32"),
        (1, lambda k: k[..., :8], ValueError, r"k_pages must have shape \(num_kv_heads, .*, 16\), got \(2, 20, 4, 8\)"),
        (2, lambda v: v[:1], ValueError, r"v_pages must have shape \(2, 20, 4, 16\), got \(1, 20, 4, 16\)"),
        (
            2,
            lambda v: np.nan_to_num(v).astype(np.int16),
            TypeError,
            "v_pages must have dtype .* or int8, got int16",
        ),
        (3, lambda t: t[:3], ValueError, r"block_tables must have shape \(4, pages_per_sequence\), got \(3, 3\)"),
        (3, lambda t: t * 1.0, TypeError, "block_tables must have an integer dtype, got float64"),
        (4, lambda n: n[:, None], ValueError, r"lengths must have shape \(4,\), got \(4, 1\)"),
        (4, lambda n: n > 1, TypeError, "lengths must have an integer dtype, got bool"),
    ],
)
def test_errors_of_decode(index, change, error, message):
    *arrays, _ = decode_case()
    with pytest.raises(error, match=message):
        pallas.paged_attention(*with_change(arrays, index, change))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k_scales_pages": np.ones((2, 20))}, ValueError, r"k_scales_pages must have shape .*, got \(2, 20\)"),
        ({"v_scales_pages": np.ones((2, 20, 4), int)}, TypeError, "v_scales_pages must have dtype float32, .* got int"),
        ({"mask_value": 0.0}, ValueError, "mask_value must be at most -10000, .* got 0.0"),
        ({"mask_value": math.nan}, ValueError, "mask_value must be at most -10000, .* got nan"),
        ({"mask_value": "low"}, TypeError, "mask_value must be a static number, got 'low'"),
        ({"attn_logits_soft_cap": 0.0}, ValueError, "attn_logits_soft_cap must not be 0.0"),
        ({"attn_logits_soft_cap": -1}, ValueError, "attn_logits_soft_cap must be positive and finite, got -1"),
        ({"attn_logits_soft_cap": [1]}, TypeError, r"attn_logits_soft_cap must be None or a static number, got \[1\]"),
    ],
)  # fmt: skip
def test_errors_of_decode_s_options(options, error, message):
    *arrays, _ = decode_case()
    with pytest.raises(error, match=message):
        pallas.paged_attention(*arrays, **options)


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda q: q[0], ValueError, r"q must have shape \(max_num_batched_tokens, num_q_heads, head_dim\), got"),
        (0, lambda q: q[:, :3], ValueError, "q must have a multiple of 2 heads, as kv_pages has, got 3"),
        (1, lambda kv: kv[:, :, :3], ValueError, "kv_pages must have an even number of heads, .* got 3"),
        (
            1,
            lambda kv: np.nan_to_num(kv).view(np.uint8)[..., :16],
            TypeError,
            "kv_pages must have dtype .* got uint8",
        ),
        (2, lambda n: n[:4], ValueError, r"kv_lens must have shape \(6,\), got \(4,\)"),
        (3, lambda t: t[0], ValueError, r"page_indices must have shape \(max_num_seqs, pages_per_seq\), got \(3,\)"),
        (4, lambda c: c[:5], ValueError, r"cu_q_lens must have shape \(7,\), got \(5,\)"),
        (5, lambda n: n[0], ValueError, r"num_seqs must have shape \(1,\), got \(\)"),
        (5, lambda n: n * 1.0, TypeError, "num_seqs must have an integer dtype, got float64"),
    ],
)
def test_errors_of_ragged(index, change, error, message):
    arrays, _ = ragged_case()
    with pytest.raises(error, match=message):
        pallas.ragged_paged_attention(*with_change(arrays, index, change))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sliding_window": 0}, ValueError, "sliding_window must be positive, got 0"),
        ({"sliding_window": 1.5}, TypeError, "sliding_window must be None or a static int, got 1.5"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must not be 0.0"),
        ({"mask_value": -1.0}, ValueError, "mask_value must be at most -10000, .* got -1.0"),
        ({"sm_scale": None}, TypeError, "sm_scale must be a static number, got None"),
        ({"k_scale": "1"}, TypeError, "k_scale must be a static number, got '1'"),
    ],
)
def test_errors_of_ragged_s_options(options, error, message):
    arrays, _ = ragged_case()
    with pytest.raises(error, match=message):
        pallas.ragged_paged_attention(*arrays, **options)
