"""Writes in torch: small cases, and tensors with strides."""

import torch

import torchkv
from tests.cases.arrays import make_case, random_bits, to_torch

BACKENDS = [None, "interpret"]


flash = torchkv.reshape_and_cache_flash


diffkv = torchkv.reshape_and_cache_flash_diffkv


def small(rng, **options):
    return make_case(rng, **({"num_tokens": 5, "num_heads": 3, "head_size": 16, "num_blocks": 6} | options))


def tensors(case):
    """key, value, caches and slots as fresh tensors."""
    return (
        *(to_torch(a.copy()) for a in (case.key, case.value)),
        [to_torch(c.copy()) for c in case.caches],
        to_torch(case.slot_mapping.copy()),
    )


def options_of(case):
    scales = {"k_scale": case.k_scale, "v_scale": case.v_scale}
    return {"kv_cache_dtype": case.kv_cache_dtype, "layout": case.layout, "layer": case.layer} | scales


def fused(rng, tokens, heads, size, dtype):
    """key and value as slices of a fused qkv projection."""
    qkv = to_torch(random_bits(rng, (tokens, 4 * heads * size), dtype))
    _, key, value = qkv.split([2 * heads * size, heads * size, heads * size], dim=1)
    return key.unflatten(1, (heads, size)), value.unflatten(1, (heads, size))


def two(shape_of, view):
    """key and value from two tensors of their own."""

    def make(rng, tokens, heads, size, dtype):
        return tuple(view(to_torch(random_bits(rng, shape_of(tokens, heads, size), dtype))) for _ in range(2))

    return make


def as_integers(tensor):
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)
