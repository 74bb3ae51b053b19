"""Reading quantised caches: gather bit for bit the oracle's, attention near it, for every format and granularity."""

import numpy as np
import pytest
import torch

from kvcore.oracle import read as reference_attention
from kvcore.oracle import write as reference
from tests.cases.arrays import LAYOUTS, random_normal
from tests.cases.gathers import assert_gathers, gather_jax, gather_torch
from tests.cases.quantised_reads import TELLING, TELLING_OF_LAYERS, kinds, read_case, telling
from tests.cases.reads import assert_near_oracle, attend_jax, attend_torch, oracle


@pytest.mark.parametrize(("name", "granularity", "layout"), telling((*LAYOUTS, "MLA")))
def test_gather(name, granularity, layout):
    assert_gathers(read_case(0, name, granularity, layout, num_heads=3), 17, "bfloat16")


@pytest.mark.parametrize(
    ("name", "granularity", "layout"),
    [
        *(kind for kind in kinds(("NHD", "PACKED_NHD", "BLOCK_KV_HND", "MLA")) if kind[:2] in TELLING),
        *TELLING_OF_LAYERS,
    ],
)
def test_gather_from_a_layer(name, granularity, layout):
    more = {"scale_layout": "head layer slot block"} if granularity == "token_head" else {}
    assert_gathers(read_case(2, name, granularity, layout, num_layers=3, layer=1, **more), 17, "float16")


@pytest.mark.parametrize(("name", "granularity", "layout"), telling(("HEAD_MAJOR", "INTERLEAVED", "MLA")))
def test_attention(name, granularity, layout):
    ragged = granularity != "head"
    query_lens = (1, 0, 3, 2) if ragged else None
    dtype = "bfloat16" if name in ("int8", "nvfp4") else "float32"
    assert_near_oracle(read_case(3, name, granularity, layout, query_lens=query_lens, dtype=dtype))


@pytest.mark.parametrize(("name", "granularity", "layout"), TELLING_OF_LAYERS)
@pytest.mark.parametrize("query_lens", [None, (1, 0, 3, 2)])
def test_attention_over_a_layer_with_scales_of_its_own(name, granularity, layout, query_lens):
    case = read_case(10, name, granularity, layout, num_layers=3, layer=1, query_lens=query_lens)
    assert_near_oracle(case)
    want = oracle(case)
    names = [n for n in ("k_scale", "v_scale") if case.options[n] is not None]
    case.options |= {n: case.options[n][1].copy() for n in names}
    for got, array in zip(oracle(case), want, strict=True):
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("layer", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("name", "granularity", "layout"), TELLING_OF_LAYERS)
def test_scales_of_a_layer_that_does_not_exist(name, granularity, layout, layer):
    """Nothing is seen, and no scale is read far away."""
    case = read_case(11, name, granularity, layout, num_layers=3, layer=1)
    layer = np.array(layer, np.int32)
    for backend in ("xla", "interpret"):
        case.options["layer"] = layer
        assert not attend_jax(case, backend)[0].any()
        assert not any(x.any() for x in gather_jax(case, 9, "float32", backend))
    for backend in ("torch", "interpret"):
        case.options["layer"] = torch.from_numpy(layer)
        assert not attend_torch(case, backend)[0].any()
        assert not any(x.any() for x in gather_torch(case, 9, "float32", backend))


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "int4"])
def test_attention_with_all_options(name):
    """A head size that is no power of two, a window, a cap, a layer, scale caches in an order of their own."""
    case = read_case(
        4, name, "token_head", "HND", head_size=48, num_layers=2, layer=1, scale_layout="slot layer head block",
        query_lens=(1, 1, 2, 3), sliding_window=6, soft_cap=3.0, num_heads=3, group=3,
    )  # fmt: skip
    assert_near_oracle(case)


def test_scales_of_unused_slots_have_no_effect():
    """Make_read leaves random bits, NaN among them, in scale caches wherever nothing was written."""
    case = read_case(5, "int8", "token_head", "NHD")
    assert np.isnan(case.options["k_scale"]).any()
    case.options["k_scale"][np.isnan(case.options["k_scale"])] = np.inf
    assert_near_oracle(case)
    assert_gathers(case, 30, "float32")


@pytest.mark.parametrize("scale", [0.0, -0.02])
def test_scales_in_a_cache_may_be_anything(scale):
    case = read_case(6, "int8", "token_head", "NHD", seq_lens=(9,))
    where = case.options["v_scale"]
    where[case.block_tables[0, 0], 1] = scale
    case.options["k_scale"][case.block_tables[0, 1], 2] = scale
    assert_near_oracle(case)
    assert_gathers(case, 9, "bfloat16")


def test_values_of_very_different_size():
    """The weights' unit grows on the way, by 2^40 in all."""
    case = read_case(7, "int8", "token_head", "NHD", seq_lens=(300,), block_size=16, num_heads=1)
    slots = [int(case.block_tables[0, n // 16]) * 16 + n % 16 for n in range(300)]
    key, value = (random_normal(np.random.default_rng(8), (300, 1, 64), "float32") for _ in range(2))
    value *= np.exp2(np.linspace(-20, 20, 300, dtype=np.float32))[:, None, None]
    scales = case.options["k_scale"], case.options["v_scale"]
    reference.reshape_and_cache_flash_per_token_head_quant(key, value, *case.caches, *scales, np.array(slots), "int8")
    assert_near_oracle(case)


def test_a_row_with_a_nan_poisons_no_other_head_or_sequence():
    case = read_case(9, "int8", "token_head", "NHD", num_heads=2, group=1, seq_lens=(5, 6))
    rows = np.ones((1, 2, 64), np.float32)
    rows[0, 0, 3] = np.nan
    slot = int(case.block_tables[0, 0]) * 4 + 2
    scales = case.options["k_scale"], case.options["v_scale"]
    reference.reshape_and_cache_flash_per_token_head_quant(rows, rows, *case.caches, *scales, np.array([slot]), "int8")
    from tests.cases.reads import CPU_IMPLEMENTATIONS, oracle

    want, _ = oracle(case)
    assert np.isnan(want[0, 0]).all()
    for name, run in CPU_IMPLEMENTATIONS.items():
        out, _ = run(case)
        assert np.isnan(out[0, 0]).all(), name
        np.testing.assert_allclose(out[[0, 1, 1], [1, 0, 1]], want[[0, 1, 1], [1, 0, 1]], atol=1e-4, err_msg=name)


def test_quantised_attention_is_near_that_of_the_float_cache():
    """The whole way, writers and readers: what each format loses, on random keys and values."""
    rng = np.random.default_rng(10)
    key, value = (random_normal(rng, (32, 2, 64), "float32") for _ in range(2))
    query, tables, lens = random_normal(rng, (1, 4, 64), "float32"), np.arange(2)[None], np.array([32])
    slots = np.arange(32)
    float_caches = [np.zeros((2, 16, 2, 64), np.float32) for _ in range(2)]
    reference.reshape_and_cache_flash(key, value, *float_caches, slots)
    want, _ = reference_attention.paged_attention(query, float_caches, tables, lens)
    bounds = {"int8": 0.01, "fp8_e4m3": 0.06, "fp8_e5m2": 0.12, "int4": 0.2, "nvfp4": 0.2}
    for name, bound in bounds.items():
        units = {"int4": 32, "nvfp4": 36}.get(name, 64)
        for granularity in ("tensor", "head", "token_head"):
            if (name, granularity) == ("nvfp4", "token_head"):
                continue
            caches = [np.zeros((2, 16, 2, units), np.uint8) for _ in range(2)]
            if granularity == "token_head":
                scales = [np.zeros((2, 16, 2), np.float32) for _ in range(2)]
                op = reference.reshape_and_cache_flash_per_token_head_quant
                op(key, value, *caches, *scales, slots, name)
            else:
                scales = reference.kv_scales(key, value, name, granularity)
                reference.reshape_and_cache_flash(key, value, *caches, slots, name, *scales)
            got, _ = reference_attention.paged_attention(
                query, caches, tables, lens, kv_cache_dtype=name, k_scale=scales[0], v_scale=scales[1]
            )
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < bound, f"{name} {granularity}: {error:.3f}"
