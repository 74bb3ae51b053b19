"""On a GPU: blocks swapped to pinned memory and back against the oracle; graphs, streams, lifetimes."""

import numpy as np
import pytest

from tests.cases.arrays import LAYOUTS, bits, from_torch, to_torch
from tests.cases.blocks import assert_same
from tests.cases.gpu import DEVICE, HAS_GPU, captured, needs_gpu, params
from tests.cases.swaps import PAIRS, make_swap, run_jax, run_oracle, run_torch

pytestmark = pytest.mark.gpu

SIDES = pytest.mark.parametrize("host", ["source", "destination", None])


def assert_kernels(case, host):
    """The kernels of both frameworks leave the oracle's bits; without a GPU, what stands in for them."""
    want = run_oracle(case)
    assert_same(run_torch(case, device=DEVICE, host=host), want, "torch")
    assert_same(run_jax(case, host=host), want, "jax")


def caches(case, host):
    """Tensors of source, of destination, and pairs; of one side in pinned memory."""
    sides = []
    for name, side in (("source", case.source), ("destination", case.destination)):
        memory = [to_torch(array.copy(), "cpu" if name == host else DEVICE) for array in side.memory]
        sides.append([t.pin_memory() if name == host and HAS_GPU else t for t in memory])
    return *sides, to_torch(case.pairs.copy(), DEVICE)


@SIDES
@pytest.mark.parametrize(("name", "pairs"), params(PAIRS.items(), [("no blocks", PAIRS["no blocks"])]), ids=PAIRS)
def test_pairs(name, pairs, host):
    assert_kernels(make_swap(np.random.default_rng(0), pairs), host)


@SIDES
@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, num_layers, host):
    assert_kernels(make_swap(np.random.default_rng(1), PAIRS["no blocks"], layout=layout, num_layers=num_layers), host)


@SIDES
@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_dtypes_and_odd_sizes(dtype, host):
    rng = np.random.default_rng(2)
    for sizes in ({}, {"head_size": 5, "num_heads": 3, "block_size": 1}, {"head_size": 12, "num_heads": 1}):
        assert_kernels(make_swap(rng, PAIRS["apart"], cache_dtype=dtype, dtype="float32", **sizes), host)


@SIDES
def test_scale_caches(host):
    rng = np.random.default_rng(3)
    for layout in ("NHD", "PACKED_HND"):
        options = {"layout": layout, "kv_cache_dtype": "int8", "per_token_head": True, "num_layers": 2}
        assert_kernels(make_swap(rng, PAIRS["apart"], **options), host)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("n", [700, 3000])
def test_many_blocks_there_and_back(n):
    """Of many slices, by caches' methods: each block comes back as it was, to another place."""
    import torch

    import torchkv

    n = n if HAS_GPU else 20
    rng = np.random.default_rng(4)
    extents = {"block_size": 16, "num_heads": 8, "head_size": 64, "num_layers": 3, "kv_cache_dtype": "int8"}
    cache = torchkv.PagedKVCache.create(num_blocks=n, per_token_head=True, device=DEVICE, **extents)
    host = cache.create_host(num_blocks=2 * n)
    assert host.caches[0].is_cpu
    assert host.caches[0].is_pinned() == HAS_GPU
    for tensor in cache._memory:
        tensor.view(torch.uint8).random_(0, 255)
    before = [tensor.clone() for tensor in cache._memory]
    here, there, back = rng.permutation(n), rng.permutation(2 * n)[:n], rng.permutation(n)
    cache.swap_blocks(host, torch.from_numpy(np.stack([here, there], axis=1)).to(DEVICE))
    cache.zero_blocks(torch.arange(n, device=DEVICE))
    host.swap_blocks(cache, torch.from_numpy(np.stack([there, back], axis=1)).to(DEVICE))
    for new, old in zip(cache._memory, before, strict=True):
        assert torch.equal(new[:, back].view(torch.uint8), old[:, here].view(torch.uint8))


@pytest.mark.gpu_smoke
def test_a_cache_of_jax_is_updated_in_place():
    """In device and in pinned memory, under jit with donation."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    cache = jaxkv.PagedKVCache.create(num_blocks=40, block_size=16, num_heads=8, head_size=64, num_layers=2)
    host = cache.create_host(num_blocks=90)
    assert {a.sharding.memory_kind for a in host.caches} == {"pinned_host"}
    rows = jax.random.normal(jax.random.key(0), (640, 8, 64), jnp.bfloat16)
    cache = cache.write(rows, -rows, jnp.arange(640), layer=1)
    want = [np.array(a) for a in cache.caches]  # copies: what NumPy refers to is not donated
    swap = jax.jit(jaxkv.PagedKVCache.swap_blocks, donate_argnums=1)
    host = swap(cache, host, jnp.full((40, 2), -1))  # on a CPU, what create_host made may be memory of NumPy's
    before = [a.unsafe_buffer_pointer() for a in (*host.caches, *cache.caches)]
    pairs = np.stack([np.arange(40), np.random.default_rng(5).permutation(90)[:40]], axis=1)
    host = swap(cache, host, jnp.asarray(pairs))
    assert {a.sharding.memory_kind for a in host.caches} == {"pinned_host"}
    for got, old in zip(host.caches, want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(got)[:, pairs[:, 1]]), bits(old[:, pairs[:, 0]]))
    moved = np.stack([pairs[:, 1], np.roll(pairs[:, 0], 1)], axis=1)
    cache = swap(host, cache, jnp.asarray(moved))
    assert [a.unsafe_buffer_pointer() for a in (*host.caches, *cache.caches)] == before
    for got, old in zip(cache.caches, want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(got)[:, moved[:, 1]]), bits(old[:, pairs[:, 0]]))


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("host", ["source", "destination"])
def test_cuda_graph(host):
    """Pairs that change from replay to replay."""
    import torch

    import torchkv

    case = make_swap(np.random.default_rng(6), PAIRS["apart"])
    source, destination, pairs = caches(case, host)
    kept = pairs.clone()
    pairs.fill_(-1)

    def step():
        torchkv.swap_blocks(source, destination, pairs)
        return torch.zeros(1, device=DEVICE)

    _, replay = captured(step)
    pairs.copy_(kept)
    replay()
    if HAS_GPU:
        torch.cuda.synchronize()
    want = run_oracle(case)
    assert_same(list(map(from_torch, destination)), want)
    case.destination.caches, case.source.indices = want, np.array([[1, 8], [-1, 0], [4, 4]], np.int32)
    pairs.copy_(to_torch(case.pairs))
    replay()
    if HAS_GPU:
        torch.cuda.synchronize()
    assert_same(list(map(from_torch, destination)), run_oracle(case))


@pytest.mark.parametrize("host", ["source", "destination"])
def test_nothing_is_synchronised(host):
    """On the current stream, behind what is under way there; calls that are known, too."""
    import torch

    import torchkv

    case = make_swap(np.random.default_rng(7), PAIRS["apart"])
    source, destination, pairs = caches(case, host)
    late = pairs.clone()
    pairs.fill_(-1)
    torchkv.swap_blocks(source, destination, pairs)  # compiles
    needs_gpu()
    for _ in range(2):
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            pairs.copy_(late)
            torchkv.swap_blocks(source, destination, pairs)
            done = torch.cuda.Event()
            done.record()
        assert not done.query()
        stream.synchronize()
        assert_same(list(map(from_torch, destination)), run_oracle(case))


def test_pinned_memory_lives_until_the_stream_is_done():
    """Nobody refers to the source any longer, and torch must not hand it out to others before it was read."""
    import torch

    import torchkv

    needs_gpu()
    caches = [torch.zeros(64, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    pairs = torch.arange(64, device="cuda").repeat(2, 1).T.contiguous()
    source = [torch.ones(64, 16, 8, 128, dtype=torch.bfloat16).pin_memory() for _ in range(2)]
    torchkv.swap_blocks(source, caches, pairs)  # compiles
    for cache in caches:
        cache.zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    torchkv.swap_blocks(source, caches, pairs)
    addresses = {tensor.data_ptr() for tensor in source}
    del source
    others = [torch.empty(64, 16, 8, 128, dtype=torch.bfloat16, pin_memory=True) for _ in range(4)]
    assert not addresses & {tensor.data_ptr() for tensor in others}
    for tensor in others:
        tensor.fill_(7)
    torch.cuda.synchronize()
    assert all((cache == 1).all() for cache in caches)


@pytest.mark.parametrize("host", ["source", "destination"])
def test_pageable_memory_is_refused(host):
    """Also in calls like one that was launched."""
    import torch

    import torchkv

    needs_gpu()
    case = make_swap(np.random.default_rng(8), PAIRS["apart"])
    source, destination, pairs = caches(case, host)
    for again in range(2):
        paged = [tensor.clone() for tensor in (source if host == "source" else destination)]
        sides = (paged, destination) if host == "source" else (source, paged)
        with pytest.raises(ValueError, match=f"{host}'s key_cache must be in pinned memory, which cuda:0 can reach"):
            torchkv.swap_blocks(*sides, pairs)
        if not again:
            torchkv.swap_blocks(source, destination, pairs)
    torch.cuda.synchronize()
    torchkv.swap_blocks(*sides, pairs, backend="torch")  # torch's own copies can


@pytest.mark.xdist_group("large")
def test_offsets_past_two_to_the_31():
    """Of words of eight bytes, too, on the device and in pinned memory: 20 GiB each."""
    import torch

    import torchkv

    needs_gpu()
    blocks, sizes = 20 * 2**30 // 32768, (16, 8, 128)
    cache = torch.empty((blocks, *sizes), dtype=torch.bfloat16, device="cuda")
    host = torch.empty((blocks, *sizes), dtype=torch.bfloat16, pin_memory=True)
    data = torch.randn((2, *sizes), device="cuda").to(torch.bfloat16)
    cache[0], cache[-1] = data
    torchkv.swap_blocks(
        cache, host, torch.tensor([[0, blocks - 1], [blocks - 1, 1]], device="cuda"), layout="PACKED_NHD"
    )
    torchkv.swap_blocks(
        host, cache, torch.tensor([[blocks - 1, blocks - 2], [1, 3]], device="cuda"), layout="PACKED_NHD"
    )
    assert torch.equal(cache[blocks - 2], data[0])
    assert torch.equal(cache[3], data[1])
    assert torch.equal(host[blocks - 1].cuda(), data[0])
