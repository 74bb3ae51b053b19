"""The MLA kernel for Hopper on a GPU: near the oracle, and the same bits from both frameworks. See test_hopper.py.

A kernel takes its compiler ten seconds and more: cases of the same one run in one process, no option is tried twice.
"""

import numpy as np
import pytest

from tests.cases.gpu import HAS_GPU, shorter
from tests.cases.gpu_reads import KERNELS, assert_kernels
from tests.cases.hidden import assert_as_oracle
from tests.cases.hopper import plan_of
from tests.cases.reads import make_read

pytestmark = pytest.mark.gpu


def read(seed, *, seq_lens, query_lens=None, heads=128, dtype="bfloat16", block_size=64, **options):
    """A case that the MLA kernel for Hopper takes. Without query_lens, sequences have one query token each."""
    query_lens = None if query_lens is None else shorter(query_lens, 9)
    case = make_read(
        np.random.default_rng(seed), layout="MLA", dtype=dtype, head_size=576, head_size_v=512, group=heads,
        block_size=block_size, seq_lens=shorter(seq_lens, 129), query_lens=query_lens, **options,
    )  # fmt: skip
    assert plan_of(case).attend.name == "hopper_mla_kernel"
    return case


SHAPES = {
    "one position": dict(seq_lens=(1,)),
    "a pair of blocks": dict(seq_lens=(128,)),
    "one block": dict(seq_lens=(64,)),
    "less than a page": dict(seq_lens=(9,)),
    "a tail of one": dict(seq_lens=(129,)),
    "a tail of one in the second block": dict(seq_lens=(193,)),
    "all but one": dict(seq_lens=(127,)),
    "two pairs": dict(seq_lens=(256,)),
    "three pairs": dict(seq_lens=(384,)),
    "no position": dict(seq_lens=(0, 40)),
    "many": dict(seq_lens=(700, 1, 300, 333, 129, 64, 1000)),
    "splits": dict(seq_lens=(5000, 100)),
    "ragged, one token each": dict(seq_lens=(700, 1, 300), query_lens=(1, 1, 1)),
    "ragged": dict(seq_lens=(700, 1, 300, 333, 129), query_lens=(4, 1, 0, 3, 2), padding=3),
    "more queries than positions": dict(seq_lens=(2, 5), query_lens=(5, 9)),
    "a prompt": dict(seq_lens=(300,), query_lens=(100,), heads=16),
}


def shapes():
    for block_size in (16, 64):
        for name, options in SHAPES.items():
            kernel = f"mla {block_size} {'query_lens' in options} {name in ('splits', 'a prompt') and name}"
            yield pytest.param(name, block_size, marks=pytest.mark.xdist_group(kernel))


@pytest.mark.gpu_smoke
@pytest.mark.parametrize(("shape", "block_size"), shapes())
def test_shapes(shape, block_size):
    assert_kernels(read(1, block_size=block_size, **SHAPES[shape]))


MEANINGS = {
    "not causal": dict(causal=False),
    "window": dict(sliding_window=100),
    "short window": dict(sliding_window=5),
    "window of one": dict(sliding_window=1),
    "window of a block": dict(sliding_window=64),
    "window beyond a pair": dict(sliding_window=129),
    "longest window": dict(sliding_window=2**31 - 2),
    "cap": dict(soft_cap=1.5),
    "scale": dict(scale=0.7),
    "negative scale": dict(scale=-0.1),
    "scale of zero": dict(scale=0.0),
    "all": dict(sliding_window=70, soft_cap=3.0, scale=1.1),
}


@pytest.mark.parametrize("meaning", MEANINGS)
def test_meanings(meaning):
    options = dict(MEANINGS[meaning])
    if meaning in ("not causal", "all", "short window"):
        options["sinks"] = np.random.default_rng(3).standard_normal(16).astype(np.float32)
    assert_kernels(read(2, heads=16, seq_lens=(700, 50, 129), query_lens=(4, 2, 1), **options))


@pytest.mark.parametrize("meaning", ["short window", "window of a block", "window beyond a pair", "cap", "all"])
def test_meanings_of_one_token_each(meaning):
    assert_kernels(read(2, heads=16, seq_lens=(700, 50, 129), **MEANINGS[meaning]))


@pytest.mark.gpu_smoke
@pytest.mark.parametrize(("heads", "dtype"), [(1, "bfloat16"), (16, "float16"), (40, "bfloat16"), (128, "float16")])
@pytest.mark.parametrize("query_lens", [None, (4, 2)])
def test_heads(heads, dtype, query_lens):
    assert_kernels(read(4, heads=heads, dtype=dtype, seq_lens=(500, 70), query_lens=query_lens))


@pytest.mark.parametrize("block_size", [8, 24, 32, 48, 128, 256])
def test_block_sizes(block_size):
    window = dict(sliding_window=block_size + 3) if block_size in (24, 256) else {}
    assert_kernels(read(5, heads=16, block_size=block_size, seq_lens=(450, 77), query_lens=(3, 2), **window))


def test_layers():
    assert_kernels(read(6, heads=16, num_layers=3, layer=1, seq_lens=(300, 77)))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("query_lens", [None, (3, 2)])
def test_holes_in_block_tables(block_size, query_lens):
    case = read(7, block_size=block_size, seq_lens=(700, 300), query_lens=query_lens)
    for entry, hole in ((0, -1), (2, 10_000), (3, -(2**31)), (4, 2**31 - 1)):
        case.block_tables[:, min(entry, case.block_tables.shape[1] - 1)] = hole
    assert_kernels(case)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=pytest.mark.xdist_group(f"mla hidden {options}"))
        for options in ({}, dict(sliding_window=40), dict(soft_cap=2.0))
    ],
)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [1, 400, 575])
def test_hidden_values_touch_nothing(number, column, options):
    """Poison in the last position but one, which only the last two tokens see."""
    case = read(9, heads=16, seq_lens=(300, 129, 257), query_lens=(4, 3, 4), **options)
    for table, length in zip(case.block_tables, case.seq_lens, strict=True):
        case.caches[0][int(table[(length - 2) // 64]), int(length - 2) % 64, column] = number
    assert_as_oracle(case, KERNELS if HAS_GPU else {})


def test_poison_in_the_first_position_of_a_window():
    """What a window has passed lies in the same page as what it has not."""
    case = read(10, heads=16, seq_lens=(300,), query_lens=(4,), sliding_window=20)
    for n in range(int(case.seq_lens[0]) - 4 - 19):
        case.caches[0][int(case.block_tables[0, n // 64]), n % 64] = np.nan
    assert_as_oracle(case, KERNELS if HAS_GPU else {})


def test_the_same_bits_each_time():
    """A race would show as bits that differ from launch to launch."""
    case = read(12, seq_lens=(2000, 1500, 3000, 4000) * 8)
    results = {run(case)[0].tobytes() for run in [KERNELS["torch triton"]] * 10} if HAS_GPU else {b""}
    assert len(results) == 1
