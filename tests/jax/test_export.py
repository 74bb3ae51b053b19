"""jax.export with sizes left open: one program for any number of tokens, sequences, blocks, columns of a table."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxkv
from kvcore.oracle import read as reference_attention
from kvcore.oracle import write as reference
from tests.cases.arrays import DTYPES, bits, make_case, random_bits, random_normal, run_oracle
from tests.cases.reads import BOUNDS, make_read, oracle

pytestmark = pytest.mark.x64


def export(function, shapes, *arrays, platforms=("cpu",), constraints=()):
    """The function with these shapes, written as in `b 2 16`, after a trip through bytes."""
    scope = jax.export.SymbolicScope(constraints)
    specs = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape.replace(" ", ","), scope=scope), a.dtype)
        for shape, a in zip(shapes, arrays, strict=True)
    ]
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*specs)
    return jax.export.deserialize(exported.serialize())


def assert_same(got, want):
    for g, w in zip(got if isinstance(got, (tuple, list)) else (got,), want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(np.asarray(w)))


@pytest.mark.parametrize("layout", ["NHD", "HND", "PALLAS", "HEAD_MAJOR", "KV_NHD", "INTERLEAVED", "PACKED_NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
def test_writes_with_any_number_of_tokens_and_blocks(layout, kv_cache_dtype):
    if layout == "HEAD_MAJOR" and kv_cache_dtype == "nvfp4":
        pytest.skip("nvfp4 needs an axis dim")
    cases = [
        make_case(
            np.random.default_rng(tokens), layout=layout, num_tokens=tokens, num_blocks=blocks, num_heads=2,
            head_size=32, kv_cache_dtype=kv_cache_dtype, scales=(None, None),
        )
        for tokens, blocks in ((1, 3), (9, 6))
    ]  # fmt: skip
    given = [(c.key, c.value, *c.caches, c.slot_mapping.astype(np.int32)) for c in cases]
    caches = [  # that axis which differs between the two is the one of blocks
        " ".join("b" if m != n else str(m) for m, n in zip(x.shape, y.shape, strict=True))
        for x, y in zip(cases[0].caches, cases[1].caches, strict=True)
    ]

    def write(key, value, *rest):
        return cases[0].op(jaxkv)(key, value, *rest, kv_cache_dtype, layout=layout)

    exported = export(write, ["t 2 32", "t 2 32", *caches, "t"], *given[0])
    for case, arrays in zip(cases, given, strict=True):
        assert_same(exported.call(*arrays), run_oracle(case))


def test_writes_of_fewer_slots_than_tokens():
    case = make_case(np.random.default_rng(0), num_tokens=9, num_heads=2, head_size=16)
    arrays = (case.key, case.value, *case.caches, case.slot_mapping.astype(np.int32)[:4])
    cache = "b 8 2 16"
    exported = export(
        jaxkv.reshape_and_cache_flash, ["t 2 16", "t 2 16", cache, cache, "n"], *arrays, constraints=["n <= t"]
    )
    assert_same(exported.call(*arrays), run_oracle(replace(case, slot_mapping=case.slot_mapping[:4])))


def test_writes_with_scales_of_their_own():
    for tokens, blocks in ((3, 4), (8, 5)):
        case = make_case(
            np.random.default_rng(tokens), num_tokens=tokens, num_blocks=blocks, num_heads=2, kv_cache_dtype="int8",
            per_token_head=True,
        )  # fmt: skip
        arrays = (case.key, case.value, *case.memory, case.slot_mapping.astype(np.int32))
        if blocks == 4:
            exported = export(
                lambda *x: jaxkv.reshape_and_cache_flash_per_token_head_quant(*x, "int8"),
                ["t 2 40", "t 2 40", "b 8 2 40", "b 8 2 40", "b 8 2", "b 8 2", "t"], *arrays,
            )  # fmt: skip
        assert_same(exported.call(*arrays), run_oracle(case))


@pytest.mark.parametrize(("kv_cache_dtype", "row"), [("auto", 576), ("fp8_ds_mla", 656)])
def test_writes_of_latent_rows(kv_cache_dtype, row):
    exported = None
    for tokens, blocks in ((3, 2), (5, 4)):
        rng = np.random.default_rng(tokens)
        kv_c, k_pe = (random_normal(rng, (tokens, n), "bfloat16") for n in (512, 64))
        cache = random_bits(rng, (2, blocks, 4, row), "bfloat16" if kv_cache_dtype == "auto" else "uint8")
        slots = rng.permutation(blocks * 4)[:tokens].astype(np.int32)
        exported = exported or export(
            lambda *x: jaxkv.concat_and_cache_mla(*x[:-1], kv_cache_dtype, layer=x[-1]),
            ["t 512", "t 64", f"2 b 4 {row}", "t", ""], kv_c, k_pe, cache, slots, np.int32(1),
        )  # fmt: skip
        want = cache.copy()
        reference.concat_and_cache_mla(kv_c, k_pe, want, slots, kv_cache_dtype, layer=1)
        assert_same(exported.call(kv_c, k_pe, cache, slots, np.int32(1)), [want])


READS = {
    "decode": [dict(seq_lens=(0, 1, 5, 19)), dict(seq_lens=(33, 2))],
    "ragged": [
        dict(seq_lens=(4, 9, 30), query_lens=(4, 0, 5), padding=2), dict(seq_lens=(40, 1), query_lens=(33, 1)),
    ],
    "window": [dict(seq_lens=(7, 19), sliding_window=3), dict(seq_lens=(1, 9, 40), sliding_window=3)],
}  # fmt: skip


def read_shapes(case, tokens):
    heads = case.query.shape[1]
    caches = ["b " + " ".join(map(str, c.shape[1:])) for c in case.caches]
    return [f"{tokens} {heads} {case.query.shape[2]}", *caches, "s w", "s"]


MLA = {"layout": "MLA", "kv_cache_dtype": "fp8_ds_mla", "head_size": 576, "head_size_v": 512}


@pytest.mark.parametrize("options", [{}, {"layout": "MLA"}, {"kv_cache_dtype": "nvfp4"}, MLA], ids=str)
@pytest.mark.parametrize("kind", READS)
def test_attention_over_any_number_of_sequences_blocks_and_columns(kind, options):
    cases = [make_read(np.random.default_rng(i), **more, **options) for i, more in enumerate(READS[kind])]
    ragged, first = kind == "ragged", cases[0]

    def arrays(case):
        starts = [case.query_start_loc] if ragged else []
        return case.query, *case.caches, case.block_tables, case.seq_lens, *starts

    def attend(query, *rest):
        caches, (tables, lens, *starts) = rest[: len(first.caches)], rest[len(first.caches) :]
        return jaxkv.paged_attention(
            query, caches, tables, lens, query_start_loc=starts[0] if starts else None, return_lse=True,
            head_size_v=first.head_size_v if first.layout.latent else None, **first.options,
        )  # fmt: skip

    shapes = read_shapes(first, "t" if ragged else "s") + (["s + 1"] if ragged else [])
    exported = export(attend, [s.replace("s + 1", "s+1") for s in shapes], *arrays(first))
    assert cases[0].block_tables.shape[1] != cases[1].block_tables.shape[1]
    for case in cases:
        want, want_lse = oracle(case)
        out, lse = exported.call(*arrays(case))
        np.testing.assert_allclose(out, want, rtol=0, atol=4 * BOUNDS["float32"] * np.abs(want).max())
        np.testing.assert_allclose(lse, want_lse, rtol=1e-4)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
def test_gather_of_any_number_of_sequences_blocks_and_columns(kv_cache_dtype):
    exported = None
    for lens in ((0, 5, 19), (33, 2)):
        case = make_read(np.random.default_rng(lens[0]), seq_lens=lens, kv_cache_dtype=kv_cache_dtype)
        arrays = (*case.caches, case.block_tables, case.seq_lens)
        options = {n: v for n, v in case.options.items() if n in ("kv_cache_dtype", "k_scale", "v_scale")}
        exported = exported or export(
            lambda k, v, tables, n: jaxkv.gather_kv((k, v), tables, n, 21, dtype="float32", **options),  # noqa: B023
            read_shapes(case, "s")[1:], *arrays,
        )  # fmt: skip
        want = reference_attention.gather_kv(
            case.caches, case.block_tables, case.seq_lens, 21, dtype=DTYPES["float32"], head_size=32, **options
        )
        assert_same(exported.call(*arrays), want)


def test_merged_parts_of_any_number_of_tokens():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 16), (2, 3, 4))]
    exported = export(jaxkv.merge_attention, ["p t 4 16", "p t 4"], *arrays)
    for a, b in zip(exported.call(*arrays), jaxkv.merge_attention(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


ROWS, CACHE = jax.ShapeDtypeStruct((3, 2, 16), "float32"), jax.ShapeDtypeStruct((4, 4, 2, 16), "float32")
NUMBERS = jax.ShapeDtypeStruct((3,), "int32")
TABLES = jax.ShapeDtypeStruct((3, 2), "int32")


def write(key, value, key_cache, value_cache, slot_mapping):
    return jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping)


def attend(query, key_cache, value_cache, block_tables, seq_lens):
    return jaxkv.paged_attention(query, (key_cache, value_cache), block_tables, seq_lens)


def gather(key_cache, value_cache, block_tables, seq_lens):
    return jaxkv.gather_kv((key_cache, value_cache), block_tables, seq_lens, 5)


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")])
@pytest.mark.parametrize(("function", "arrays", "shapes", "name", "got"), [
    (write, (ROWS, ROWS, CACHE, CACHE, NUMBERS), ["t 2 16", "t 2 16", "4 4 2 16", "4 4 2 16", "t"], "key",
     "(t, 2, 16)"),
    (write, (ROWS, ROWS, CACHE, CACHE, NUMBERS), ["3 2 16", "3 2 16", "b 4 2 16", "b 4 2 16", "3"], "key_cache",
     "(b, 4, 2, 16)"),
    (attend, (ROWS, CACHE, CACHE, TABLES, NUMBERS), ["3 2 16", "4 4 2 16", "4 4 2 16", "3 w", "3"], "block_tables",
     "(3, w)"),
    (attend, (ROWS, CACHE, CACHE, TABLES, NUMBERS), ["s 2 16", "4 4 2 16", "4 4 2 16", "s 2", "s"], "query",
     "(s, 2, 16)"),
    (gather, (CACHE, CACHE, TABLES, NUMBERS), ["b 4 2 16", "b 4 2 16", "3 2", "3"], "key_cache", "(b, 4, 2, 16)"),
    (gather, (CACHE, CACHE, TABLES, NUMBERS), ["4 4 2 16", "4 4 2 16", "s 2", "s"], "block_tables", "(s, 2)"),
])  # fmt: skip
def test_kernels_need_every_size(function, arrays, shapes, name, got, platforms):
    with pytest.raises(ValueError, match=r"must have a static shape") as error:
        export(function, shapes, *arrays, platforms=platforms)
    assert str(error.value) == f"{name} must have a static shape on cuda, where kernels depend on it, got {got}"


# ---- pytrees of jaxkv's own


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "HEAD_MAJOR"},
        {"num_layers": 2, "kv_cache_dtype": "int8", "per_token_head": True},
        {"kv_cache_dtype": "fp8", "k_scale": 0.5},
        {"layout": "MLA", "num_heads": 1, "head_size_v": 12},
    ],
    ids=str,
)
def test_a_program_with_caches_and_batches_survives_a_trip_through_bytes(options, x64):
    cache = jaxkv.PagedKVCache.create(
        **{"num_blocks": 6, "block_size": 4, "num_heads": 2, "head_size": 16, "dtype": "float32", **options}
    )
    sequences = [jaxkv.Sequence(jaxkv.BlockPool(6, 4))]
    sequences[0].append(9)
    batch = jaxkv.ragged_batch(sequences, [9], num_tokens=12)
    latent = options.get("layout") == "MLA"
    key, value = (
        random_normal(np.random.default_rng(n), (12, n) if latent else (12, 2, 16), "float32") for n in (12, 4)
    )

    def step(cache, batch, key, value):
        slots = jaxkv.slot_mapping(*batch[:3], 4, len(key))
        return cache.write(key, value, slots, layer=None if cache.spec.num_layers is None else 1), batch

    exported = jax.export.export(jax.jit(step), platforms=["cpu"])(cache, batch, key, value)
    new, got_batch = jax.export.deserialize(exported.serialize()).call(cache, batch, key, value)
    want, _ = jax.jit(step)(cache, batch, key, value)
    assert new.spec == cache.spec
    assert jax.tree.structure(new) == jax.tree.structure(want)
    assert_same(jax.tree.leaves(new), jax.tree.leaves(want))
    assert any(np.asarray(leaf).any() for leaf in new.caches)
    assert isinstance(got_batch, jaxkv.RaggedBatch)
    assert_same(got_batch, batch)
