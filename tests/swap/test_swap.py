"""swap_blocks: both frameworks, portable and interpreted kernel, bit for bit the oracle's; there and back again."""

import numpy as np
import pytest

from kvcore.oracle import blocks as reference
from tests.cases.arrays import DTYPES, LAYOUTS, bits
from tests.cases.blocks import assert_same
from tests.cases.swaps import CPU_IMPLEMENTATIONS, PAIRS, assert_equals_oracle, make_swap, run_oracle


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_pairs(pairs):
    assert_equals_oracle(make_swap(np.random.default_rng(0), pairs))


def test_the_oracle_skips_what_is_no_block_of_its_side():
    old, new = np.array([10, 11, 12]), np.array([0, 1, 2, 3, 4])
    reference.swap_blocks([old], [new], [[2, 4], [3, 0], [4, 1], [0, 5], [-1, 2], [1, -1], [1, 3]], [0])
    assert (old.tolist(), new.tolist()) == ([10, 11, 12], [0, 1, 2, 11, 12])
    old, new = np.arange(4).reshape(2, 2), np.zeros((2, 3), int)
    reference.swap_blocks([old], [new], [[1, 2]], [1])
    assert new.tolist() == [[0, 0, 1], [0, 0, 3]]


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, num_layers):
    rng = np.random.default_rng(1)
    assert_equals_oracle(make_swap(rng, PAIRS["no blocks"] + [[0, 10]], layout=layout, num_layers=num_layers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_dtype_stay_as_they_are(dtype):
    """NaN payloads and signs, too: nothing is converted."""
    assert_equals_oracle(make_swap(np.random.default_rng(2), PAIRS["apart"], cache_dtype=dtype, dtype="float32"))


@pytest.mark.parametrize("scale_layout", [None, "head block slot", "block slot head, slot head block"])
@pytest.mark.parametrize("layout", ["NHD", "PACKED_HND"])
def test_scale_caches(layout, scale_layout):
    case = make_swap(
        np.random.default_rng(3), PAIRS["apart"], layout=layout, kv_cache_dtype="int8", per_token_head=True,
        scale_layout=scale_layout,
    )  # fmt: skip
    assert len(case.source.memory) == len(case.source.caches) + 2
    assert_equals_oracle(case)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int4", "per_token_head": True, "num_layers": 2},
        {"kv_cache_dtype": "nvfp4", "head_size": 32, "num_layers": 2}, {"layout": "KV_NHD"}, {"layout": "PALLAS"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_there_and_back_again(name, options):
    """What was swapped out comes back, bit for bit, to other blocks; all others keep their poison."""
    rng, run = np.random.default_rng(4), CPU_IMPLEMENTATIONS[name]
    out = make_swap(rng, [[0, 9], [5, 2], [6, 3]], **options)
    out.destination.caches = (memory := run(out))[: len(out.destination.caches)]
    out.destination.scale_caches = memory[len(out.destination.caches) :]
    before = [array.copy() for array in out.source.memory]
    found = run(out.back([[9, 1], [2, 2], [3, 6]]))
    for new, old, axis in zip(found, before, out.source.axes, strict=True):
        new, old = np.moveaxis(bits(new), axis, 0), np.moveaxis(bits(old), axis, 0)
        np.testing.assert_array_equal(new, old[[0, 0, 5, 3, 4, 5, 6]])


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_size": 5, "num_heads": 1, "block_size": 3},
        {"head_size": 7, "num_heads": 3, "block_size": 1, "cache_dtype": "uint8"},
        {"head_size": 160, "num_heads": 3, "block_size": 16, "cache_dtype": "float32"},
        {"head_size": 24, "head_size_v": 40, "layout": "HEAD_MAJOR"},
        {"layout": "PALLAS", "head_size": 6},
    ],
    ids=str,
)
def test_sizes_of_every_kind(sizes):
    assert_equals_oracle(make_swap(np.random.default_rng(5), PAIRS["apart"], dtype="float32", **sizes))


@pytest.mark.parametrize("num_blocks", [(11, 7), (1, 11), (7, 1)])
def test_fewer_and_more_blocks(num_blocks):
    pairs = [[0, 0], [10, 0], [3, 6], [0, 8], [6, 10]] if 1 not in num_blocks else [[0, 0], [1, 0], [0, 1], [6, 1]]
    assert_equals_oracle(make_swap(np.random.default_rng(6), pairs, num_blocks=num_blocks, num_layers=2))


def test_blocks_larger_than_a_slice():
    """Several slices, of which the last are not full."""
    case = make_swap(
        np.random.default_rng(7), [[0, 1], [2, 0]], num_blocks=(3, 2), block_size=17, num_heads=9, head_size=120,
        num_layers=2, cache_dtype="float32", dtype="float32",
    )  # fmt: skip
    assert case.source.caches[0][:, 0].nbytes > 65536
    assert_equals_oracle(case)


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_of_two_pairs_with_one_destination_each_element_is_one_of_the_two(name):
    case = make_swap(np.random.default_rng(8), [[0, 2], [1, 2], [4, 3]])
    for got, old in zip(CPU_IMPLEMENTATIONS[name](case), case.source.caches, strict=True):
        got, old = bits(got), bits(old)
        assert ((got[2] == old[0]) | (got[2] == old[1])).all()
        np.testing.assert_array_equal(got[3], old[4])


def test_int64_pairs_that_int32_would_wrap():
    case = make_swap(np.random.default_rng(9), PAIRS["none"])
    case.source.indices = np.array([[2**32, 1], [1, 2**32 + 2], [3, 4]])
    want = run_oracle(case)
    for name, run in CPU_IMPLEMENTATIONS.items():
        assert_same(run(case), want, name)
