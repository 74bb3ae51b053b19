"""copy_blocks and zero_blocks: both frameworks, portable and interpreted kernel, bit for bit the oracle's."""

import numpy as np
import pytest

from kvcore.oracle import blocks as reference
from kvcore.plan import blocks as plan
from tests.cases.arrays import DTYPES, LAYOUTS, bits
from tests.cases.blocks import (
    CPU_IMPLEMENTATIONS,
    PAIRS,
    assert_equals_oracle,
    make_blocks,
    moves,
    run_jax,
    run_oracle,
    run_torch,
)

ZEROS = [3, -1, 0, 7, 5, 3]


@pytest.fixture
def classes(monkeypatch, request):
    """Few pairs count as many as the test says."""
    monkeypatch.setattr(plan, "FEW_PAIRS", request.param[0])
    monkeypatch.setattr(plan, "MANY_PAIRS", request.param[1])
    plan.plan_blocks.cache_clear()
    yield
    plan.plan_blocks.cache_clear()


CLASSES = pytest.mark.parametrize(
    "classes", [(64, 1024), (2, 1024), (1, 2)], ids=["few", "some", "many"], indirect=True
)


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@CLASSES
def test_pairs(classes, pairs):
    assert_equals_oracle(make_blocks(np.random.default_rng(0), pairs))


@pytest.mark.parametrize("seed", range(3))
@CLASSES
def test_any_pairs(classes, seed):
    """Trees and circles as they come."""
    rng = np.random.default_rng(seed)
    for _ in range(4):
        num_blocks = int(rng.integers(2, 24))
        pairs = moves(rng, num_blocks, int(rng.integers(1, num_blocks + 1)))
        case = make_blocks(rng, pairs, num_blocks=num_blocks, block_size=2, num_heads=1, head_size=4)
        assert_equals_oracle(case, {name: CPU_IMPLEMENTATIONS[name] for name in ("torch interpret", "torch")})


def test_the_oracle_reads_all_before_it_writes():
    cache = np.array([10, 11, 12, 13])
    reference.copy_blocks([cache], [[1, 2], [2, 3], [3, 0], [9, 1], [1, -1]], [0])
    assert cache.tolist() == [13, 11, 11, 12]
    cache = np.arange(6).reshape(2, 3)
    reference.copy_blocks([cache], [[0, 2], [2, 0]], [1])
    reference.zero_blocks([cache], [1, 3, -1], [1])
    assert cache.tolist() == [[2, 0, 0], [5, 0, 3]]


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize(
    "layout", [*LAYOUTS, "block slot latent", "(kv block) slot head dim", "(block kv) head slot dim"]
)
def test_layouts(layout, num_layers):
    rng = np.random.default_rng(1)
    for indices in (PAIRS["circle with branches"], ZEROS):
        if "latent" in layout or "(" in layout:
            case = odd_case(rng, layout, num_layers, indices)
            check(case)
        else:
            assert_equals_oracle(make_blocks(rng, indices, layout=layout, num_layers=num_layers))


def odd_case(rng, layout, num_layers, indices):
    case = make_blocks(rng, indices, layout="PACKED_NHD", num_layers=num_layers)
    case.layout = type(case.layout)(("layer " if num_layers else "") + layout)
    front = (num_layers,) if num_layers else ()
    sizes = {"block slot latent": (7, 4, 16), "(kv block) slot head dim": (14, 4, 2, 8)}
    shape = (*front, *sizes.get(layout, (14, 2, 4, 8)))
    case.caches = [rng.integers(0, 256, shape, np.uint8)]
    return case


def check(case):
    """As `assert_equals_oracle`, where `block` shares an axis with `kv`: the oracle gets that taken apart."""
    (cache,) = case.caches
    axes = case.layout.arrays[0]
    at = next(i for i, axis in enumerate(axes) if "block" in axis)
    joined, apart = axes[at], cache
    if len(joined) == 2:
        apart = cache.reshape(*cache.shape[:at], *(2 if n == "kv" else 7 for n in joined), *cache.shape[at + 1 :])
    want = apart.copy()
    getattr(reference, case.name)([want], case.indices, [at + joined.index("block")])
    for name, run in CPU_IMPLEMENTATIONS.items():
        np.testing.assert_array_equal(run(case)[0], want.reshape(cache.shape), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_dtype_stay_as_they_are(dtype):
    """NaN payloads and signs, too: nothing is converted."""
    rng = np.random.default_rng(2)
    for indices in (PAIRS["tree"], ZEROS):
        assert_equals_oracle(make_blocks(rng, indices, cache_dtype=dtype, dtype="float32"))


@pytest.mark.parametrize("scale_layout", [None, "head block slot", "block slot head, slot head block"])
@pytest.mark.parametrize("layout", ["NHD", "PACKED_HND"])
def test_scale_caches(layout, scale_layout):
    rng = np.random.default_rng(3)
    for indices in (PAIRS["circle with branches"], ZEROS):
        case = make_blocks(
            rng, indices, layout=layout, kv_cache_dtype="int8", per_token_head=True, scale_layout=scale_layout
        )
        assert len(case.memory) == len(case.caches) + 2
        assert_equals_oracle(case)


def test_scale_caches_with_layers():
    rng = np.random.default_rng(4)
    case = make_blocks(rng, PAIRS["swap"], num_layers=3, kv_cache_dtype="int4", per_token_head=True)
    assert_equals_oracle(case)


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_size": 5, "num_heads": 1, "block_size": 3},
        {"head_size": 7, "num_heads": 3, "block_size": 1, "cache_dtype": "uint8"},
        {"head_size": 160, "num_heads": 3, "block_size": 16, "cache_dtype": "float32", "num_blocks": 4},
        {"head_size": 24, "head_size_v": 40, "layout": "HEAD_MAJOR"},
        {"layout": "PALLAS", "head_size": 6},
    ],
    ids=str,
)
def test_sizes_of_every_kind(sizes):
    rng = np.random.default_rng(5)
    for indices in ([[1, 2], [2, 3], [3, 1]], [1, 3]):
        assert_equals_oracle(make_blocks(rng, indices, dtype="float32", **sizes))


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_of_two_pairs_with_one_destination_each_element_is_one_of_the_two(name):
    case = make_blocks(np.random.default_rng(6), [[0, 2], [4, 3], [1, 2], [2, 5], [3, 3], [5, 3]])
    key, value = CPU_IMPLEMENTATIONS[name](case)
    for got, old in zip((key, value), case.caches, strict=True):
        got, old = bits(got), bits(old)
        assert ((got[2] == old[0]) | (got[2] == old[1])).all()
        assert ((got[3] == old[4]) | (got[3] == old[5]) | (got[3] == old[3])).all()
        for block, source in enumerate([0, 1, None, None, 4, 2, 6]):
            if source is not None:
                np.testing.assert_array_equal(got[block], old[source])


@pytest.mark.parametrize("name", ["jax interpret", "torch interpret"])
def test_of_such_pairs_the_kernel_always_takes_the_last(name):
    """More than is promised: the same bits in each run, whether or not others read the block."""
    pairs = [[0, 2], [4, 3], [1, 2], [2, 5], [5, 3], [0, 6], [1, 6]]
    assert_equals_oracle(make_blocks(np.random.default_rng(6), pairs), {name: CPU_IMPLEMENTATIONS[name]})


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_a_dead_pair_reads_nothing(name):
    """Its destination's readers wait for the pair that counts, wherever in the order it is."""
    case = make_blocks(np.random.default_rng(7), [[0, 1], [5, 1], [1, 2], [2, 3], [6, 2], [1, 4]])
    got, old = (bits(x) for x in (CPU_IMPLEMENTATIONS[name](case)[0], case.caches[0]))
    for block, sources in {0: [0], 1: [0, 5], 2: [1, 6], 3: [2], 4: [1], 5: [5], 6: [6]}.items():
        assert np.any([got[block] == old[s] for s in sources], axis=0).all(), block


def test_blocks_larger_than_a_slice():
    """Several slices of several tiles, of which the last are not full."""
    rng = np.random.default_rng(8)
    case = make_blocks(
        rng, [[0, 1], [1, 2], [2, 0], [3, 4]], num_blocks=5, block_size=17, num_heads=9, head_size=120, num_layers=2,
        cache_dtype="float32", dtype="float32",
    )  # fmt: skip
    assert case.caches[0][:, 0].nbytes > 65536
    assert_equals_oracle(case)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_of_both_widths(dtype):
    case = make_blocks(np.random.default_rng(9), PAIRS["circle"])
    case.indices = case.indices.astype(dtype)
    assert_equals_oracle(case)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_int64_indices_that_int32_would_wrap(backend):
    case = make_blocks(np.random.default_rng(10), PAIRS["none"])
    case.indices = np.array([[2**32, 1], [1, 2**32 + 2], [3, 4]])
    for name, run in {"jax": run_jax, "torch": run_torch}.items():
        found = run(case, "xla" if (name, backend) == ("jax", "torch") else backend)
        np.testing.assert_array_equal(bits(found[0]), bits(run_oracle(case)[0]), err_msg=name)


def test_no_layout_means_blocks_in_front():
    import torch

    import jaxkv
    import torchkv

    rng = np.random.default_rng(11)
    for shapes in ([(7, 4, 2, 16)] * 2, [(7, 2, 2, 4, 8), (7, 2, 16, 4)], [(7, 4, 2, 40)], [(7, 4, 24)]):
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        tensors = [torch.from_numpy(array.copy()) for array in arrays]
        torchkv.copy_blocks(tensors, torch.tensor([[1, 2], [2, 3]]))
        new = jaxkv.copy_blocks(arrays, [[1, 2], [2, 3]])
        reference.copy_blocks(arrays, [[1, 2], [2, 3]], [0] * len(arrays))
        for got, tensor, want in zip(new, tensors, arrays, strict=True):
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(tensor, want)
