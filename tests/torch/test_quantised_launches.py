"""Launches of quantised writes and reads, interpreted in the place of a GPU."""

import numpy as np
import pytest
import torch

from kvcore.oracle import read as reference_attention
from tests.cases.arrays import DTYPES, from_torch, random_bits, random_normal, run_oracle, to_torch, with_case
from tests.cases.launches import OnHost
from tests.cases.reads import make_read, oracle
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401
from tests.cases.torch_ops import attention_arguments, gather_arguments
from tests.cases.torch_quantised import inputs, latent_rows, memory_of, mla_oracle, quantising, small
from torchkv._call import AttentionCall, GatherCall, WriteCall
from torchkv._triton.attention import Attentions
from torchkv._triton.gather import Gathers
from torchkv._triton.write import Writes


@pytest.fixture
def launched(monkeypatch):
    """What was compiled."""
    return OnHost(monkeypatch).compiled


@pytest.fixture
def writes():
    return Writes(k_scale=None)


@pytest.fixture
def gathers():
    return Gathers(results=False)


def call_of(case, memory, k_scale=None, v_scale=None):
    key, value, slots = inputs(case)
    count = len(case.caches)
    return WriteCall(
        key, value, tuple(memory[:count]), tuple(memory[count:]), slots, case.kv_cache_dtype, k_scale, v_scale,
        case.layout.pattern, case.layer, None, None, case.scale_layout,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8", "per_token_head": True},
        {"kv_cache_dtype": "int4", "per_token_head": True, "layout": "PACKED_HND", "scale_layout": "head block slot"},
        {"kv_cache_dtype": "nvfp4"},
        {"kv_cache_dtype": "nvfp4", "layout": "KV_NHD", "scales": "head"},
        {"kv_cache_dtype": "fp8_e4m3fnuz", "layout": "PACKED_NHD", "scales": "head", "num_layers": 2, "layer": 1},
    ],
    ids=str,
)
def test_launches(options, launched, writes, rng):
    for tokens in (5, 3):
        case = small(rng, num_tokens=tokens, **options)
        memory = memory_of(case)
        scales = [] if case.scale_caches else [torch.as_tensor(s) for s in (case.k_scale, case.v_scale)]
        scales = [s.to(torch.float32) for s in scales]
        writes.launch(call_of(case, memory, *scales))
        assert_bits(memory, run_oracle(case))
    assert len(launched) == 1


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8", "fp8_ds_mla"])
def test_launches_of_rows(kv_cache_dtype, launched, writes, rng):
    kv_cache_dtype = "auto" if kv_cache_dtype == "bfloat16" else kv_cache_dtype
    kv_c, k_pe, cache, slots = latent_rows(rng, kv_cache_dtype, num_layers=2)
    scale = torch.tensor(0.5) if kv_cache_dtype == "fp8" else None
    for layer in (1, 0):
        got = to_torch(cache.copy())
        rows = (to_torch(kv_c), to_torch(k_pe), (got,), (), to_torch(slots), kv_cache_dtype, scale, scale, None, layer)
        writes.launch(WriteCall(*rows, None, None, latent=True))
        want = mla_oracle(kv_c, k_pe, cache, slots, kv_cache_dtype, scale and scale.item(), layer=layer)
        assert_bits([got], [want])
    assert len(launched) == 1
    with pytest.raises(ValueError, match="key must have shape"):  # not mistaken for the rows of another op
        writes.launch(WriteCall(*rows, None, None))


def test_launches_differ_by_the_strides_of_scales(launched, writes, rng):
    case = small(rng, kv_cache_dtype="fp8", scales="head")
    k_scale, v_scale = to_torch(case.k_scale), to_torch(case.v_scale)
    for view in (lambda s: s, lambda s: s.repeat_interleave(2)[::2], lambda s: s[:1].expand(3), lambda s: s[1]):
        memory, scales = memory_of(case), [view(k_scale), view(v_scale)]
        writes.launch(call_of(case, memory, *scales))
        k, v = (from_torch(s).copy() for s in scales)
        assert_bits(memory, run_oracle(with_case(case, k_scale=k, v_scale=v)))
    assert len(launched) == 4


def test_launches_see_overlaps_every_time(launched, writes, rng):
    case = quantising(rng)
    memory = memory_of(case)
    writes.launch(call_of(case, memory))
    for i, j, names in ((2, 3, "k_scale_cache and v_scale_cache"), (0, 1, "key_cache and value_cache")):
        same = list(memory)
        same[j] = same[i]
        with pytest.raises(ValueError, match=f"{names} must not overlap in memory"):
            writes.launch(call_of(case, same))
    assert_bits(memory, run_oracle(case))


def test_launches_see_addresses_every_time(launched, writes, rng):
    kv_c, k_pe, cache, slots = latent_rows(rng, "fp8_ds_mla")
    memory = to_torch(random_bits(rng, (cache.size + 16,), "uint8"))
    base = -memory.data_ptr() % 16
    want = mla_oracle(
        kv_c, k_pe, from_torch(memory)[base + 4 :][: cache.size].reshape(cache.shape), slots, "fp8_ds_mla"
    )
    for offset in (4, 5, 6):
        got = memory[base + offset :][: cache.size].view(cache.shape)
        call = WriteCall(
            key=to_torch(kv_c), value=to_torch(k_pe), caches=(got,), scale_caches=(), slot_mapping=to_torch(slots),
            kv_cache_dtype="fp8_ds_mla", k_scale=None, v_scale=None, layout=None, layer=None, layer_index=None,
            backend=None, latent=True,
        )  # fmt: skip
        if offset == 4:
            writes.launch(call)
        else:
            with pytest.raises(ValueError, match="kv_cache must begin at a multiple of 4 bytes"):
                writes.launch(call)
    assert_bits([memory[base + 4 :][: cache.size].view(cache.shape)], [want])


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8", "granularity": "head"},
        {"kv_cache_dtype": "int4", "granularity": "token_head", "scale_layout": "slot head block"},
        {"kv_cache_dtype": "nvfp4", "layout": "PACKED_NHD"},
        {"kv_cache_dtype": "fp8_ds_mla", "layout": "MLA", "head_size": 576, "head_size_v": 512},
    ],
    ids=str,
)
def test_launches_that_read(options, launched, gathers, rng):
    case = make_read(rng, **options)
    caches = [to_torch(c) for c in case.caches]
    arrays = [to_torch(a) for a in (case.block_tables, case.seq_lens)]
    found = dict(case.options)
    scales = [found.pop(n, None) for n in ("k_scale", "v_scale")]
    scales = [None if s is None else torch.as_tensor(s, dtype=torch.float32) for s in scales]
    cache = {
        "kv_cache_dtype": found["kv_cache_dtype"],
        "k_scale": scales[0],
        "v_scale": scales[1],
        "layout": found["layout"].pattern,
        "head_size_v": case.head_size_v if case.layout.latent else None,
        "scale_layout": found.get("scale_layout"),
    }
    attend = attention_arguments(to_torch(case.query), caches, *arrays, **cache)
    _, (out, _) = Attentions(results=False).launch(AttentionCall(*attend))
    want, _ = oracle(case)
    np.testing.assert_allclose(out, want, atol=3e-6 * np.abs(want).max())
    gather = gather_arguments(caches, *arrays, 19, dtype="float32", head_size=case.query.shape[2], **cache)
    _, got = gathers.launch(GatherCall(*gather))
    want = reference_attention.gather_kv(
        case.caches, case.block_tables, case.seq_lens, 19, dtype=DTYPES["float32"], head_size=case.query.shape[2],
        head_size_v=case.head_size_v, **case.options,
    )  # fmt: skip
    assert_bits(got, want)


def test_launches_that_read_differ_by_the_layout_of_scales(launched, gathers, rng):
    """As many blocks as slots: the layouts differ in nothing else."""
    caches = [to_torch(random_bits(rng, (4, 4, 1, 16), "int8")) for _ in range(2)]
    scales = [to_torch(random_normal(rng, (4, 4, 1), "float32")) for _ in range(2)]
    tables, lens = torch.tensor([[2, 1, 3, 0]]), torch.tensor([16])
    for scale_layout in ("block slot head", "slot block head", "block slot head"):
        gather = gather_arguments(
            caches, tables, lens, 16, dtype="float32", kv_cache_dtype="int8", k_scale=scales[0], v_scale=scales[1],
            layout="NHD", scale_layout=scale_layout,
        )  # fmt: skip
        _, got = gathers.launch(GatherCall(*gather))
        want = reference_attention.gather_kv(
            [from_torch(c) for c in caches], from_torch(tables), from_torch(lens), 16, dtype=DTYPES["float32"],
            head_size=16, kv_cache_dtype="int8", k_scale=from_torch(scales[0]), v_scale=from_torch(scales[1]),
            scale_layout=scale_layout,
        )  # fmt: skip
        assert_bits(got, want)
    assert len(launched) == 2


def test_launches_that_write_differ_by_the_layout_of_scales(launched, writes, rng):
    for scale_layout in ("block slot head", "slot block head", "block slot head"):
        case = quantising(rng, num_blocks=4, block_size=4, scale_layout=scale_layout)
        memory = memory_of(case)
        writes.launch(call_of(case, memory))
        assert_bits(memory, run_oracle(case))
    assert len(launched) == 2
