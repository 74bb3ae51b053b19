"""Quantised writes: every format, granularity and layout; all implementations leave the oracle's bits in every byte."""

import numpy as np
import pytest
import torch

from kvcore.formats import KV_CACHE_DTYPES, PER_TOKEN_HEAD
from kvcore.oracle import write as reference
from tests.cases.arrays import (
    CPU_IMPLEMENTATIONS,
    DTYPES,
    assert_equals_oracle,
    bits,
    make_case,
    random_bits,
    run_oracle,
    with_case,
)
from tests.cases.quantised_writes import FORMATS, TELLING, TELLING_OF_LAYERS, kinds, quantised_case, run_mla


@pytest.mark.parametrize(
    ("name", "granularity", "layout"), [kind for kind in kinds() if kind[2] == "NHD" or kind[:2] in TELLING]
)
def test_layouts(name, granularity, layout):
    """Inputs are random bits: most rows have a NaN, an infinity or neither."""
    assert_equals_oracle(quantised_case(name, granularity, layout))


@pytest.mark.parametrize(("name", "granularity"), [*TELLING, *TELLING_OF_LAYERS])
@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD", "BLOCK_KV_HND"])
def test_layers_and_float32(name, granularity, layout):
    assert_equals_oracle(quantised_case(name, granularity, layout, layer=2, dtype="float32"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "token and head, heads first"])
def test_numbers_as_models_have_them(name, granularity):
    if name == "nvfp4" and granularity != "tensor":
        pytest.skip("nvfp4 has a scale for each block of 16")
    case = quantised_case(name, granularity, "NHD", dtype="float16", bits=False)
    assert_equals_oracle(case)
    if "token" in granularity:  # the largest magnitude of each row becomes the format's largest
        caches = run_oracle(case)
        scale = np.abs(case.key[0].astype(np.float32)).max(-1) / np.float32(KV_CACHE_DTYPES[name].largest)
        at = (slice(None), 3, 0) if granularity.endswith("first") else (0, 3)
        np.testing.assert_array_equal(caches[2][at], scale)


@pytest.mark.parametrize("head_size", [2, 34, 80, 256])
@pytest.mark.parametrize("name", ["int4", "fp8_e4m3"])
def test_head_sizes_that_are_no_power_of_two(name, head_size):
    """Columns past the end of a head hold 1, far above what these heads have: they stay out of the maximum."""
    case = make_case(
        np.random.default_rng(3), kv_cache_dtype=name, head_size=head_size, per_token_head=True, bits=False,
        dtype="float32",  # the interpreter makes another number of such a 1 in bfloat16
    )  # fmt: skip
    case.key *= np.float32(1e-3)
    case.value *= np.float32(1e-3)
    assert_equals_oracle(case)


@pytest.mark.parametrize("name", [n for n in PER_TOKEN_HEAD if n != "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_are_special(name, dtype):
    """Zeros, an infinity, a NaN, the largest and the smallest numbers: each row for itself."""
    case = make_case(
        np.random.default_rng(4), kv_cache_dtype=name, dtype=dtype, head_size=32, num_tokens=12, num_blocks=4,
        per_token_head=True, bits=False,
    )  # fmt: skip
    largest = np.finfo(np.float32).max if dtype == "float32" else float(np.array(0x7B00, np.uint16).view(np.float16))
    edge = KV_CACHE_DTYPES[name].largest * 2.0**-126
    for token, number in enumerate([0, -0.0, np.inf, -np.inf, np.nan, largest, -largest, edge, edge * 0.99, 1e-42]):
        case.key[token, 1] = number if token < 2 or number in (edge, edge * 0.99, 1e-42) else case.key[token, 1]
        case.value[token, 2, 5] = number
        case.key[token, 1, 7] = number
    assert_equals_oracle(case)
    memory = run_oracle(case)
    block, place = divmod(int(case.slot_mapping[0]), 8)
    assert memory[2][block, place, 1] == 1  # zeros
    assert not memory[0][block, place, 1].view(np.uint8).any()
    for token, kind in ((2, np.isinf), (4, np.isnan)):
        block, place = divmod(int(case.slot_mapping[token]), 8)
        assert kind(memory[2][block, place, 1])
        assert np.isfinite(memory[2][block, place, [0, 2]]).all()  # other heads know nothing of it


@pytest.mark.parametrize("scales", [(None, None), (0.0, -0.25), (np.nan, np.inf), (1e-40, 1e38)])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3fnuz", "fp8_e5m2fnuz"])
def test_static_scales_of_every_kind(name, scales):
    case = make_case(
        np.random.default_rng(5), dtype="float32", kv_cache_dtype=name, num_tokens=16, head_size=64, scales=scales
    )
    assert_equals_oracle(case)


@pytest.mark.parametrize("scales", [(None, None), (0.0, -0.25), (np.nan, np.inf), (1e-20, 1e30), (2.0, 1e-3)])
def test_global_scales_of_nvfp4(scales):
    case = make_case(
        np.random.default_rng(6), dtype="float32", kv_cache_dtype="nvfp4", num_tokens=16, head_size=64, scales=scales
    )
    assert_equals_oracle(case)


def test_nvfp4_by_hand():
    """Elements of a block lie in its first bytes, scales of all heads after the elements of all."""
    cache = np.full((2, 4, 2, 18), 0xCC, np.uint8)  # 2 blocks of 4 slots, 2 heads of 32
    key = np.zeros((1, 2, 32), np.float32)
    key[0, 0, :4] = [6, -3, 0.5, 1.4]  # absmax 6: scale 1
    key[0, 1, 16:18] = [-12, 6]  # the second block of head 1: scale 2
    reference.reshape_and_cache_flash(key, key, cache, cache.copy(), np.array([5]), "nvfp4")
    block = cache[1].reshape(-1)
    elements, scales = block[:128].reshape(4, 2, 16), block[128:].reshape(4, 2, 2)
    # codes: 0 0.5 1 1.5 2 3 4 6, and 8 for the sign; 1.4 rounds to 1.5
    assert elements[1, 0, :3].tolist() == [0x7 | 0xD << 4, 0x1 | 0x3 << 4, 0]
    assert elements[1, 1].tolist() == [0] * 8 + [0xF | 0x5 << 4] + [0] * 7
    assert scales[1].tolist() == [[0x38, 0], [0, 0x40]]  # 1, no scale; no scale, 2
    assert (np.delete(elements, 1, 0) == 0xCC).all()
    assert (np.delete(scales, 1, 0) == 0xCC).all()
    assert (cache[0] == 0xCC).all()


def test_int4_by_hand():
    cache = np.full((1, 2, 1, 3), 0xCC, np.uint8)
    key = np.array([[[7, -7, 0.5, 1.5, -100, np.nan]]], np.float32)
    reference.reshape_and_cache_flash(key, key, cache, cache.copy(), np.array([1]), "int4")
    assert cache[0, 1, 0].tolist() == [0x7 | 0x9 << 4, 0x0 | 0x2 << 4, 0x9]
    assert (cache[0, 0] == 0xCC).all()


@pytest.mark.parametrize(("name", "granularity"), TELLING_OF_LAYERS)
def test_of_scales_of_layers_the_layers_own_count(name, granularity):
    case = quantised_case(name, granularity, "NHD", layer=1, bits=False)
    alone = with_case(case, k_scale=case.k_scale[1].copy(), v_scale=case.v_scale[1].copy())
    for got, want in zip(run_oracle(case), run_oracle(alone), strict=True):
        np.testing.assert_array_equal(got, want)
    case.k_scale[[0, 2]], case.v_scale[[0, 2]] = np.nan, 0
    assert_equals_oracle(alone, {name: lambda _, run=run: run(case) for name, run in CPU_IMPLEMENTATIONS.items()})


@pytest.mark.parametrize("layer", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("name", "granularity"), TELLING_OF_LAYERS)
def test_scales_of_a_layer_that_does_not_exist(name, granularity, layer):
    """Nothing is written, and no scale is read far away."""
    case = quantised_case(name, granularity, "NHD", layer=0)
    layer = np.array(layer, np.int32)
    for name, run in CPU_IMPLEMENTATIONS.items():
        in_memory = torch.from_numpy(layer) if "torch" in name else layer
        for got, want in zip(run(with_case(case, layer=in_memory)), case.memory, strict=True):
            np.testing.assert_array_equal(bits(got), bits(want), err_msg=name)


# ---- MLA


def mla_implementations():
    import jax.numpy as jnp

    import jaxkv
    import torchkv
    from tests.cases.arrays import from_torch, to_torch

    for backend in ("xla", "interpret"):
        yield f"jax {backend}", lambda *a, b=backend, **k: run_mla(jaxkv, jnp.asarray, np.asarray, *a, backend=b, **k)
    for backend in ("torch", "interpret"):
        yield (
            f"torch {backend}",
            lambda *a, b=backend, **k: run_mla(torchkv, lambda x: to_torch(x.copy()), from_torch, *a, backend=b, **k),
        )


@pytest.mark.parametrize(
    ("dtype", "layer", "scale"), [("bfloat16", None, 0.37), ("float32", 1, 0.37), ("float16", 2, "layers")]
)
@pytest.mark.parametrize("name", ["auto", "fp8", "int8", "int4", "nvfp4", "fp8_ds_mla"])
def test_mla_rows(name, dtype, layer, scale):
    rng = np.random.default_rng(7)
    units = {"auto": 576, "int4": 288, "nvfp4": 324, "fp8_ds_mla": 656}.get(name, 576)
    shape = (3, 4, 8, units) if layer is not None else (4, 8, units)
    slots = np.array([3, -1, 31, 32, 0, 17], np.int32)
    arrays = [random_bits(rng, (6, 512), dtype), random_bits(rng, (6, 64), dtype)]
    arrays += [random_bits(rng, shape, "bfloat16" if name == "auto" else "uint8"), slots]
    if scale == "layers":
        scale = np.array([[3.0], [0.01], [0.37]], np.float32)
    if name in ("auto", "fp8_ds_mla"):
        scale = None
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, slots, name, scale, layer=layer)
    for implementation, run in mla_implementations():
        got = run(arrays, name, scale, layer=layer)
        different = np.flatnonzero(bits(got) != bits(want))
        assert not different.size, f"{implementation}: {different.size} bytes differ, first {different[:4]}"


def test_a_row_of_fp8_ds_mla_by_hand():
    kv_c = np.zeros((1, 512), np.float32)
    kv_c[0, [0, 130, 511]] = [448, -600, 4.375]
    k_pe = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    cache = np.full((1, 2, 656), 0xCC, np.uint8)
    reference.concat_and_cache_mla(kv_c, k_pe, cache, np.array([1]), "fp8_ds_mla")
    row = cache[0, 1]
    np.testing.assert_array_equal(row[512:528].view(np.float32), np.float32([1, 2, 2**-13, 2**-6]))
    assert row[[0, 130, 511]].tolist() == [0x7E, 0xF9, 0x79]  # 448; -300 rounds to -288, 280 to 288
    np.testing.assert_array_equal(row[528:].view(DTYPES["bfloat16"]), k_pe[0].astype(DTYPES["bfloat16"]))
    assert (cache[0, 0] == 0xCC).all()


LEAST = 2.0**-13  # of the powers of two, the first above 1e-4
TILES = {  # elements of 128 that are not zero → the tile's scale, and what is stored of them
    "zeros": ([0.0, -0.0], LEAST, [0x00, 0x80]),
    "nothing but tiny numbers": ([1e-30, -1e-30], LEAST, [0x00, 0x80]),
    "the magnitude at the least scale": ([0.0448], LEAST, [0x7B]),  # 367 rounds to 352
    "the last magnitude of the least scale": ([448 * LEAST], LEAST, [0x7E]),
    "the next one": ([np.nextafter(np.float32(448 * LEAST), np.float32(1))], 2 * LEAST, [0x76]),  # 224
    "448 and a power of two": ([-448 * 2.0**20, 224 * 2.0**20], 2.0**20, [0xFE, 0x76]),
    "a little less": ([np.nextafter(np.float32(448), np.float32(0))], 1.0, [0x7E]),
    "a little more": ([np.nextafter(np.float32(448), np.float32(512))], 2.0, [0x76]),
    "the largest numbers": ([3e38, -1e38], 2.0**120, [0x76, 0xE9]),  # 225.7 rounds to 224, 75.2 to 72
    "an infinity": ([np.inf, -np.inf, 5.0, -5.0], np.inf, [0x7F, 0x7F, 0x00, 0x80]),
    "a NaN": ([np.nan, 448.0, -np.nan], 1.0, [0x7F, 0x7E, 0x7F]),
    "nothing but NaN": ([np.nan] * 128, LEAST, [0x7F] * 128),
    "an infinity and a NaN": ([np.nan, np.inf], np.inf, [0x7F, 0x7F]),
}


@pytest.mark.parametrize("name", TILES)
def test_scales_of_fp8_ds_mla_are_those_of_a_table(name):
    numbers, scale, stored = TILES[name]
    kv_c = np.zeros((3, 512), np.float32)
    kv_c[1, 256 : 256 + len(numbers)] = numbers
    kv_c[:, 5] = 448
    arrays = [kv_c, np.ones((3, 64), np.float32), np.full((2, 4, 656), 0xCC, np.uint8), np.array([0, 6, 2], np.int32)]
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, arrays[3], "fp8_ds_mla")
    row = want[1, 2]
    assert row[512:528].view(np.float32).tolist() == [1, LEAST, scale, LEAST]
    assert row[256 : 256 + len(stored)].tolist() == stored
    for implementation, run in mla_implementations():
        np.testing.assert_array_equal(run(arrays, "fp8_ds_mla"), want, err_msg=implementation)


def test_scales_of_fp8_ds_mla_over_all_magnitudes():
    """A tile for each number next to a power of two or to 448 times one, and for many between."""
    edges = np.concatenate([2.0 ** np.arange(-20, 128), 448 * 2.0 ** np.arange(-20, 119)]).astype(np.float32)
    numbers = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    numbers = np.concatenate([numbers, np.arange(1, 1 << 31, (1 << 31) // 700, np.uint32).view(np.float32)])
    numbers = np.resize(numbers, (-(-numbers.size // 4), 4))
    kv_c = np.zeros((len(numbers), 4, 128), np.float32)
    kv_c[:, :, 77] = numbers
    blocks = -(-len(numbers) // 16)
    arrays = [kv_c.reshape(-1, 512), np.zeros((len(numbers), 64), np.float32)]
    arrays += [np.zeros((blocks, 16, 656), np.uint8), np.arange(len(numbers), dtype=np.int32)]
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, arrays[3], "fp8_ds_mla")
    scales = want.reshape(-1, 656)[: len(numbers), 512:528].copy().view(np.float32)
    with np.errstate(all="ignore"):
        exact = np.maximum(numbers.astype(np.float64) / 448, 1e-4)
        np.testing.assert_array_equal(scales, np.where(np.isnan(numbers), LEAST, 2.0 ** np.ceil(np.log2(exact))))
    for implementation, run in mla_implementations():
        np.testing.assert_array_equal(run(arrays, "fp8_ds_mla"), want, err_msg=implementation)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_of_fp8_ds_mla_without_rotary_part_hold_zeros_there(dtype):
    rng = np.random.default_rng(8)
    arrays = [random_bits(rng, (6, 512), dtype), np.empty((6, 0), DTYPES[dtype])]
    arrays += [np.full((4, 8, 656), 0xCC, np.uint8), np.array([3, -1, 31, 32, 0, 17], np.int32)]
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, arrays[3], "fp8_ds_mla")
    for slot in (3, 31, 0, 17):
        assert not want.reshape(-1, 656)[slot, 528:].any()
    for implementation, run in mla_implementations():
        np.testing.assert_array_equal(run(arrays, "fp8_ds_mla"), want, err_msg=implementation)


@pytest.mark.parametrize("rank", [512, 80, 48])
@pytest.mark.parametrize("name", ["auto", "fp8", "int8", "int4", "nvfp4"])
def test_rows_without_rotary_part(name, rank):
    rng = np.random.default_rng(8)
    units = {"auto": rank, "int4": rank // 2, "nvfp4": rank // 16 * 9}.get(name, rank)
    arrays = [random_bits(rng, (6, rank), "bfloat16"), np.empty((6, 0), DTYPES["bfloat16"])]
    arrays += [random_bits(rng, (4, 8, units), "bfloat16" if name == "auto" else "uint8")]
    arrays += [np.array([3, -1, 31, 32, 0, 17], np.int32)]
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, arrays[3], name, None if name == "auto" else 0.37)
    for implementation, run in mla_implementations():
        got = run(arrays, name, None if name == "auto" else 0.37)
        np.testing.assert_array_equal(bits(got), bits(want), err_msg=implementation)


def test_a_scale_given_with_fp8_ds_mla_is_not_read():
    rng = np.random.default_rng(9)
    arrays = [random_bits(rng, (3, 512), "bfloat16"), random_bits(rng, (3, 64), "bfloat16")]
    arrays += [np.full((1, 8, 656), 0xCC, np.uint8), np.array([3, 0, 7], np.int32)]
    want = arrays[2].copy()
    reference.concat_and_cache_mla(*arrays[:2], want, arrays[3], "fp8_ds_mla")
    for implementation, run in mla_implementations():
        np.testing.assert_array_equal(run(arrays, "fp8_ds_mla", 0.37), want, err_msg=implementation)


# ---- static scales from samples


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("name", FORMATS)
def test_scales_from_samples(name, granularity):
    import jax.numpy as jnp

    import jaxkv
    import torchkv
    from tests.cases.arrays import from_torch, to_torch

    rng = np.random.default_rng(8)
    key, value = (rng.standard_normal((9, 3, 32), np.float32).astype(DTYPES["bfloat16"]) for _ in range(2))
    value[:, 1] = 0
    want = reference.kv_scales(key, value, name, granularity)
    got = jaxkv.kv_scales(jnp.asarray(key), jnp.asarray(value), name, granularity)
    assert all(bits(np.asarray(g)).tolist() == bits(w).tolist() for g, w in zip(got, want, strict=True))
    got = torchkv.kv_scales(to_torch(key), to_torch(value), name, granularity)
    assert all(bits(from_torch(g)).tolist() == bits(w).tolist() for g, w in zip(got, want, strict=True))
    assert want[0].shape == (() if granularity == "tensor" else (3,))
    if granularity == "head":
        assert want[1][1] == 1
