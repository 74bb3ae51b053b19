"""Under torch.autocast ops compute what they compute elsewhere: as kernels do, in the dtypes that they are given."""

import pytest
import torch

import torchkv

FORMATS = {
    "auto": {},
    "int8": {"kv_cache_dtype": "int8", "per_token_head": True},
    "fp8": {"kv_cache_dtype": "fp8", "k_scale": 0.1, "v_scale": 0.2},
}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_results_are_the_same(options, autocast):
    torch.manual_seed(0)
    query, (key, value) = torch.randn(10, 4, 16), torch.randn(2, 10, 2, 16)
    block_tables, seq_lens, starts = torch.tensor([[3, 1, 5]]), torch.tensor([10]), torch.tensor([0, 10])
    slots = torchkv.slot_mapping(block_tables, starts, seq_lens, 4, 10)
    table = torchkv.rope_table({"head_dim": 16, "rope_theta": 1e4, "max_position_embeddings": 16})

    def results():
        cache = torchkv.PagedKVCache.create(
            num_blocks=8, block_size=4, num_heads=2, head_size=16, dtype=torch.float32, **options
        )
        rotated = cache.rope_and_cache(query, key, value, torch.arange(10), table, slots)
        out, lse = cache.attend(rotated, block_tables, seq_lens, query_start_loc=starts, return_lse=True)
        merged = torchkv.merge_attention(torch.stack((out, out)), torch.stack((lse, lse)))
        scales = torchkv.kv_scales(key, value, "int8", "head")
        return *cache.caches, rotated, out, lse, *cache.gather(block_tables, seq_lens, 12), *merged, *scales

    want = results()
    with torch.autocast("cpu", dtype=autocast):
        got = results()
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
