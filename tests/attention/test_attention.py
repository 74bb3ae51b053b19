"""paged_attention: both frameworks, portable and interpreted kernel, against the oracle in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.layout import CONSTANTS as LAYOUTS
from tests.cases.reads import (
    CASTS,
    CPU_IMPLEMENTATIONS,
    LENGTHS,
    MEANINGS,
    assert_near_oracle,
    attend_jax,
    attend_torch,
    make_read,
    oracle,
)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, layer):
    layers = None if layer is None else 3
    assert_near_oracle(make_read(np.random.default_rng(0), layout=layout, num_layers=layers, layer=layer))


@pytest.mark.parametrize(("dtype", "cache_dtype", "kv_cache_dtype", "storage"), CASTS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "MLA"])
def test_dtypes(layout, dtype, cache_dtype, kv_cache_dtype, storage):
    case = make_read(
        np.random.default_rng(1), layout=layout, dtype=dtype, cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype,
        storage=storage, query_lens=(1, 0, 3, 2), head_size=48,
    )  # fmt: skip
    assert_near_oracle(case)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(lengths):
    assert_near_oracle(make_read(np.random.default_rng(2), **lengths))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("meaning", MEANINGS.values(), ids=MEANINGS)
def test_meanings(meaning, ragged):
    query_lens = (2, 0, 5, 11) if ragged else None
    rng = np.random.default_rng(3)
    assert_near_oracle(make_read(rng, query_lens=query_lens, seq_lens=(2, 1, 9, 30), **meaning))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinks(dtype, ragged):
    rng = np.random.default_rng(4)
    lengths = dict(query_lens=(1, 3, 0, 4), padding=2) if ragged else {}
    case = make_read(rng, dtype=dtype, **lengths)
    case.options["sinks"] = rng.standard_normal(4).astype(case.query.dtype) * 3
    assert_near_oracle(case)


@pytest.mark.parametrize(
    ("num_heads", "group", "head_size", "head_size_v", "layout"),
    [
        (1, 1, 64, 64, "NHD"),
        (1, 8, 64, 64, "HND"),
        (2, 3, 80, 80, "NHD"),
        (3, 1, 96, 96, "NHD"),
        (1, 20, 128, 128, "NHD"),
        (1, 2, 192, 128, "PACKED_NHD"),
        (1, 2, 256, 256, "NHD"),
        (2, 2, 40, 24, "block slot head dim"),
        (1, 16, 576, 512, "MLA"),
    ],
)
def test_heads(num_heads, group, head_size, head_size_v, layout):
    case = make_read(
        np.random.default_rng(5), layout=layout, num_heads=num_heads, group=group, head_size=head_size,
        head_size_v=head_size_v, query_lens=(1, 2, 1, 9), seq_lens=(1, 2, 5, 19),
    )  # fmt: skip
    assert_near_oracle(case)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_shapes(data):
    seq_lens = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    ragged = data.draw(st.booleans())
    query_lens = [data.draw(st.integers(0, max(n, 1))) for n in seq_lens] if ragged else None
    case = make_read(
        np.random.default_rng(data.draw(st.integers(0, 99))),
        layout=data.draw(st.sampled_from(["NHD", "HND", "PALLAS", "KV_NHD", "INTERLEAVED"])),
        num_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 5)),
        head_size=data.draw(st.sampled_from([8, 16, 24, 64])),
        block_size=data.draw(st.sampled_from([1, 3, 4, 16])),
        seq_lens=seq_lens,
        query_lens=query_lens,
        padding=data.draw(st.integers(0, 2)) if ragged else 0,
        sliding_window=data.draw(st.sampled_from([None, 1, 6])),
    )
    assert_near_oracle(case)


def test_both_interpreted_twins_give_the_same_bits():
    case = make_read(np.random.default_rng(6), dtype="bfloat16", query_lens=(0, 1, 3, 7), soft_cap=9.0)
    for a, b in zip(attend_jax(case, "interpret"), attend_torch(case, "interpret"), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("ragged", [False, True])
def test_an_entry_that_is_no_block_reads_nothing(ragged):
    case = make_read(np.random.default_rng(7), seq_lens=(9, 19), query_lens=(3, 19) if ragged else None)
    case.block_tables[0, 1] = -1
    case.block_tables[1, 0] = 10**6
    case.block_tables[1, 2] = len(case.caches[0])
    assert_near_oracle(case)


@pytest.mark.parametrize("ragged", [False, True])
def test_what_a_window_has_passed_may_hold_anything(ragged):
    """Blocks that no query sees any more were freed: their entries are garbage, or they are others' and hold NaN."""
    query_lens = (1, 3) if ragged else None
    case = make_read(np.random.default_rng(14), seq_lens=(31, 19), query_lens=query_lens, sliding_window=6)
    for cache in case.caches:
        cache[case.block_tables[0, :6]] = np.nan  # positions 0 … 23; the window begins at 25
    case.block_tables[0, 2:4] = -1
    want = oracle(case)
    assert np.isfinite(want[0]).all()
    assert_near_oracle(case)


def test_lengths_beyond_the_table():
    case = make_read(np.random.default_rng(8), seq_lens=(8, 8))
    case.seq_lens[:] = 1000, 2**31 - 1
    case.block_tables[:, 2:] = -1
    assert_near_oracle(case)


@pytest.mark.parametrize("sinks", [None, np.float32([0.5, -1, 2, 0])])
def test_queries_before_the_first_position_see_nothing(sinks):
    """Left padding: more queries than the sequence has tokens."""
    case = make_read(np.random.default_rng(15), seq_lens=(2, 0, 5), query_lens=(5, 3, 6), sinks=sinks)
    out, lse = oracle(case)
    nothing = [0, 1, 2, 5, 6, 7, 8]  # of 5 queries on 2 tokens the first 3, of 3 on none all, of 6 on 5 the first
    assert not out[nothing].any()
    assert out.any((1, 2)).sum() == 14 - len(nothing)
    np.testing.assert_array_equal(lse[nothing], np.broadcast_to(-np.inf if sinks is None else sinks, (7, 4)))
    for run in CPU_IMPLEMENTATIONS.values():
        out, lse = run(case)
        assert not out[nothing].any()
        np.testing.assert_array_equal(lse[nothing], np.broadcast_to(-np.inf if sinks is None else sinks, (7, 4)))
    assert_near_oracle(case)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_a_traced_layer_out_of_range_reads_nothing(backend):
    import jax.numpy as jnp
    import torch

    case = make_read(np.random.default_rng(9), num_layers=2, layer=1)
    for layer in (-1, 2):
        case.options["layer"] = jnp.int32(layer)
        out, lse = attend_jax(case, backend)
        assert not out.any()
        assert np.isneginf(lse).all()
        case.options["layer"] = torch.tensor(layer)
        out, lse = attend_torch(case, "torch" if backend == "xla" else backend)
        assert not out.any()
        assert np.isneginf(lse).all()
    case.options["layer"] = 1
    want = oracle(case)[0]
    case.options["layer"] = jnp.int32(1)
    np.testing.assert_allclose(attend_jax(case, backend)[0], want, atol=1e-5)


def test_parts_merge_to_the_whole():
    """Context parallelism: each device has some of the blocks, and the query sees all of them."""
    import jax.numpy as jnp
    import torch

    import jaxkv
    import torchkv

    case = make_read(np.random.default_rng(10), seq_lens=(19, 32), num_heads=1)
    want, want_lse = oracle(case)
    parts = []
    for first, stop in ((0, 4), (4, 9)):
        tables = case.block_tables[:, first:stop]
        lens = np.clip(case.seq_lens - first * 4, 0, (stop - first) * 4).astype(np.int32)
        part = make_read(np.random.default_rng(10), seq_lens=(19, 32), num_heads=1, causal=False)
        part.block_tables, part.seq_lens = tables, lens
        parts.append((attend_jax(part, "xla"), attend_torch(part, "torch")))
    outs, lses = (jnp.stack([p[0][i] for p in parts]) for i in (0, 1))
    out, lse = jaxkv.merge_attention(outs, lses)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    outs, lses = (torch.stack([torch.from_numpy(p[1][i]) for p in parts]) for i in (0, 1))
    out, lse = torchkv.merge_attention(outs, lses)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_the_oracle_agrees_with_torch():
    """One definition of attention that is not ours."""
    import torch

    from kvcore.oracle import read as reference_attention

    case = make_read(np.random.default_rng(11), seq_lens=(19,), query_lens=(6,), group=3)
    key, value = reference_attention.gather_kv(
        case.caches, case.block_tables, case.seq_lens, 19, dtype=np.dtype("float32"), head_size=32
    )
    query, key, value = (torch.from_numpy(x).double().transpose(-3, -2) for x in (case.query, key[0], value[0]))
    visible = torch.ones(6, 19, dtype=torch.bool).tril(13)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, enable_gqa=True)
    np.testing.assert_allclose(oracle(case)[0], want.transpose(-3, -2), atol=1e-12)


@pytest.mark.parametrize("soft_cap", [1e-3, 30.0, 1e4, 1e8, 1e30, 3e38, 1e300])
def test_soft_caps_of_any_size(soft_cap):
    """Logits far below the cap keep all their digits."""
    case = make_read(np.random.default_rng(15), query_lens=(1, 0, 3, 2), soft_cap=soft_cap)
    case.query *= np.float32(5)
    assert_near_oracle(case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_as_large_as_the_type_allows(dtype):
    for ragged in (None, (1, 0, 3, 2)):
        case = make_read(np.random.default_rng(16), dtype=dtype, query_lens=ragged)
        with np.errstate(all="ignore"):  # what is in no sequence's slots is noise
            case.caches[1][...] = (case.caches[1].astype(np.float32) * np.float32(3e34)).astype(case.caches[1].dtype)
        assert np.isfinite(oracle(case)[0]).all()
        assert_near_oracle(case)
