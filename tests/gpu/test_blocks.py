"""On a GPU: copies and zeros of blocks against the oracle, in both frameworks; graphs, streams, offsets past 2³¹."""

import numpy as np
import pytest

from kvcore.plan import blocks as plan
from tests.cases.arrays import LAYOUTS, bits, from_torch, random_bits, to_torch
from tests.cases.blocks import PAIRS, assert_same, make_blocks, moves, run_jax, run_oracle, run_torch
from tests.cases.gpu import DEVICE, HAS_GPU, captured, needs_gpu, params

pytestmark = pytest.mark.gpu


def assert_kernels(case):
    """The kernels of both frameworks leave the oracle's bits; without a GPU, what stands in for them."""
    want = run_oracle(case)
    assert_same(run_torch(case, device=DEVICE), want, "torch")
    assert_same(run_jax(case), want, "jax")


SMOKE = [(name, PAIRS[name]) for name in ("tree", "circle with branches")]


@pytest.mark.parametrize(("name", "pairs"), params(PAIRS.items(), SMOKE), ids=PAIRS)
def test_pairs(name, pairs):
    assert_kernels(make_blocks(np.random.default_rng(0), pairs))


@pytest.mark.gpu_smoke
def test_zeros():
    assert_kernels(make_blocks(np.random.default_rng(1), [3, -1, 0, 7]))


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, num_layers):
    for indices in (PAIRS["circle with branches"], [3, -1, 0, 7]):
        assert_kernels(make_blocks(np.random.default_rng(2), indices, layout=layout, num_layers=num_layers))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_dtypes_and_odd_sizes(dtype):
    rng = np.random.default_rng(3)
    for sizes in ({}, {"head_size": 5, "num_heads": 3, "block_size": 1}, {"head_size": 12, "num_heads": 1}):
        assert_kernels(make_blocks(rng, PAIRS["tree"], cache_dtype=dtype, dtype="float32", **sizes))


def test_scale_caches():
    rng = np.random.default_rng(4)
    for layout in ("NHD", "PACKED_HND"):
        case = make_blocks(rng, PAIRS["tree"], layout=layout, kv_cache_dtype="int8", per_token_head=True, num_layers=2)
        assert_kernels(case)


@pytest.mark.parametrize(
    ("n", "seed"), params([(n, seed) for n in (50, 700, 3000) for seed in range(3)], smoke=((700, 0), (3000, 0)))
)
def test_trees_and_circles_as_they_come(n, seed):
    """Blocks of many slices of many tiles: all programs of a component agree on who copies what."""
    n = n if HAS_GPU else min(n, 70)
    rng = np.random.default_rng(seed)
    num_blocks = n + n // 3
    case = make_blocks(
        rng, moves(rng, num_blocks, n), num_blocks=num_blocks, block_size=16, num_heads=8, head_size=64,
        dtype="float32", cache_dtype="uint8", num_layers=5,
    )  # fmt: skip
    for _ in range(3 if HAS_GPU else 1):
        assert_kernels(case)


@pytest.mark.parametrize("n", [60, 1000, 2500])
@pytest.mark.parametrize("way", ["forward", "backward", "shuffled", "round"])
def test_long_chains(n, way):
    """Every block moves on by one: each program copies a part of all blocks, one after the other."""
    n = n if HAS_GPU else min(n, 60)
    rng = np.random.default_rng(n)
    pairs = np.stack([np.arange(n), np.arange(1, n + 1)], axis=1)
    if way == "round":
        pairs[-1, 1] = 0
        rng.shuffle(pairs)
    elif way == "shuffled":
        rng.shuffle(pairs)
    elif way == "backward":
        pairs = pairs[::-1]
    case = make_blocks(rng, pairs, num_blocks=n + 1, block_size=16, num_heads=2, head_size=64, num_layers=3)
    assert_kernels(case)


def test_of_two_pairs_with_one_destination_each_element_is_one_of_the_two():
    rng = np.random.default_rng(5)
    pairs = np.stack([rng.integers(0, 300, 300), rng.integers(0, 60, 300)], axis=1)
    case = make_blocks(rng, pairs, num_blocks=300, block_size=16, num_heads=8, head_size=64)
    for got in (run_torch(case, device=DEVICE), run_jax(case)):
        for new, old in zip(map(bits, got), map(bits, case.caches), strict=True):
            for block in range(300):
                sources = {s for s, d in pairs.tolist() if d == block} or {block}
                assert np.any([new[block] == old[s] for s in sources], axis=0).all()


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("n", [4, 2000])
def test_cuda_graph(n):
    import torch

    import torchkv

    rng = np.random.default_rng(6)
    n = n if HAS_GPU else 4
    case = make_blocks(rng, moves(rng, 2 * n, n), num_blocks=2 * n)
    memory = [to_torch(array.copy(), DEVICE) for array in case.memory]
    pairs = to_torch(case.indices, DEVICE)
    kept = pairs.clone()
    pairs.fill_(-1)

    def step():
        torchkv.copy_blocks(memory, pairs)
        return torch.zeros(1, device=DEVICE)

    _, replay = captured(step)
    assert_same(list(map(from_torch, memory)), case.memory)
    pairs.copy_(kept)
    replay()
    want = run_oracle(case)
    assert_same(list(map(from_torch, memory)), want)
    case.caches, case.indices = want, moves(rng, 2 * n, n).astype(np.int32)
    pairs.copy_(to_torch(case.indices))
    replay()
    assert_same(list(map(from_torch, memory)), run_oracle(case))


def test_current_stream():
    import torch

    import torchkv

    case = make_blocks(np.random.default_rng(7), PAIRS["circle"])
    memory = [to_torch(array.copy(), DEVICE) for array in case.memory]
    pairs = to_torch(case.indices, DEVICE)
    late = pairs.clone()
    pairs.fill_(-1)
    torchkv.copy_blocks(memory, pairs)  # compiles
    needs_gpu()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        pairs.copy_(late)
        torchkv.copy_blocks(memory, pairs)
        done = torch.cuda.Event()
        done.record()
    assert not done.query()
    stream.synchronize()
    assert_same(list(map(from_torch, memory)), run_oracle(case))


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("layout", ["NHD", "KV_NHD", "layer block slot head dim"])
def test_offsets_past_two_to_the_31(layout):
    """Of words of eight bytes, too, in the last layer and the value half: 20 GiB."""
    import torch

    import torchkv

    needs_gpu()
    blocks = 20 * 2**30 // (2 * 32768)
    shape = {"KV_NHD": (2, blocks, 16, 8, 128), "NHD": (2 * blocks, 16, 8, 128)}.get(layout, (2, blocks, 16, 8, 128))
    cache = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    caches, pattern = ((cache,), "KV_NHD") if layout == "KV_NHD" else ((cache,), layout.replace("head dim", "head k+v"))
    pattern = "PACKED_NHD" if layout == "NHD" else pattern
    front = (slice(None),) if cache.dim() == 5 else ()
    last = shape[-4] - 1
    data = to_torch(random_bits(np.random.default_rng(8), (*shape[: len(front)], 3, *shape[-3:]), "bfloat16"), "cuda")
    at = torch.tensor([0, last - 1, last], device="cuda")
    cache[(*front, at)] = data
    torchkv.copy_blocks(
        caches, torch.tensor([[0, last], [last, last - 1], [last - 1, 0]], device="cuda"), layout=pattern
    )
    got = cache[(*front, at)].view(torch.int16)
    order = [1, 2, 0]
    assert torch.equal(got, data.view(torch.int16)[(*front, order)])
    torchkv.zero_blocks(caches, torch.tensor([last], device="cuda"), layout=pattern)
    assert not cache[(*front, last)].view(torch.int16).any()
    assert torch.equal(cache[(*front, 0)].view(torch.int16), data.view(torch.int16)[(*front, 1)])


def test_jax_in_place():
    import jax
    import jax.numpy as jnp

    import jaxkv

    case = make_blocks(np.random.default_rng(9), PAIRS["tree"], num_blocks=64)
    step = jax.jit(lambda memory, pairs: jaxkv.copy_blocks(memory, pairs), donate_argnums=0)
    memory = list(map(jnp.asarray, case.memory))
    before = [array.unsafe_buffer_pointer() for array in memory]
    new = step(memory, case.indices)
    assert [array.unsafe_buffer_pointer() for array in new] == before
    assert_same(new, run_oracle(case))


@pytest.mark.parametrize("many", [1024, 1])
def test_jax_vmap(many, monkeypatch):
    import jax
    import jax.numpy as jnp

    import jaxkv

    monkeypatch.setattr(plan, "MANY_PAIRS", many)
    plan.plan_blocks.cache_clear()
    cases = [make_blocks(np.random.default_rng(seed), PAIRS["circle with branches"]) for seed in range(3)]
    for case, shift in zip(cases, range(3), strict=True):
        case.indices = (case.indices + shift) % 7
    batch = [jnp.stack(x) for x in zip(*(case.memory for case in cases), strict=True)]
    got = jax.jit(jax.vmap(jaxkv.copy_blocks))(batch, jnp.stack([jnp.asarray(case.indices) for case in cases]))
    assert_same(got, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])
    plan.plan_blocks.cache_clear()
