"""Calls of torchkv's ops with tensors on any device: real ones, of poison, ones on "meta", or fake ones on "cuda"."""

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torchkv

HEADS, GROUP, DIM, POISON = 2, 2, 16, 55.0


def tensors_on(device):
    """What makes tensors of a shape and a dtype: real ones of poison, or fake ones on "cuda"."""

    mode = FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else nullcontext()

    def make(*shape, dtype=torch.float32):
        with mode:
            return torch.full(shape, POISON, device=device).to(dtype)

    return make


def integers(make, *shape):
    return make(*shape, dtype=torch.int32)


# ---- each makes an op, its arguments and its options of what `tensors_on` gives

TOKENS = 3


def rows(make, tokens=TOKENS, dtype=torch.float32):
    """Query, key and value: parts of one projection, which begin where the last one ends."""
    qkv = make(tokens, HEADS * (GROUP + 2) * DIM + 1, dtype=dtype)[:, 1:]
    return qkv.unflatten(1, (-1, DIM)).split((HEADS * GROUP, HEADS, HEADS), 1)


def pair(make, dtype=torch.float32, layers=()):
    both = make(2, *layers, 6, 4, HEADS, DIM, dtype=dtype)
    return both[0], both[1]


def flash(make, **options):
    _, key, value = rows(make)
    return torchkv.reshape_and_cache_flash, (key, value, *pair(make), integers(make, TOKENS)), options


def flash_fp8(make):
    _, key, value = rows(make)
    scales = (0.5, make(HEADS))
    caches = pair(make, torch.uint8, (3,))
    options = {"layout": "layer block slot head dim", "layer": integers(make, 3)[1:2]}
    return torchkv.reshape_and_cache_flash, (key, value, *caches, integers(make, TOKENS), "fp8", *scales), options


def diffkv(make):
    _, key, value = rows(make)
    cache = make(6, 4, HEADS, 2 * DIM)
    return torchkv.reshape_and_cache_flash_diffkv, (key, value, cache, integers(make, TOKENS)), {}


def per_token_head(make):
    _, key, value = rows(make)
    op = torchkv.reshape_and_cache_flash_per_token_head_quant
    scales = make(6, 4, HEADS), make(6, 4, HEADS)
    return op, (key, value, *pair(make, torch.int8), *scales, integers(make, TOKENS), "int8"), {}


def mla(make):
    row = make(TOKENS, 48)
    return torchkv.concat_and_cache_mla, (row[:, :32], row[:, 32:], make(6, 4, 48), integers(make, TOKENS)), {}


def attention(make, blocks=2, **options):
    return torchkv.paged_attention, (
        rows(make)[0], pair(make), integers(make, TOKENS, blocks), integers(make, TOKENS),
    ), {"sinks": make(HEADS * GROUP)} | options  # fmt: skip


def attention_split(make):
    return attention(make, blocks=600)


def attention_out(make):
    return attention(make, out=make(TOKENS + 1, HEADS * GROUP, DIM)[1:])


def unified(make):
    query, (key_cache, value_cache), starts = rows(make)[0], pair(make), integers(make, TOKENS + 1)
    return torchkv.unified_attention, (
        query, key_cache, value_cache, make(TOKENS, HEADS * GROUP, DIM), starts, 1, integers(make, TOKENS), 9, 0.3,
        True, (-1, -1), integers(make, TOKENS, 3), 0.0, None, None, None,
    ), {}  # fmt: skip


def gather(make, **options):
    return torchkv.gather_kv, (pair(make), integers(make, TOKENS, 2), integers(make, TOKENS), 7), options


def gather_out(make):
    return gather(make, out=(make(TOKENS, 7, HEADS, DIM), make(TOKENS, 7, HEADS, DIM)))


def rope(make, **options):
    query, key, value = rows(make)
    op = torchkv.rope_and_cache
    arguments = (query, key, value, pair(make), integers(make, TOKENS), make(8, DIM), integers(make, TOKENS))
    return op, arguments, {"rope": "neox", "q_norm": make(DIM)} | options


def rope_in_place(make):
    op, arguments, options = rope(make)
    return op, arguments, options | {"out": arguments[0]}


def copy_blocks(make):
    return torchkv.copy_blocks, (pair(make), integers(make, TOKENS, 2)), {}


def copy_many_blocks(make):
    return torchkv.copy_blocks, (pair(make), integers(make, 1025, 2)), {}


def zero_blocks(make):
    scales = make(6, 4, HEADS), make(6, 4, HEADS)
    return torchkv.zero_blocks, ((*pair(make, torch.int8), *scales), integers(make, TOKENS)), {}


def swap_blocks(make):
    return torchkv.swap_blocks, (pair(make), pair(make), integers(make, TOKENS, 2)), {}


KERNELS = {
    flash: 1, flash_fp8: 1, diffkv: 1, per_token_head: 1, mla: 1, attention: 1, attention_split: 2, attention_out: 1,
    unified: 1, gather: 1, gather_out: 1, rope: 1, rope_in_place: 1,
    copy_blocks: 1, copy_many_blocks: 2, zero_blocks: 1, swap_blocks: 1,
}  # fmt: skip
"""How many kernels each call launches."""
