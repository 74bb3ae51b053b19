"""torchkv takes scalars and arrays of NumPy for its numbers, with the result of Python's."""

import numpy as np
import pytest
import torch

import torchkv

TABLES, LENGTHS = torch.tensor([[2, 0], [1, 5]]), torch.tensor([5, 7])
SLOTS = torch.tensor([9, -1, 4])


def memory(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return (20 * torch.randn(shape)).to(dtype)


def write(kind, **options):
    caches = memory(2, *([3] if "layer" in options else []), 6, 4, 2, 16, dtype=torch.int8)
    key = memory(3, 2, 16)
    torchkv.reshape_and_cache_flash(key, -key, *caches, SLOTS, "int8", **kind(options))
    return caches


def write_rows(kind, **options):
    cache = memory(*([3] if "layer" in options else []), 6, 4, 24, dtype=torch.int8)
    torchkv.concat_and_cache_mla(memory(3, 16), memory(3, 8), cache, SLOTS, "int8", **kind(options))
    return cache


def attend(kind, **options):
    caches = memory(2, *([3] if "layer" in options else []), 6, 4, 2, 16, dtype=torch.int8)
    query = memory(2, 4, 16)
    return torchkv.paged_attention(
        query, tuple(caches), TABLES, LENGTHS, kv_cache_dtype="int8", return_lse=True, **kind(options)
    )


def gather(kind, max_len=8, **options):
    cache = memory(*([3] if "layer" in options else []), 6, 4, 2, 40, dtype=torch.int8)
    options = kind(options | {"head_size": 16, "max_len": max_len})
    return torchkv.gather_kv(cache, TABLES, LENGTHS, kv_cache_dtype="int8", **options)


def create(kind, **options):
    sizes = kind({"num_layers": 3, "num_blocks": 6, "block_size": 4, "num_heads": 2, "head_size": 16} | options)
    cache = torchkv.PagedKVCache.create(dtype="float32", **sizes)
    key = memory(3, 2, 16)
    cache.write(key, -key, SLOTS, **kind({"layer": 1}))
    out = cache.attend(memory(2, 4, 16), TABLES, LENGTHS, **kind({"layer": 1}))
    return (*cache.caches, out, *cache.gather(TABLES, LENGTHS, **kind({"max_len": 7, "layer": 1})), repr(cache))


CALLS = {
    "write": lambda kind: write(kind, layer=1, k_scale=0.5, v_scale=2.0),
    "write rows": lambda kind: write_rows(kind, layer=1, scale=0.5),
    "attend": lambda kind: attend(kind, layer=2, k_scale=0.5, v_scale=2.0, head_size_v=16),
    "gather": lambda kind: gather(kind, layer=2, k_scale=0.5, v_scale=2.0, head_size_v=24),
    "create": create,
    "create of int8": lambda kind: create(kind, kv_cache_dtype="int8", k_scale=0.5, v_scale=2.0),
}
KINDS = {
    "int64 and float32": (np.int64, np.float32),
    "int32 and float64": (np.int32, np.float64),
    "uint8 and float16": (np.uint8, np.float16),
    "arrays without axes": (np.int64, lambda x: np.array(x, np.float32)),
    "arrays with one": (np.int64, lambda x: np.array([x], np.float32)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_numbers_of_numpy(call, kind):
    integer, real = KINDS[kind]

    def numpy(options):
        return {
            n: integer(x) if isinstance(x, int) else real(x) if isinstance(x, float) else x for n, x in options.items()
        }

    want, got = CALLS[call](lambda options: options), CALLS[call](numpy)
    for a, b in zip(got, want, strict=True):
        assert a == b if isinstance(a, str) else torch.equal(a, b)


@pytest.mark.parametrize("scale", [True, np.True_, "0.5", [0.5]], ids=repr)
def test_what_is_no_scale_of_rows(scale):
    with pytest.raises(TypeError) as error:
        write_rows(lambda options: options, scale=scale)
    assert str(error.value) == f"scale must be a number or an array of float32, got {scale!r}"
