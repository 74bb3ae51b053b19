"""Quantised writes in torch."""

import torch

from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.oracle import write as reference
from tests.cases.arrays import make_case, random_bits, to_torch
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401

BACKENDS = ["torch", "interpret"]


def small(rng, **options):
    defaults = {"num_tokens": 5, "num_heads": 3, "head_size": 16, "num_blocks": 6, "block_size": 4}
    return make_case(rng, **(defaults | options))


def quantising(rng, layout="NHD", **options):
    """A write that computes a scale for each token's head."""
    return small(rng, **{"layout": layout, "kv_cache_dtype": "int8", "per_token_head": True} | options)


def latent_rows(rng, kv_cache_dtype, num_layers=None, dtype="bfloat16"):
    """kv_c, k_pe, cache and slots of `concat_and_cache_mla`."""
    rank, rope = (512, 64) if kv_cache_dtype == "fp8_ds_mla" else (32, 16)
    units = stored_size(KV_CACHE_DTYPES[kv_cache_dtype], rank + rope)
    shape = (6, 4, units) if num_layers is None else (num_layers, 6, 4, units)
    cache = random_bits(rng, shape, dtype if kv_cache_dtype == "auto" else "uint8")
    kv_c, k_pe = (random_bits(rng, (5, size), dtype) for size in (rank, rope))
    return kv_c, k_pe, cache, rng.permutation(24)[:5]


def mla_oracle(kv_c, k_pe, cache, slots, *options, layer=None):
    cache = cache.copy()
    reference.concat_and_cache_mla(kv_c, k_pe, cache, slots, *options, layer=layer)
    return cache


def inputs(case):
    return to_torch(case.key.copy()), to_torch(case.value.copy()), to_torch(case.slot_mapping.copy())


def memory_of(case):
    return [to_torch(a.copy()) for a in case.memory]


def as_bits(tensor):
    return tensor.view(torch.int32) if tensor.element_size() == 4 else tensor
