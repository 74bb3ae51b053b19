"""On a GPU: `rope_and_cache` of both frameworks against the oracle, many tokens, a graph, in place, views."""

import numpy as np
import pytest

from tests.cases.arrays import from_torch, random_normal, to_torch
from tests.cases.gpu import DEVICE, HAS_GPU, captured, needs_gpu
from tests.cases.jax_ropes import assert_same, call_jax
from tests.cases.rope import CASES, MAX_POSITION, RopeCase, run_oracle, table

pytestmark = pytest.mark.gpu

FEW = [CASES[0], *(case for case in CASES if case.name in ("MLA, fp8_ds_mla", "nvfp4"))]
ALL = [pytest.param(case, id=str(case), marks=pytest.mark.gpu_smoke if case in FEW else ()) for case in CASES]


def run_torch(call, **options):
    """The new query, and the caches as they are then."""
    import torchkv

    caches = [to_torch(cache.copy(), DEVICE) for cache in call.caches]
    query = call(torchkv.rope_and_cache, lambda array: to_torch(array, DEVICE), caches, **options)
    return [from_torch(tensor) for tensor in (query, *caches)]


@pytest.mark.parametrize("case", ALL)
def test_torch(case):
    call = case.make()
    assert_same(run_torch(call), run_oracle(call))


@pytest.mark.parametrize("case", ALL)
def test_jax(case):
    import jax

    call = case.make()
    want = run_oracle(call)
    needs_gpu()  # XLA's bits on a CPU have tests of their own
    with jax.enable_x64(case.integers == "int64"):
        assert_same(call_jax(call), want)


@pytest.mark.parametrize("rope", ["neox", "gptj"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_many_tokens(rope, kv_cache_dtype):
    """So many that programs have other tiles; heads of 128, of which all or a part is rotated."""
    tokens = 1500 if HAS_GPU else 20
    blocks = -(-tokens // 8)
    for rotary_dim, norm in ((128, "bfloat16"), (32, None)):
        case = RopeCase(
            "many", head_size=128, num_tokens=tokens, num_q_heads=6, rope=rope, rotary_dim=rotary_dim, q_weights=norm,
            k_weights=norm, kv_cache_dtype=kv_cache_dtype, slots=tuple(range(min(tokens, 40))),
        )  # fmt: skip
        call = case.make()
        call.caches = [np.resize(cache, (blocks, *cache.shape[1:])) for cache in call.caches]
        call.slot_mapping = np.random.default_rng(0).permutation(blocks * 8)[:tokens]
        want = run_oracle(call)
        assert_same(run_torch(call), want)
        if HAS_GPU:
            assert_same(call_jax(call), want)


def test_in_place():
    """The rotated query may take the place of query, whatever its head size."""
    import torchkv

    for head_size in (16, 128, 512):
        call = RopeCase("in place", head_size=head_size, num_tokens=64, num_q_heads=3).make()
        want = run_oracle(call)
        caches = [to_torch(cache.copy(), DEVICE) for cache in call.caches]
        query = to_torch(call.query.copy(), DEVICE)

        def rotate(_, *arrays, query=query, **options):
            return torchkv.rope_and_cache(query, *arrays, out=query, **options)

        out = call(rotate, lambda array: to_torch(array, DEVICE), caches)
        assert out.data_ptr() == query.data_ptr()
        assert_same([from_torch(t) for t in (query, *caches)], want)


def test_graph():
    """A CUDA graph rotates for the positions, and writes to the slots, that the tensors hold when it is replayed."""
    import torch

    import torchkv

    rng = np.random.default_rng(0)
    query, key, value = (to_torch(random_normal(rng, (2, heads, 16), "bfloat16"), DEVICE) for heads in (4, 2, 2))
    caches = tuple(torch.full((4, 8, 2, 16), 9, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    positions, slots = (torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2))
    cos_sin = to_torch(table(16), DEVICE)
    slots.fill_(-1)
    out, replay = captured(lambda: torchkv.rope_and_cache(query, key, value, caches, positions, cos_sin, slots))
    positions.copy_(torch.tensor([3, MAX_POSITION - 1]))
    slots.copy_(torch.tensor([9, 30]))
    replay()
    again = tuple(torch.full_like(cache, 9) for cache in caches)
    assert torch.equal(out, torchkv.rope_and_cache(query, key, value, again, positions, cos_sin, slots))
    assert all(map(torch.equal, caches, again))


def test_views_in_jax():
    """Views of a projection are the same as slices of it, in each kind."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    rng = np.random.default_rng(1)
    grouped = jnp.asarray(random_normal(rng, (5, 2, 5, 16), "bfloat16"))
    caches = tuple(jnp.full((4, 8, 2, 16), 9, jnp.bfloat16) for _ in range(2))
    rest = jnp.arange(5), jnp.asarray(table(16)), jnp.array([9, -1, 30, 0, 31])
    views = [jaxkv.heads(grouped, *part) for part in ((0, 3), (3, 4), (4, 5))]
    slices = [grouped[:, :, :3].reshape(5, 6, 16), grouped[:, :, 3], grouped[:, :, 4]]
    backend = None if HAS_GPU else "xla"
    got, want = (
        jax.jit(lambda *rows: jaxkv.rope_and_cache(*rows, caches, *rest, backend=backend))(*rows)
        for rows in (views, slices)
    )
    assert_same(got, want)
