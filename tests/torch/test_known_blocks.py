"""Calls like earlier ones that move blocks are launched without torch's dispatcher: seen on CPU tensors."""

import numpy as np
import pytest
import torch

import torchkv
from kvcore.plan import blocks as plan
from tests.cases.arrays import bits, from_torch, to_torch
from tests.cases.blocks import PAIRS, make_blocks, run_oracle
from tests.cases.torch_known import versions

KINDS = {
    "two arrays": {}, "one array": {"layout": "PACKED_HND"}, "layers": {"num_layers": 2},
    "scales": {"kv_cache_dtype": "int8", "per_token_head": True},
}  # fmt: skip


def check(memory, case):
    for tensor, want in zip(memory, run_oracle(case), strict=True):
        np.testing.assert_array_equal(bits(from_torch(tensor)), bits(want))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_pairs_of_any_number(options, seen):
    for pairs, dispatched in (("swap", 1), ("swap", 0), ("tree", 0), ("none", 0), ("circle", 0)):
        case = make_blocks(np.random.default_rng(0), PAIRS[pairs], **options)
        memory = [to_torch(array.copy()) for array in case.memory]  # others each time
        before = versions(memory)
        case.call(torchkv, memory, to_torch(case.indices))
        assert seen.ways() == (dispatched, int(pairs != "none"))
        assert dispatched or all(new > old for new, old in zip(versions(memory), before, strict=True))
        check(memory, case)
    assert len(seen.compiled) == 1


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_zeros(options, seen):
    for blocks, dispatched in (([1, 5], 1), ([3, -1, 6], 0), ([0], 0)):
        case = make_blocks(np.random.default_rng(1), blocks, **options)
        memory = [to_torch(array.copy()) for array in case.memory]
        case.call(torchkv, memory, to_torch(case.indices))
        assert seen.ways() == (dispatched, 1)
        check(memory, case)
    assert len(seen.compiled) == 1


def test_more_pairs_have_another_plan(seen, monkeypatch):
    """Each class is compiled once, and none takes another's place; from many on, two kernels are started."""
    monkeypatch.setattr(plan, "FEW_PAIRS", 2)
    monkeypatch.setattr(plan, "MANY_PAIRS", 4)
    plan.plan_blocks.cache_clear()
    for pairs, ways in (("swap", (1, 1)), ("circle", (1, 1)), ("tree", (1, 2)), ("swap", (0, 1)), ("tree", (0, 2))):
        case = make_blocks(np.random.default_rng(2), PAIRS[pairs])
        memory = [to_torch(array.copy()) for array in case.memory]
        case.call(torchkv, memory, to_torch(case.indices))
        assert seen.ways() == ways
        check(memory, case)
    assert len(seen.compiled) == 4
    plan.plan_blocks.cache_clear()


def test_alignment_and_overlap_are_asked_each_time(seen):
    case = make_blocks(np.random.default_rng(3), PAIRS["tree"], cache_dtype="uint8", dtype="float32")
    for offset, dispatched in ((0, 1), (1, 1), (0, 0), (1, 1)):  # only aligned ones are known
        buffers = [torch.zeros(case.caches[0].size + 16, dtype=torch.uint8)[offset:] for _ in range(2)]
        memory = [buffer[: cache.size].view(cache.shape) for buffer, cache in zip(buffers, case.caches, strict=True)]
        for tensor, cache in zip(memory, case.caches, strict=True):
            tensor.copy_(to_torch(cache))
        assert [tensor.data_ptr() % 16 for tensor in memory] == [offset, offset]
        case.call(torchkv, memory, to_torch(case.indices))
        assert seen.ways() == (dispatched, 1)
        check(memory, case)
    words = [kernel.constexprs["FIRST"].word for kernel, _ in seen.compiled]
    assert words == [8, 1]
    whole = torch.zeros(8, 4, 2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^key_cache and value_cache must not overlap in memory$"):
        torchkv.copy_blocks((whole[:7], whole[1:]), torch.tensor([[1, 2]], dtype=torch.int32))
    assert seen.ways()[1] == 0
