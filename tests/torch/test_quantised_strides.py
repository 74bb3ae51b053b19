"""Quantised caches and scale caches of any strides, in torch."""

import numpy as np
import pytest

import torchkv
from kvcore.oracle import read as reference_attention
from tests.cases.arrays import DTYPES, from_torch, random_bits, run_oracle, to_torch, with_case
from tests.cases.reads import make_read, oracle
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401
from tests.cases.torch_quantised import BACKENDS, as_bits, inputs, latent_rows, memory_of, mla_oracle, quantising, small

# How an array of some shape lies in a larger tensor: that tensor's shape, and the view.
LIES = {
    "an offset": (lambda s: (s[0] + 3, *s[1:]), lambda x: x[2:-1]),
    "every other block": (lambda s: (2 * s[0], *s[1:]), lambda x: x[1::2]),
    "padded everywhere": (lambda s: tuple(n + 2 for n in s), lambda x: x[(slice(1, -1),) * x.dim()]),
    "reversed axes": (lambda s: s[::-1], lambda x: x.permute(*range(x.dim())[::-1])),
    "every other element": (lambda s: (*s, 2), lambda x: x[..., 1]),
}


def lying(rng, name, arrays):
    """Whole tensors of random bits, and views of them that lie as the name says."""
    larger, view = LIES[name]
    wholes = [to_torch(random_bits(rng, larger(a.shape), a.dtype.name)) for a in arrays]
    return wholes, [view(w) for w in wholes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int4"])
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "INTERLEAVED"])
@pytest.mark.parametrize("name", LIES)
def test_strided_caches_and_scale_caches(name, layout, kv_cache_dtype, backend, rng):
    case = quantising(rng, layout, kv_cache_dtype=kv_cache_dtype)
    wholes, views = lying(rng, name, case.memory)
    num_caches = len(case.caches)
    arrays = [from_torch(v).copy() for v in views]
    case = with_case(case, caches=arrays[:num_caches], scale_caches=arrays[num_caches:])
    expected = [w.clone() for w in wholes]
    for whole, array in zip(expected, run_oracle(case), strict=True):
        as_bits(LIES[name][1](whole)).copy_(as_bits(to_torch(array)))
    key, value, slots = inputs(case)
    case.op(torchkv)(key, value, *views, slots, kv_cache_dtype, layout=layout, backend=backend)
    assert_bits(wholes, [from_torch(e) for e in expected])  # what lies between the elements included


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache_dtype", ["nvfp4", "fp8_ds_mla"])
def test_strided_blocks_with_scales_inside(kv_cache_dtype, backend, rng):
    """Blocks may be apart, as those of one layer among all layers' are."""
    if kv_cache_dtype == "nvfp4":
        case = small(rng, kv_cache_dtype="nvfp4")
        wholes = [to_torch(random_bits(rng, (6, 3, *c.shape[1:]), "uint8")) for c in case.caches]
        case = with_case(case, caches=[from_torch(w[:, 1]).copy() for w in wholes])
        want, (key, value, slots) = run_oracle(case), inputs(case)
        views = [w[:, 1] for w in wholes]
        torchkv.reshape_and_cache_flash(key, value, *views, slots, "nvfp4", case.k_scale, case.v_scale, backend=backend)
    else:
        kv_c, k_pe, _, slots = latent_rows(rng, kv_cache_dtype)
        wholes = [to_torch(random_bits(rng, (6, 3, 4, 656 + 8), "uint8"))]
        views = [wholes[0][:, 1, :, 4:-4]]
        want = [mla_oracle(kv_c, k_pe, from_torch(views[0]).copy(), slots, kv_cache_dtype)]
        torchkv.concat_and_cache_mla(
            *map(to_torch, (kv_c, k_pe)), views[0], to_torch(slots), kv_cache_dtype, backend=backend
        )
    expected = [w.clone() for w in wholes]
    for whole, array in zip(expected, want, strict=True):
        (whole[:, 1] if kv_cache_dtype == "nvfp4" else whole[:, 1, :, 4:-4]).copy_(to_torch(array))
    assert_bits(wholes, [from_torch(e) for e in expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [lambda s: s.repeat(2)[::2], lambda s: s[:1].expand(3)], ids=["repeated", "expanded"])
def test_strided_scales_of_heads(view, backend, rng):
    case = small(rng, kv_cache_dtype="int8", scales="head")
    key, value, slots = inputs(case)
    caches = memory_of(case)
    scales = [view(to_torch(s)) for s in (case.k_scale, case.v_scale)]
    k_scale, v_scale = (from_torch(s).copy() for s in scales)
    torchkv.reshape_and_cache_flash(key, value, *caches, slots, "int8", *scales, backend=backend)
    assert_bits(caches, run_oracle(with_case(case, k_scale=k_scale, v_scale=v_scale)))

    tables, lens = np.array([[2, 0, 5]]), np.array([11])
    caches = [from_torch(c) for c in caches]
    want = reference_attention.gather_kv(
        caches, tables, lens, 11, dtype=DTYPES["float32"], head_size=16, kv_cache_dtype="int8", k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    got = torchkv.gather_kv(
        [to_torch(c) for c in caches], to_torch(tables), to_torch(lens), 11, dtype="float32", kv_cache_dtype="int8",
        k_scale=scales[0], v_scale=scales[1], backend=backend,
    )  # fmt: skip
    assert_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIES)
def test_reading_strided_scale_caches(name, backend, rng):
    case = make_read(rng, kv_cache_dtype="int8", granularity="token_head")
    options = dict(case.options)
    scales = [options.pop("k_scale"), options.pop("v_scale")]
    larger, view = LIES[name]
    views = []
    for scale in scales:
        whole = to_torch(random_bits(rng, larger(scale.shape), "float32"))
        views.append(view(whole))
        as_bits(views[-1]).copy_(as_bits(to_torch(scale)))
    caches = [to_torch(c) for c in case.caches]
    arrays = [to_torch(a) for a in (case.block_tables, case.seq_lens)]
    got = torchkv.paged_attention(
        to_torch(case.query), caches, *arrays, k_scale=views[0], v_scale=views[1], backend=backend, **options
    )
    want, _ = oracle(case)
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())
