"""merge_attention: parts that saw nothing, log-sum-exps at the ends of float32, gradients, dtypes, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxkv
from tests.cases.arrays import random_normal

NAN, INF = np.nan, np.inf


def draw(*shape):
    return random_normal(np.random.default_rng(0), shape, "float32")


def parts(*lses):
    """Parts of one token with one head, and values 1, 2, 4, … in each."""
    outs = np.stack([np.full((1, 1, 2), 2.0**i, np.float32) for i in range(len(lses))])
    return outs, np.array(lses, np.float32).reshape(-1, 1, 1)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("empty", [-INF, INF])
@pytest.mark.parametrize("held", [NAN, INF, 0.0, 7.0])
def test_what_empty_parts_hold_has_no_effect(held, empty, jit):
    merge = jax.jit(jaxkv.merge_attention) if jit else jaxkv.merge_attention
    outs, lses = parts(0.5, empty, 1.5)
    outs[1] = held
    out, lse = merge(outs, lses)
    weights = np.exp([0.5, 1.5])
    np.testing.assert_allclose(out, np.full((1, 1, 2), weights @ [1, 4] / weights.sum()), rtol=1e-6)
    np.testing.assert_allclose(lse, [[np.log(weights.sum())]], rtol=1e-6)
    out, lse = merge(*parts(empty, 3.0))
    np.testing.assert_array_equal(out, np.full((1, 1, 2), 2))
    np.testing.assert_array_equal(lse, [[3]])


@pytest.mark.parametrize("lses", [(-INF, -INF), (INF, -INF), (INF, INF), ()])
def test_rows_that_every_part_left_empty_are_zeros(lses):
    outs, lses = parts(*lses) if lses else (np.zeros((0, 1, 1, 2), np.float32), np.zeros((0, 1, 1), np.float32))
    out, lse = jaxkv.merge_attention(outs * NAN, lses)
    np.testing.assert_array_equal(out, np.zeros((1, 1, 2)))
    np.testing.assert_array_equal(lse, [[-INF]])


@pytest.mark.parametrize("lses", [(NAN, 0.0), (NAN, -INF), (INF, NAN), (NAN, NAN)])
def test_a_log_sum_exp_of_nan_makes_its_row_nan_and_no_other(lses):
    bad, good = parts(*lses), parts(0.0, 0.0)
    outs, lses = (np.concatenate([b, g], axis=1) for b, g in zip(bad, good, strict=True))
    out, lse = jaxkv.merge_attention(outs, lses)
    np.testing.assert_array_equal(np.isnan(out), [[[True, True]], [[False, False]]])
    np.testing.assert_array_equal(np.isnan(lse), [[True], [False]])
    np.testing.assert_allclose(out[1], [[1.5, 1.5]])


def test_log_sum_exps_far_apart_or_large_do_not_overflow():
    out, lse = jaxkv.merge_attention(*parts(3e38, -3e38))
    np.testing.assert_array_equal(out, np.ones((1, 1, 2)))
    np.testing.assert_array_equal(lse, [[np.float32(3e38)]])
    out, lse = jaxkv.merge_attention(*parts(-3e38, -3e38))
    np.testing.assert_array_equal(out, np.full((1, 1, 2), 1.5))
    np.testing.assert_array_equal(lse, [[np.float32(-3e38)]])


@pytest.mark.parametrize("empty", [-INF, INF])
def test_empty_parts_have_no_effect_on_gradients(empty):
    outs, lses = parts(0.5, empty, 1.5)
    outs[1] = NAN

    def loss(outs, lses):
        out, lse = jaxkv.merge_attention(outs, lses)
        return out.sum() + lse.sum()

    of_outs, of_lses = jax.grad(loss, (0, 1))(jnp.asarray(outs), jnp.asarray(lses))
    want = jax.grad(loss, (0, 1))(jnp.asarray(outs[[0, 2]]), jnp.asarray(lses[[0, 2]]))
    for got, expected in zip((of_outs, of_lses), want, strict=True):
        np.testing.assert_allclose(got[np.array([0, 2])], expected, rtol=1e-6)
        np.testing.assert_array_equal(got[1], np.zeros_like(got[1]))
    nothing = jax.grad(loss, (0, 1))(*map(jnp.asarray, parts(empty, empty)))
    for got in nothing:
        np.testing.assert_array_equal(got, np.zeros_like(got))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_merged_results_have_the_dtype_of_the_parts(dtype):
    outs, lses = parts(0.0, 0.0)
    out, lse = jaxkv.merge_attention(outs.astype(dtype), lses)
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(out.astype(np.float32), np.full((1, 1, 2), 1.5))


@pytest.mark.parametrize(("changes", "kind", "error"), [
    ({"outs": draw(3, 4, 16)}, ValueError,
     "outs must have shape (parts, num_tokens, num_q_heads, head_size_v), got (3, 4, 16)"),
    ({"lses": draw(2, 4, 3)}, ValueError, "lses must have shape (2, 3, 4), got (2, 4, 3)"),
    ({"lses": draw(2, 3, 4).astype(np.float16)}, TypeError, "lses must have dtype float32, got float16"),
    ({"outs": np.ones((2, 3, 4, 1), np.int32)}, TypeError,
     "outs must have dtype float32, bfloat16 or float16, got int32"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(changes, kind, error):
    with pytest.raises(kind) as raised:
        jaxkv.merge_attention(**({"outs": draw(2, 3, 4, 16), "lses": draw(2, 3, 4)} | changes))
    assert str(raised.value) == error
