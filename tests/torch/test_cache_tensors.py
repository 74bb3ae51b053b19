"""What tensors a `PagedKVCache` has: its own, wherever they go."""

import re

import pytest
import torch

from torchkv import PagedKVCache

SIZES = {"num_blocks": 4, "block_size": 2, "num_heads": 2, "head_size": 8, "dtype": torch.float32}


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5, 0.25])], ids=["one", "of heads"])
def test_scales_are_copies(scale):
    """Else loading a state would change what the caller passed, and v_scale with k_scale."""
    given = scale.clone()
    cache = PagedKVCache.create(**SIZES, kv_cache_dtype="int8", k_scale=scale, v_scale=scale)
    other = PagedKVCache.create(**SIZES, kv_cache_dtype="int8", k_scale=scale * 2, v_scale=scale * 3)
    cache.load_state_dict(other.state_dict())
    assert torch.equal(cache.k_scale, given * 2)
    assert torch.equal(cache.v_scale, given * 3)
    assert torch.equal(scale, given)


def test_a_host_cache_has_scales_of_its_own():
    cache = PagedKVCache.create(**SIZES, kv_cache_dtype="int8", k_scale=0.5, v_scale=0.25)
    host = cache.create_host(num_blocks=2)
    host.k_scale.zero_()
    assert (cache.k_scale.item(), host.v_scale.item(), host.k_scale.device.type) == (0.5, 0.25, "cpu")


@pytest.mark.parametrize("device", [torch.float16, None, torch.zeros(1, dtype=torch.int32)], ids=str)
def test_a_cache_moves_to_devices_only(device):
    cache = PagedKVCache.create(**SIZES)
    with pytest.raises(TypeError, match=re.escape("device must be a torch.device, its name or its index, got ")):
        cache.to(device)
    assert cache.to("cpu") is cache
    assert cache.to(torch.device("meta")).caches[0].is_meta


@pytest.mark.parametrize("state", [None, [], PagedKVCache.create(**SIZES)], ids=["None", "a list", "a cache"])
def test_a_state_is_a_dict(state):
    with pytest.raises(TypeError, match=f"state must be a dict, got {type(state).__name__}"):
        PagedKVCache.create(**SIZES).load_state_dict(state)
