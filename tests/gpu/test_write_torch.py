"""On a GPU, torch's half of writing: graphs, streams, compilers, hooks, devices."""

import numpy as np
import pytest

from tests.cases.arrays import make_case, run_oracle, to_torch
from tests.cases.gpu import DEVICE, HAS_GPU, needs_gpu
from tests.cases.gpu_writes import assert_caches

pytestmark = pytest.mark.gpu


def torch_case(**options):
    case = make_case(np.random.default_rng(3), **options)
    return case, [to_torch(a.copy(), DEVICE) for a in (case.key, case.value, *case.caches, case.slot_mapping)]


@pytest.mark.gpu_smoke
def test_cuda_graph():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    want, other = run_oracle(case), make_case(np.random.default_rng(4))
    torchkv.reshape_and_cache_flash(key, value, *caches, torch.full_like(slots, -1))  # compiles
    needs_gpu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    assert_caches(caches, case.caches)  # capture alone writes nothing
    graph.replay()
    assert_caches(caches, want)
    for tensor, array in zip((key, value, slots), (other.key, other.value, other.slot_mapping), strict=True):
        tensor.copy_(to_torch(array))
    graph.replay()
    other.caches = want
    assert_caches(caches, run_oracle(other))


@pytest.mark.gpu_smoke
def test_current_stream():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    want = run_oracle(case)
    torchkv.reshape_and_cache_flash(key, value, *caches, torch.full_like(slots, -1))  # compiles
    late = key.clone()
    key.zero_()
    needs_gpu()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        key.copy_(late)  # on this stream, after the sleep
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
        done = torch.cuda.Event()
        done.record()
    assert not done.query()
    stream.synchronize()
    assert_caches(caches, want)


@pytest.mark.parametrize("offset", [0, 1])
def test_strided_and_unaligned_tensors(offset):
    import torch

    import torchkv

    case = make_case(np.random.default_rng(5), num_heads=2, head_size=64)
    qkv = torch.zeros(7, 8 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)
    key, value = (qkv[:, offset + i : offset + i + 128].unflatten(1, (2, 64)) for i in (256, 384))
    key.copy_(to_torch(case.key))
    value.copy_(to_torch(case.value))
    kv = torch.stack([to_torch(c) for c in case.caches], dim=1).to(DEVICE)
    slots = to_torch(np.repeat(case.slot_mapping, 2), DEVICE)[::2]
    torchkv.reshape_and_cache_flash(key, value, *kv.unbind(1), slots)
    assert_caches(kv.unbind(1), run_oracle(case))


def test_torch_compile_has_no_clone():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    kv, want = torch.stack(caches), run_oracle(case)
    needs_gpu()
    from torch._inductor.utils import run_and_get_code

    @torch.compile(fullgraph=True)
    def step(key, value, kv, slots):
        torchkv.reshape_and_cache_flash(key, value, *kv.unbind(0), slots)
        return key * 2

    _, (code,) = run_and_get_code(step, key, value, kv, slots)
    assert code.count("torchkv.reshape_and_cache_flash") >= 1
    assert "clone" not in code
    assert f"empty_strided_cuda({tuple(kv.shape)}" not in code
    assert_caches(kv.unbind(0), want)


def test_launch_hooks_are_called():
    import triton

    import torchkv

    _, (key, value, *caches, slots) = torch_case()
    seen = []
    hooks = triton.knobs.runtime
    needs_gpu()

    def enter(metadata):
        seen.append(metadata.get()["name"])

    hooks.launch_enter_hook.add(enter)
    try:
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    finally:
        hooks.launch_enter_hook.remove(enter)
    torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    assert seen == ["reshape_and_cache_kernel_flash"]


@pytest.mark.gpu_smoke
def test_layer_tensors_and_scale_tensors():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case(num_layers=3, layer=2, kv_cache_dtype="fp8")
    scales = [torch.tensor([s], device=DEVICE) for s in (case.k_scale, case.v_scale)]
    layer = torch.tensor(2, device=DEVICE)
    torchkv.reshape_and_cache_flash(key, value, *caches, slots, "fp8", *scales, layout=case.layout, layer=layer)
    assert_caches(caches, run_oracle(case))


def test_errors_come_before_the_launch_and_after_a_hit():
    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    want = run_oracle(case)
    with pytest.raises(ValueError, match=r"^value must have shape \(7, 3, 40\), got \(6, 3, 40\)"):
        torchkv.reshape_and_cache_flash(key, value[:6], *caches, slots)
    with pytest.raises(ValueError, match=r"^slot_mapping must have at most num_tokens = 5 entries, got 7"):
        torchkv.reshape_and_cache_flash(key[:5], value[:5], *caches, slots)
    home, elsewhere = ("cuda:0", "cpu") if HAS_GPU else ("cpu", "meta")
    with pytest.raises(ValueError, match=rf"^value_cache must be on device {home}, as key_cache, got {elsewhere}"):
        torchkv.reshape_and_cache_flash(key, value, caches[0], caches[1].to(elsewhere), slots)
    with pytest.raises(ValueError, match=r"^key_cache and value_cache must not overlap in memory"):
        torchkv.reshape_and_cache_flash(key, value, caches[0], caches[0], slots)
    assert_caches(caches, want)


def test_another_current_device():
    import torch

    import torchkv

    case = make_case(np.random.default_rng(6))
    want = run_oracle(case)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)  # JAX may have left another one current
    for device in ("cuda:1", "cuda:0"):
        key, value, *caches, slots = (
            to_torch(a.copy(), device) for a in (case.key, case.value, *case.caches, case.slot_mapping)
        )
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
        assert torch.cuda.current_device() == 0
        assert_caches(caches, want)
