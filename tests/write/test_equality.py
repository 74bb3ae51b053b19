"""One definition, four implementations on a CPU: all leave the oracle's bits in every byte of the caches."""

import itertools

import numpy as np
import pytest

from tests.cases.arrays import CPU_IMPLEMENTATIONS, LAYOUTS, assert_equals_oracle, make_case
from tests.cases.write_grid import (
    BLOCK_SIZES,
    CONVERSIONS,
    DTYPES,
    HEAD_SIZES,
    KV_CACHE_DTYPES,
    SLOTS,
    grid_cases,
    layout_case,
)

# Any two of the values of vLLM's grid meet. Each test has all numbers of heads, with a number of tokens each. What
# is left out would say the same: a case of a new shape takes XLA a third of a second to compile.
GRID = [
    (head_size, block_size, dtype, KV_CACHE_DTYPES[(i + j + k) % 3], (i + 2 * j + 3 * k) % 4)
    for (i, head_size), (j, block_size), (k, dtype) in itertools.product(
        enumerate(HEAD_SIZES), enumerate(BLOCK_SIZES), enumerate(DTYPES)
    )
]


@pytest.mark.parametrize(("head_size", "block_size", "dtype", "kv_cache_dtype", "first"), GRID)
def test_vllm_grid(head_size, block_size, dtype, kv_cache_dtype, first):
    for case in itertools.islice(grid_cases(head_size, block_size, dtype, kv_cache_dtype), first, None, 4):
        assert_equals_oracle(case)


@CONVERSIONS
@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, cache_dtype, kv_cache_dtype, layer):
    assert_equals_oracle(layout_case(layout, dtype, cache_dtype, kv_cache_dtype, layer))


@pytest.mark.parametrize(
    "pattern",
    [
        "block slot (kv head) dim",
        "head slot block dim",
        "dim head slot block",
        "block layer slot head dim",
        "kv layer block slot head dim",
        "block slot head dim, block head slot dim",
        "(block kv) slot head dim",
        "x block dim/x slot head",
    ],
)
def test_orders_that_nobody_uses_yet(pattern):
    layered = "layer" in pattern
    case = make_case(
        np.random.default_rng(2),
        layout=pattern,
        layer=1 if layered else None,
        num_layers=2 if layered else None,
    )
    assert_equals_oracle(case)


@pytest.mark.parametrize("layout", ["NHD", "HND", "HEAD_MAJOR", "block slot head dim, block head slot dim"])
def test_two_arrays_with_different_head_sizes(layout):
    assert_equals_oracle(make_case(np.random.default_rng(3), layout=layout, head_size=72, head_size_v=16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16", "float32"])
def test_casts_of_every_kind(dtype, cache_dtype):
    rng = np.random.default_rng(4)
    assert_equals_oracle(make_case(rng, num_tokens=33, head_size=128, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", ["storage", "uint8"])
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_input_is_stored_as_it_is(stored, cache_dtype):
    kv_cache_dtype = "fp8_e4m3" if "e4m3" in stored else "fp8_e5m2"
    cache_dtype = stored if cache_dtype == "storage" else "uint8"
    case = make_case(np.random.default_rng(5), dtype=stored, cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype)
    assert_equals_oracle(case)  # with scales, which do not apply
    if cache_dtype == stored:
        case.kv_cache_dtype, case.k_scale, case.v_scale = "auto", None, None
        assert_equals_oracle(case)


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PACKED_HND"])
def test_slots(layout, slots):
    assert_equals_oracle(make_case(np.random.default_rng(6), layout=layout, slots=slots))


@pytest.mark.parametrize("slots", [[5, -1, 39, 40, 0, -(2**31), 2**31 - 1], [3]])
def test_int32_slots(slots):
    case = make_case(np.random.default_rng(7), slots=slots)
    case.slot_mapping = case.slot_mapping.astype(np.int32)
    assert_equals_oracle(case)


@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
def test_no_tokens(layout):
    assert_equals_oracle(make_case(np.random.default_rng(8), layout=layout, num_tokens=0))


@pytest.mark.parametrize("scales", [(None, None), (2.0, None), (1e-38, 1e38), (1e-40, 3e-45), (0.0, -0.25)])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_scales(kv_cache_dtype, scales):
    """Subnormal, zero and negative ones too: IEEE division decides."""
    for dtype in ("float32", "bfloat16"):
        rng = np.random.default_rng(9)
        case = make_case(rng, dtype=dtype, kv_cache_dtype=kv_cache_dtype, num_tokens=16, head_size=128, scales=scales)
        assert_equals_oracle(case)


def test_ordinary_numbers_in_a_fused_projection():
    """Keys and values as they come from a model: slices of one array."""
    import jax.numpy as jnp

    import jaxkv
    import torchkv
    from tests.cases.arrays import bits, from_torch, run_oracle, to_torch

    rng = np.random.default_rng(10)
    case = make_case(rng, num_heads=2, head_size=64, bits=False)
    qkv = rng.standard_normal((7, 8 * 64), dtype=np.float32).astype(case.key.dtype)
    case.key, case.value = (qkv[:, i : i + 128].reshape(7, 2, 64) for i in (256, 384))
    want = run_oracle(case)
    fused = to_torch(qkv)
    key, value = (fused[:, i : i + 128].unflatten(1, (2, 64)) for i in (256, 384))
    for backend in ("torch", "interpret"):
        caches = [to_torch(c.copy()) for c in case.caches]
        torchkv.reshape_and_cache_flash(key, value, *caches, to_torch(case.slot_mapping), backend=backend)
        assert all((bits(from_torch(c)) == bits(w)).all() for c, w in zip(caches, want, strict=True))
    fused = jnp.asarray(qkv)
    key, value = (fused[:, i : i + 128].reshape(7, 2, 64) for i in (256, 384))
    for backend in ("xla", "interpret"):
        new = jaxkv.reshape_and_cache_flash(
            key, value, *map(jnp.asarray, case.caches), case.slot_mapping, backend=backend
        )
        assert all((bits(np.asarray(c)) == bits(w)).all() for c, w in zip(new, want, strict=True))


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_a_slot_given_twice_gets_one_of_the_two(name):
    case = make_case(np.random.default_rng(11), slots=[4, 9, 4], num_tokens=3, bits=False)
    got = CPU_IMPLEMENTATIONS[name](case)[0].astype(np.float32)[0, 4]
    first, second = (case.key[i].astype(np.float32) for i in (0, 2))
    assert ((got == first) | (got == second)).all()


@pytest.mark.parametrize("layer", [-1, 3, 2**31 - 1])
def test_a_traced_layer_out_of_range_writes_nothing(layer):
    import jax.numpy as jnp
    import torch

    case = make_case(np.random.default_rng(12), layout="PALLAS", num_layers=3, layer=0)
    untouched = [c.copy() for c in case.caches]
    for implementation in CPU_IMPLEMENTATIONS:
        case.layer = jnp.int32(layer) if "jax" in implementation else torch.tensor(layer)
        for got, want in zip(CPU_IMPLEMENTATIONS[implementation](case), untouched, strict=True):
            np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8), err_msg=implementation)
