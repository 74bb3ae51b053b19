"""On a GPU: quantised caches through both frameworks, bit for bit the oracle's, down to every float32."""

import numpy as np
import pytest

from kvcore import reference
from kvcore.quantization import KV_CACHE_DTYPES
from tests.arrays import (
    DTYPES,
    assert_equals_oracle,
    bits,
    from_torch,
    make_case,
    random_bits,
    run_jax,
    run_oracle,
    run_torch,
    to_torch,
)
from tests.gpu import DEVICE, HAS_GPU, captured, kernels, shorter
from tests.test_gather import assert_gathers, gather_jax, gather_torch
from tests.test_gpu_read import assert_kernels
from tests.test_quantised import kinds, quantised_case, run_mla
from tests.test_quantised_read import kinds as read_kinds
from tests.test_quantised_read import read_case

pytestmark = pytest.mark.gpu

WRITERS = kernels(
    {"jax triton": run_jax, "torch triton": lambda case: run_torch(case, device="cuda")},
    {"torch": lambda case: run_torch(case, "torch")},
)
# XLA's divisions are not exact on a GPU: its path is held to the oracle on the CPU.
PORTABLE = {"torch": lambda case: run_torch(case, "torch", DEVICE)}
GATHERERS = kernels(
    {
        "jax triton": gather_jax,
        "torch triton": lambda *x: gather_torch(*x, device="cuda"),
        "torch": lambda *x: gather_torch(*x, "torch", device="cuda"),
    },
    {"torch": lambda *x: gather_torch(*x, "torch")},
)


@pytest.mark.parametrize(("name", "granularity", "layout"), list(kinds()))
def test_writes(name, granularity, layout):
    assert_equals_oracle(quantised_case(name, granularity, layout), WRITERS | PORTABLE)


@pytest.mark.parametrize(("name", "granularity", "layout"), list(kinds(["NHD", "PACKED_NHD", "BLOCK_KV_HND"])))
def test_writes_to_a_layer(name, granularity, layout):
    for dtype in ("float32", "float16"):
        assert_equals_oracle(quantised_case(name, granularity, layout, layer=2, dtype=dtype), WRITERS)


@pytest.mark.parametrize(("name", "granularity", "layout"), list(kinds(["NHD", "HND", "HEAD_MAJOR"])))
def test_many_tokens(name, granularity, layout):
    """Too many for the oracle: vectorised torch on the CPU stands in, which the CPU's tests hold to the oracle."""
    case = quantised_case(name, granularity, layout)
    num_tokens, num_blocks = (5000, 700) if HAS_GPU else (50, 7)
    case = make_case(
        np.random.default_rng(2), layout=layout, num_tokens=num_tokens, num_heads=8, head_size=128,
        num_blocks=num_blocks, block_size=16, kv_cache_dtype=name,
        scales="head" if granularity == "head" else (0.37, 1e-3), per_token_head="token" in granularity,
        scale_layout=case.scale_layout,
    )  # fmt: skip
    want = run_torch(case, "torch") if HAS_GPU else run_oracle(case)
    for implementation, run in WRITERS.items():
        for got, array in zip(run(case), want, strict=True):
            np.testing.assert_array_equal(bits(got), bits(array), err_msg=implementation)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("name", ["auto", "fp8", "int8", "int4", "nvfp4", "fp8_ds_mla"])
def test_mla_rows(name, layer):
    import jax.numpy as jnp

    import jaxkv
    import torchkv

    rng = np.random.default_rng(7)
    for dtype in ("bfloat16", "float32"):
        units = {"auto": 576, "int4": 288, "nvfp4": 324, "fp8_ds_mla": 656}.get(name, 576)
        shape = (3, 4, 8, units) if layer is not None else (4, 8, units)
        slots = np.array([3, -1, 31, 32, 0, 17], np.int32)
        arrays = [random_bits(rng, (6, 512), dtype), random_bits(rng, (6, 64), dtype)]
        arrays += [random_bits(rng, shape, "bfloat16" if name == "auto" else "uint8"), slots]
        scale = None if name in ("auto", "fp8_ds_mla") else 0.37
        want = arrays[2].copy()
        reference.concat_and_cache_mla(*arrays[:2], want, slots, name, scale, layer=layer)
        got = [
            run_mla(jaxkv, jnp.asarray, np.asarray, arrays, name, scale, layer=layer),
            run_mla(torchkv, lambda a: to_torch(a.copy(), DEVICE), from_torch, arrays, name, scale, layer=layer),
        ]
        for array in got:
            np.testing.assert_array_equal(bits(array), bits(want))


# ---- every number


def stored_by_search(x, stored):
    """The oracle's definition, with torch on the GPU: the nearest of all numbers, the even one of two as near."""
    import torch

    numbers = torch.tensor(reference._numbers(stored), dtype=torch.float64, device=x.device)
    magnitude = x.double().abs().nan_to_num(nan=0.0, posinf=float("inf"))
    above = torch.searchsorted(numbers, magnitude).clamp(1, len(numbers) - 1)
    to_above, to_below = numbers[above] - magnitude, magnitude - numbers[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = torch.where(up, above, above - 1)
    signed = x.signbit() & ((code != 0) | (not stored.unsigned_zero))
    code = code | signed.long() << (stored.bits - 1)
    return torch.where(x.isnan(), stored.nan, code).to(torch.uint8)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8"])
def test_every_float32(name):
    """All 2³² bit patterns, 2²⁶ at a time, through the kernel. On a CPU, 2¹⁶ of them."""
    import torch

    import torchkv

    stored = KV_CACHE_DTYPES[name]
    tokens, step = (65536, 1) if HAS_GPU else (64, 2**16)
    cache = torch.zeros((tokens // 16, 16, 8, 128), dtype=torch.uint8, device=DEVICE)
    other = torch.zeros_like(cache)
    slots = torch.arange(tokens, device=DEVICE)
    pattern = torch.arange(0, tokens * 1024 * step, step, dtype=torch.int64, device=DEVICE)
    for first in range(0, 2**32, tokens * 1024 * step):
        x = (pattern + first).to(torch.int32).view(torch.float32)
        torchkv.reshape_and_cache_flash(
            x.view(tokens, 8, 128), x[:1].expand(tokens * 1024).view(tokens, 8, 128), cache, other, slots, name
        )
        if stored.integer:
            want = x.nan_to_num(nan=0.0).clamp(-127, 127).round().to(torch.int8).view(torch.uint8)
        else:
            want = stored_by_search(x, stored)
        different = (cache.view(-1) != want).nonzero()
        assert not len(different), f"{len(different)} differ, first pattern {first + int(different[0]):#010x}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8", "int4", "nvfp4"])
def test_every_16_bit_number(name, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(64, 4, 256)
    case = make_case(
        np.random.default_rng(0), num_tokens=64, num_heads=4, head_size=256, num_blocks=4, block_size=16, dtype=dtype,
        kv_cache_dtype=name, scales=(0.37, None),
    )  # fmt: skip
    case.key, case.value = x, x[::-1].copy()
    assert_equals_oracle(case, WRITERS)


# ---- reading


@pytest.mark.parametrize(("name", "granularity", "layout"), list(read_kinds()))
def test_gather(name, granularity, layout):
    for seed, dtype in enumerate(("bfloat16", "float32")):
        assert_gathers(read_case(seed, name, granularity, layout, num_heads=3), 17, dtype, GATHERERS)


ATTENTION = [("bfloat16", *kind) for kind in read_kinds(("NHD", "HND", "HEAD_MAJOR", "PACKED_NHD", "MLA"))]
ATTENTION += [(dtype, *kind) for dtype in ("float16", "float32") for kind in read_kinds(("NHD", "MLA"))]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("dtype", "name", "granularity", "layout"), ATTENTION)
def test_attention(dtype, name, granularity, layout, ragged):
    head = {} if name == "fp8_ds_mla" else {"head_size": 576 if layout == "MLA" else 128}
    if layout == "MLA" and name != "fp8_ds_mla":
        head["head_size_v"] = 512
    case = read_case(
        3, name, granularity, layout, dtype=dtype, block_size=16, group=4,
        seq_lens=shorter((1, 0, 150, 333)), query_lens=shorter((1, 0, 9, 60) if ragged else None), **head,
    )  # fmt: skip
    assert_kernels(case)


@pytest.mark.parametrize("head_size", [48, 64, 80, 192, 256])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
def test_attention_of_other_head_sizes(name, head_size):
    case = read_case(
        4, name, "token_head", "NHD", dtype="bfloat16", head_size=head_size, block_size=16,
        seq_lens=shorter((90, 3000), 90), query_lens=shorter((3, 40)), sliding_window=70, soft_cap=20.0,
    )  # fmt: skip
    assert_kernels(case)


@pytest.mark.parametrize(
    ("name", "granularity"), [("int8", "token_head"), ("int4", "token_head"), ("fp8_e4m3", "head")]
)
def test_long_contexts(name, granularity):
    """Positions are split over programs."""
    case = read_case(
        5,
        name,
        granularity,
        "NHD",
        dtype="bfloat16",
        head_size=128,
        block_size=16,
        seq_lens=shorter((9000, 17), 600),
        group=4,
    )
    assert_kernels(case)


def test_a_cuda_graph_of_write_and_attention():
    """PagedKVCache with scales of its own, captured once and replayed with other lengths."""
    import torch

    import torchkv

    rng = np.random.default_rng(6)
    cache = torchkv.PagedKVCache.create(
        num_blocks=8,
        block_size=16,
        num_heads=2,
        head_size=64,
        kv_cache_dtype="int8",
        per_token_head=True,
        device=DEVICE,
    )
    key, value, query = (
        to_torch(rng.standard_normal((1, heads, 64), np.float32).astype(DTYPES["bfloat16"]), DEVICE)
        for heads in (2, 2, 4)
    )
    slots, lens = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    table = torch.arange(8, dtype=torch.int32, device=DEVICE)[None]

    def step():
        cache.write(key, value, slots)
        return cache.attend(query, table, lens + 1)

    out, replay = captured(step)
    for n in range(40):
        key.copy_(torch.randn_like(key))
        value.copy_(torch.randn_like(value))
        slots.fill_(n)
        lens.fill_(n)
        replay()
        want = cache.attend(query, table, lens + 1, backend="torch")
        assert (out.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()
