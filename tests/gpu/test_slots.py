"""On a GPU: the slots of new tokens through both frameworks, the oracle's bits; graphs, streams, compilers, errors."""

import numpy as np
import pytest

from tests.cases import gpu
from tests.cases.arrays import to_torch
from tests.cases.gpu import DEVICE, HAS_GPU, captured, needs_gpu
from tests.cases.slots import SlotCase, assert_maps, make_slots, map_jax, map_torch

pytestmark = pytest.mark.gpu

KERNELS = {"jax triton": map_jax, "torch triton": lambda case: map_torch(case, device="cuda")}
PORTABLE = {"jax xla": lambda case: map_jax(case, "xla"), "torch": lambda case: map_torch(case, "torch", "cuda")}
IMPLEMENTATIONS = KERNELS | PORTABLE if HAS_GPU else {"all but the kernels": gpu.slot_mapping}


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_cases(dtype):
    for options in (
        {},
        dict(padding=70),
        dict(query_lens=None, padding=3),
        dict(seq_lens=(2, 0, 5), query_lens=(5, 2, 5)),
    ):
        assert_maps(make_slots(np.random.default_rng(0), block_size=16, dtype=dtype, **options), IMPLEMENTATIONS)
    for starts in ([0, 2, 0, 0], [0, 4, 2, 6], [0, 9, 3, 6], [-3, -1, 2, 6]):  # padded, and out of order
        assert_maps(
            make_slots(np.random.default_rng(1), seq_lens=(5, 9, 19), query_lens=(2, 2, 2), starts=starts, dtype=dtype),
            IMPLEMENTATIONS,
        )


@pytest.mark.parametrize(
    ("num_seqs", "num_tokens"),
    [(1, 8192), (64, 8192), (256, 256), (257, 8190), (1100, 900), (4096, 4096), (64, 524288)],
)
def test_many(num_seqs, num_tokens):
    rng = np.random.default_rng(2)
    starts = np.sort(rng.integers(0, num_tokens, num_seqs + 1)).astype(np.int32)
    tables = rng.integers(-1, 2**20, (num_seqs, 600)).astype(np.int32)
    lens = rng.integers(0, 601 * 16, num_seqs).astype(np.int32)
    assert_maps(SlotCase(tables, starts, lens, 16, num_tokens + 5), IMPLEMENTATIONS)
    starts[[num_seqs // 3, num_seqs // 2]] = num_tokens, 3  # out of order
    assert_maps(SlotCase(tables, starts, lens, 16, num_tokens + 5), IMPLEMENTATIONS)


@pytest.mark.parametrize("block_size", [1, 3, 2**31 - 1])
def test_slots_that_int32_cannot_hold(block_size):
    largest = 2**31 - 1
    blocks = np.array([[largest // block_size + more for more in (-1, 0, 1)]] * 2).clip(max=largest)
    case = SlotCase(blocks, np.array([0, 40, 80]), np.array([3 * min(block_size, 16)] * 2), block_size, 80)
    assert_maps(case, IMPLEMENTATIONS)
    case.block_tables = blocks.astype(np.int32)
    assert_maps(case, IMPLEMENTATIONS)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("given", [False, True])
def test_a_graph_maps_what_lies_there_now(given):
    """One graph of a step is right for all later tables, starts and lengths."""
    import torch

    import torchkv

    cases = [
        make_slots(np.random.default_rng(n), seq_lens=(n, 1, 5, 19), query_lens=query_lens)
        for n, query_lens in ((3, (3, 1, 2, 7)), (1, (0, 1, 5, 7)))
    ]
    columns = min(case.block_tables.shape[1] for case in cases)
    inputs = [
        to_torch(a.copy(), DEVICE)
        for a in (cases[0].block_tables[:, :columns], cases[0].query_start_loc, cases[0].seq_lens)
    ]
    out = torch.full((13,), 7, dtype=torch.int32, device=DEVICE) if given else None
    slots, replay = captured(lambda: torchkv.slot_mapping(*inputs, 4, 13, out=out))
    assert not given or slots is out
    for case in (*cases, cases[0]):
        arrays = case.block_tables[:, :columns], case.query_start_loc, case.seq_lens
        for tensor, array in zip(inputs, arrays, strict=True):
            tensor.copy_(to_torch(array))
        replay()
        np.testing.assert_array_equal(slots.cpu(), SlotCase(*arrays, 4, 13).wanted)


def test_a_capture_cannot_wait_for_the_starts():
    import torch

    import torchkv

    inputs = [torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in ((3, 2), (4,), (3,))]
    assert torchkv.slot_mapping(*inputs, 4).shape == (0,)
    needs_gpu()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(ValueError, match="num_tokens must be given where query_start_loc cannot be read"):
            torchkv.slot_mapping(*inputs, 4)
        torchkv.slot_mapping(*inputs, 4, 6)


def test_what_the_host_reads_is_what_the_stream_has_written():
    import torch

    import torchkv

    case = make_slots(np.random.default_rng(3))
    tables, starts, lens = (to_torch(a, DEVICE) for a in (case.block_tables, case.query_start_loc, case.seq_lens))
    late = starts.clone()
    starts.zero_()
    needs_gpu()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        starts.copy_(late)
        got = torchkv.slot_mapping(tables, starts, lens, 4)
    np.testing.assert_array_equal(got.cpu(), case.wanted)


def test_compiled_by_inductor():
    import torch

    import torchkv

    case = make_slots(np.random.default_rng(4))
    inputs = [to_torch(a, DEVICE) for a in (case.block_tables, case.query_start_loc, case.seq_lens)]
    needs_gpu()
    step = torch.compile(lambda *x: torchkv.slot_mapping(*x, 4, case.num_tokens) + 1, fullgraph=True)
    np.testing.assert_array_equal(step(*inputs).cpu(), case.wanted + 1)


@pytest.mark.gpu_smoke
def test_slots_go_to_a_write_in_jax():
    import jax
    import jax.numpy as jnp

    import jaxkv

    tables, starts, lens = np.array([[3, 1], [0, 2]]), np.array([0, 2, 5]), np.array([6, 3])
    key = np.random.default_rng(5).standard_normal((8, 1, 16), np.float32)
    cache = jaxkv.PagedKVCache.create(num_blocks=4, block_size=4, num_heads=1, head_size=16, dtype="float32")

    def step(cache, key, tables, starts, lens):
        return cache.write(key, key, jaxkv.slot_mapping(tables, starts, lens, 4, len(key)))

    cache = jax.jit(step, donate_argnums=0)(cache, *map(jnp.asarray, (key, tables, starts, lens)))
    got, _ = cache.gather(tables, lens, 6)
    np.testing.assert_array_equal(got[0, 4:], key[:2])
    np.testing.assert_array_equal(got[1, :3], key[2:5])
