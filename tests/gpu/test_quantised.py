"""On a GPU: quantised caches through both frameworks, bit for bit the oracle's, down to every float32.

Compiling is what takes the time, so that the grids are thinner than all that the formats allow: every format and
granularity in one layout, and every layout with the formats that tell, as in the CPU tests, which run the same kernels
in Triton's interpreter. Attention has both for few and for many rows of query, which are other instructions.
"""

import numpy as np
import pytest

from kvcore.formats import KV_CACHE_DTYPES
from kvcore.oracle import formats
from kvcore.oracle import write as reference
from tests.cases import gpu
from tests.cases.arrays import (
    DTYPES,
    LAYOUTS,
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
from tests.cases.gathers import assert_gathers, gather_jax, gather_torch
from tests.cases.gpu import DEVICE, HAS_GPU, captured, params, shorter
from tests.cases.gpu_reads import assert_kernels
from tests.cases.quantised_reads import TELLING as READ_TELLING
from tests.cases.quantised_reads import TELLING_OF_LAYERS as OF_LAYERS
from tests.cases.quantised_reads import kinds as read_kinds
from tests.cases.quantised_reads import read_case, telling
from tests.cases.quantised_writes import FORMATS, TELLING, TELLING_OF_LAYERS, kinds, quantised_case, run_mla

pytestmark = pytest.mark.gpu

WRITERS = {"jax triton": run_jax, "torch triton": lambda case: run_torch(case, device="cuda")}
# XLA's divisions are not exact on a GPU: its path is held to the oracle on the CPU.
PORTABLE = {"torch": lambda case: run_torch(case, "torch", device="cuda")}
GATHERERS = {
    "jax triton": gather_jax,
    "torch triton": lambda *x: gather_torch(*x, device="cuda"),
    "torch": lambda *x: gather_torch(*x, "torch", device="cuda"),
}
if not HAS_GPU:
    WRITERS, PORTABLE, GATHERERS = {"all but the kernels": gpu.write}, {}, {"all but the kernels": gpu.gather_kv}


SMOKE = [(name, "tensor" if name == "nvfp4" else "token and head", "NHD") for name in FORMATS]


@pytest.mark.parametrize(
    ("name", "granularity", "layout"),
    params([kind for kind in kinds() if kind[2] == "NHD" or kind[:2] in TELLING], smoke=SMOKE),
)
def test_writes(name, granularity, layout):
    assert_equals_oracle(quantised_case(name, granularity, layout), WRITERS | PORTABLE)


@pytest.mark.parametrize(
    ("name", "granularity"), [*TELLING, ("fp8_e4m3", "tensor"), ("fp8_e5m2", "head"), *TELLING_OF_LAYERS]
)
@pytest.mark.parametrize(("layout", "dtype"), [("NHD", "float32"), ("PACKED_NHD", "float16")])
def test_writes_to_a_layer(name, granularity, layout, dtype):
    assert_equals_oracle(quantised_case(name, granularity, layout, layer=2, dtype=dtype), WRITERS)


MANY = [kind for kind in kinds(["NHD"]) if kind[1] in ("tensor", "token and head")]
MANY += [kind for kind in kinds(["HND", "HEAD_MAJOR"]) if kind[:2] in TELLING]


@pytest.mark.parametrize(("name", "granularity", "layout"), MANY)
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


@pytest.mark.parametrize(
    ("layer", "dtype", "scale"),
    [(None, "bfloat16", 0.37), (1, "float32", 0.37), (2, "float16", np.array([[3.0], [0.01], [0.37]], np.float32))],
    ids=["bfloat16", "a layer", "scales of layers"],
)
@pytest.mark.parametrize("name", ["auto", "fp8", "int8", "int4", "nvfp4", "fp8_ds_mla"])
def test_mla_rows(name, layer, dtype, scale):
    import jax.numpy as jnp

    import jaxkv
    import torchkv

    rng = np.random.default_rng(7)
    units = {"auto": 576, "int4": 288, "nvfp4": 324, "fp8_ds_mla": 656}.get(name, 576)
    shape = (3, 4, 8, units) if layer is not None else (4, 8, units)
    slots = np.array([3, -1, 31, 32, 0, 17], np.int32)
    arrays = [random_bits(rng, (6, 512), dtype), random_bits(rng, (6, 64), dtype)]
    arrays += [random_bits(rng, shape, "bfloat16" if name == "auto" else "uint8"), slots]
    scale = None if name in ("auto", "fp8_ds_mla") else scale
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

    numbers = torch.tensor(formats._numbers(stored), dtype=torch.float64, device=x.device)
    magnitude = x.double().abs().nan_to_num(nan=0.0, posinf=float("inf"))
    above = torch.searchsorted(numbers, magnitude).clamp(1, len(numbers) - 1)
    to_above, to_below = numbers[above] - magnitude, magnitude - numbers[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = torch.where(up, above, above - 1)
    signed = x.signbit() & ((code != 0) | (not stored.unsigned_zero))
    code = code | signed.long() << (stored.bits - 1)
    return torch.where(x.isnan(), stored.nan, code).to(torch.uint8)


@pytest.mark.xdist_group("large")  # one at a time: GBs each
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


GATHERED = [("bfloat16", *kind) for kind in telling((*LAYOUTS, "MLA"))]
GATHERED += [("float32", *kind) for kind in read_kinds(("NHD", "MLA")) if kind[:2] in READ_TELLING]
SMOKE = [("bfloat16", *kind) for kind in read_kinds(("NHD", "MLA")) if kind[:2] in READ_TELLING]


@pytest.mark.parametrize(("dtype", "name", "granularity", "layout"), params(GATHERED, SMOKE))
def test_gather(dtype, name, granularity, layout):
    assert_gathers(read_case(0, name, granularity, layout, num_heads=3), 17, dtype, GATHERERS)


@pytest.mark.parametrize(("name", "granularity", "layout"), OF_LAYERS)
def test_gather_from_a_layer_with_scales_of_its_own(name, granularity, layout):
    case = read_case(2, name, granularity, layout, num_layers=3, layer=1)
    assert_gathers(case, 17, "float16", GATHERERS)


@pytest.mark.parametrize("query_lens", [None, (1, 0, 3, 2)])
@pytest.mark.parametrize(("name", "granularity", "layout"), OF_LAYERS)
def test_attention_over_a_layer_with_scales_of_its_own(name, granularity, layout, query_lens):
    case = read_case(
        10, name, granularity, layout, num_layers=3, layer=1, query_lens=query_lens, dtype="bfloat16", block_size=16
    )
    assert_kernels(case)


def attention_kinds():
    """Dtypes, formats, granularities, layouts, and whether a sequence has many rows of query."""
    for i, (name, granularity, layout) in enumerate(read_kinds(("NHD", "HND", "HEAD_MAJOR", "PACKED_NHD", "MLA"))):
        kind = name, granularity, layout
        # Of the formats that differ in their numbers alone, one has everything.
        alike = name in ("fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
        tells = (name, granularity) in READ_TELLING
        if layout == "NHD":
            for ragged in (False, True):
                if not alike or granularity == ("token_head" if ragged else "tensor"):
                    yield "bfloat16", *kind, ragged
        elif layout == "MLA":
            yield "bfloat16", *kind, False
            if name in ("fp8_e4m3", "fp8_ds_mla", "int4"):
                yield "bfloat16", *kind, True
        elif tells:
            yield "bfloat16", *kind, layout != "HND"
        if layout in ("NHD", "MLA") and (tells or kind[:2] == ("fp8_e4m3", "tensor")):
            yield "float16", *kind, bool(i % 2)
            yield "float32", *kind, not i % 2


ATTENTION = list(attention_kinds())


@pytest.mark.parametrize(
    ("dtype", "name", "granularity", "layout", "ragged"),
    params(ATTENTION, smoke=[(*kind, ragged) for kind in SMOKE for ragged in (False, True)]),
)
def test_attention(dtype, name, granularity, layout, ragged):
    head = {} if name == "fp8_ds_mla" else {"head_size": 576 if layout == "MLA" else 128}
    if layout == "MLA" and name != "fp8_ds_mla":
        head["head_size_v"] = 512
    case = read_case(
        3, name, granularity, layout, dtype=dtype, block_size=16, group=4,
        seq_lens=shorter((1, 0, 150, 333)), query_lens=shorter((1, 0, 9, 60) if ragged else None), **head,
    )  # fmt: skip
    assert_kernels(case)


@pytest.mark.parametrize(
    ("name", "head_size"),
    [("int8", 48), ("int4", 64), ("fp8_e4m3", 80), ("int8", 192), ("int4", 256), ("fp8_e4m3", 256), ("int4", 48),
     ("int8", 80)],
)  # fmt: skip
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


@pytest.mark.gpu_smoke
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
