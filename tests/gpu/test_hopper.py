"""The attention kernel for Hopper on a GPU: near the oracle, and the same bits from both frameworks.

The bad shapes come first, one by one, as a fault of a barrier is a hang: run with `-x`, and look at the last name.
Elsewhere than on sm_90, and with a Triton older than 3.8, the same cases run with the other kernels.

A kernel takes its compiler ten seconds and more: cases of the same one run in one process, no option is tried twice.
"""

import numpy as np
import pytest

from kvcore.plan import hopper
from kvcore.plan.attention import plan_attention
from tests.cases.gpu import HAS_GPU, shorter
from tests.cases.gpu_reads import KERNELS, assert_kernels
from tests.cases.hidden import POISONS, assert_as_oracle
from tests.cases.hopper import HEADS, is_for_hopper, plan_of
from tests.cases.reads import make_read

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def short_contexts_too(monkeypatch):
    """Cases are small: plans would keep the other kernel."""
    monkeypatch.setattr(hopper, "SHORT", 0)
    plan_attention.cache_clear()
    yield
    plan_attention.cache_clear()


def read(seed, *, seq_lens, query_lens, dtype="bfloat16", head_size=128, group=4, block_size=16, **options):
    """A case that the kernel for Hopper takes. Query rows of a sequence are `group` for each of its tokens."""
    short = {"seq_lens": shorter(seq_lens, 129), "query_lens": shorter(query_lens, 129)}
    case = make_read(
        np.random.default_rng(seed), dtype=dtype, head_size=head_size, group=group, block_size=block_size, **short,
        **options,
    )  # fmt: skip
    assert is_for_hopper(plan_of(case))
    return case


SHAPES = {  # seq_lens and query_lens; 40 tokens or more of four query heads are many rows
    "whole tiles": dict(seq_lens=(128,), query_lens=(64,)),
    "one row beside many": dict(seq_lens=(1, 128), query_lens=(1, 128)),
    "one page": dict(seq_lens=(16,), query_lens=(16,)),
    "less than a page": dict(seq_lens=(9,), query_lens=(9,)),
    "a tail of one": dict(seq_lens=(129,), query_lens=(65,)),
    "all but one": dict(seq_lens=(127,), query_lens=(63,)),
    "one position": dict(seq_lens=(1,), query_lens=(33,)),
    "no position": dict(seq_lens=(0, 40), query_lens=(40, 40)),
    "no query": dict(seq_lens=(40, 300), query_lens=(0, 300)),
    "one stage": dict(seq_lens=(100,), query_lens=(100,)),
    "two stages": dict(seq_lens=(256,), query_lens=(100,)),
    "three tiles": dict(seq_lens=(384,), query_lens=(384,)),
    "mixed": dict(seq_lens=(700, 1, 300, 333, 129), query_lens=(200, 1, 0, 333, 1), padding=3),
    "more queries than positions": dict(seq_lens=(20, 5), query_lens=(50, 40)),
    "long": dict(seq_lens=(3001, 5000), query_lens=(40, 700), num_heads=1),
    "splits": dict(seq_lens=(5000,), query_lens=(40,), num_heads=1),
}


@pytest.mark.gpu_smoke
@pytest.mark.xdist_group("hopper shapes")
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    assert_kernels(read(1, **SHAPES[shape]))


MEANINGS = {
    "not causal": dict(causal=False),
    "window": dict(sliding_window=100),
    "short window": dict(sliding_window=5),
    "window of one": dict(sliding_window=1),
    "window of a tile": dict(sliding_window=128),
    "window beyond a tile": dict(sliding_window=129),
    "window of two pages": dict(sliding_window=32),
    "longest window": dict(sliding_window=2**31 - 2),
    "cap": dict(soft_cap=1.5),
    "scale": dict(scale=0.7),
    "negative scale": dict(scale=-0.7),
    "scale of zero": dict(scale=0.0),
    "all": dict(sliding_window=70, soft_cap=3.0, scale=1.1),
}


@pytest.mark.parametrize("meaning", MEANINGS)
def test_meanings(meaning):
    case = read(2, seq_lens=(700, 50, 129), query_lens=(150, 50, 1), **MEANINGS[meaning])
    if meaning in ("not causal", "short window", "all"):
        case.options["sinks"] = np.random.default_rng(3).standard_normal(8).astype(np.float32)
    assert_kernels(case)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("head_sizes", HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_heads(head_sizes, dtype):
    head_size, head_size_v = head_sizes
    meanings = dict(), dict(causal=False), dict(sliding_window=90, soft_cap=2.0)
    for seed, options in enumerate(meanings if dtype == "bfloat16" else meanings[-1:]):
        case = read(
            seed, dtype=dtype, head_size=head_size, head_size_v=head_size_v, seq_lens=(500, 70), query_lens=(130, 70),
            **options,
        )  # fmt: skip
        assert_kernels(case)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16, 71])
def test_groups(group):
    assert_kernels(read(4, group=group, num_heads=2, seq_lens=(300, 100), query_lens=(150, 90)))


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 48, 64, 128, 200, 256])
def test_block_sizes(block_size):
    for options in ({}, dict(sliding_window=block_size + 3)) if block_size in (8, 48, 256) else ({},):
        assert_kernels(read(5, block_size=block_size, seq_lens=(450, 77), query_lens=(140, 77), **options))


LAYOUTS = ("NHD", "HND", "PALLAS", "KV_NHD", "BLOCK_KV_NHD", "BLOCK_KV_HND", "PACKED_NHD", "PACKED_HND", "INTERLEAVED")


@pytest.mark.parametrize(
    ("layout", "layer"), [(layout, None) for layout in LAYOUTS] + [("NHD", 1), ("KV_NHD", 1), ("PACKED_HND", 1)]
)
def test_layouts(layout, layer):
    case = read(
        6, layout=layout, num_layers=None if layer is None else 3, layer=layer, seq_lens=(300, 77), query_lens=(140, 77)
    )
    assert_kernels(case)


@pytest.mark.parametrize("causal", [True, False])
def test_holes_in_block_tables(causal):
    for block_size in (16, 64):
        case = read(7, block_size=block_size, seq_lens=(700, 300), query_lens=(200, 300), causal=causal)
        for entry, hole in ((0, -1), (2, 10_000), (3, -(2**31)), (4, 2**31 - 1)):
            case.block_tables[:, min(entry, case.block_tables.shape[1] - 1)] = hole
        assert_kernels(case)


def test_layers_in_memory_that_exist_and_that_do_not():
    for layer in (1, 2, -1):
        case = read(8, num_layers=2, layer=1, seq_lens=(300,), query_lens=(100,))
        case.options["layer"] = np.array(layer, np.int32)
        if layer == 1:
            want = read(8, num_layers=2, layer=1, seq_lens=(300,), query_lens=(100,))
            assert_kernels(want)
        for run in KERNELS.values() if HAS_GPU else ():
            out, lse = run(case)
            assert (out.tobytes() == run(want)[0].tobytes()) if layer == 1 else not out.any() and np.isneginf(lse).all()


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("name", ["NaN", "infinity", "minus infinity", "NaN in K", "infinity in K"])
@pytest.mark.parametrize(
    "head_size", [pytest.param(n, marks=pytest.mark.xdist_group(f"hopper hidden {n}")) for n in (64, 128, 256)]
)
def test_hidden_values_touch_nothing(name, head_size):
    """Poison in the last position but one, which only the last two tokens see."""
    for lengths in (
        dict(seq_lens=(300, 129), query_lens=(100, 129)),
        dict(seq_lens=(300, 257), query_lens=(60, 90), sliding_window=40),
    ):
        case = read(9, head_size=head_size, num_heads=1, **lengths)
        for table, length in zip(case.block_tables, case.seq_lens, strict=True):
            poison, _ = POISONS[name]
            poison(case, (int(table[(length - 2) // 16]), int(length - 2) % 16))
        assert_as_oracle(case, KERNELS if HAS_GPU else {})


def test_poison_in_the_first_position_of_a_window():
    """What a window has passed lies in the same page as what it has not."""
    case = read(10, num_heads=1, seq_lens=(300,), query_lens=(50,), sliding_window=20)
    hidden_from_all = int(case.seq_lens[0] - case.query_start_loc[1]) - 19
    for n in range(hidden_from_all + 5):
        case.caches[1][int(case.block_tables[0, n // 16]), n % 16] = np.nan
    assert_as_oracle(case, KERNELS if HAS_GPU else {})


def test_index_types():
    case = read(11, seq_lens=(300, 129), query_lens=(100, 129))
    case.block_tables, case.seq_lens = case.block_tables.astype(np.int64), case.seq_lens.astype(np.int64)
    case.query_start_loc = case.query_start_loc.astype(np.int64)
    if HAS_GPU:  # JAX has no such integers by default
        from tests.cases.reads import assert_near_oracle

        assert_near_oracle(case, {"torch triton": KERNELS["torch triton"]})


def test_strided_torch_tensors():
    """A slice of a fused projection, and a cache that is a part of a larger one."""
    import torch

    import torchkv

    device = "cuda" if HAS_GPU else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16)

    fused, cache = normal(100, 12, 128), normal(2, 40, 16, 4, 128)
    query, caches = fused[:, :8], (cache[0, :, :, 1:3], cache[1, :, :, 2:])
    tables = torch.randperm(40, device=device, generator=generator).view(2, 20).int()
    lens, starts = (torch.tensor(x, device=device, dtype=torch.int32) for x in ([300, 129], [0, 40, 100]))
    out = torchkv.paged_attention(query, caches, tables, lens, query_start_loc=starts)
    copies = tuple(c.contiguous() for c in caches)
    assert torch.equal(out, torchkv.paged_attention(query.contiguous(), copies, tables, lens, query_start_loc=starts))
    assert out.abs().max() > 0


def test_the_same_bits_each_time():
    """A race would show as bits that differ from launch to launch."""
    case = read(12, seq_lens=(2000, 1500, 3000), query_lens=(500, 1500, 300), num_heads=8)
    results = {run(case)[0].tobytes() for run in [KERNELS["torch triton"]] * 10} if HAS_GPU else {b""}
    assert len(results) == 1
