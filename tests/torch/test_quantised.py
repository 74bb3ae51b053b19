"""Quantised caches in torch: registration, strides, memory, torch.compile, vmap, launches, PagedKVCache."""

import re

import numpy as np
import pytest
import torch

import torchkv
from kvcore.layout import CacheLayout
from kvcore.oracle import write as reference
from tests.cases.arrays import DTYPES, from_torch, make_case, run_oracle, to_torch
from tests.cases.reads import make_read
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401
from tests.cases.torch_ops import attention_arguments, gather_arguments, positional
from tests.cases.torch_quantised import BACKENDS, inputs, latent_rows, memory_of, mla_oracle, quantising, small
from torchkv._library import read as _read_library
from torchkv._library import write as _library

flash_quant = torchkv.reshape_and_cache_flash_per_token_head_quant
diffkv_quant = torchkv.reshape_and_cache_flash_diffkv_per_token_head_quant
mla = torchkv.concat_and_cache_mla


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- registration


@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
@pytest.mark.parametrize("num_layers", [None, 2])
def test_opcheck_of_ops_that_compute_scales(layout, num_layers, rng):
    case = quantising(rng, layout, bits=False, num_layers=num_layers, layer=num_layers and 1)
    key, value, slots = inputs(case)
    memory = memory_of(case)
    for tensor in memory:
        tensor.zero_()  # it compares values, and finds NaN unequal to itself
    op = _library.diffkv_quant if case.layout.single_array else _library.flash_quant
    for layer in [(None, None)] if num_layers is None else [(1, None), (None, torch.tensor(1))]:
        arguments = (
            key.requires_grad_(), value, *memory, slots, "int8", case.layout.pattern, None, *layer, None
        )  # fmt: skip
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8_ds_mla"])
def test_opcheck_of_rows(kv_cache_dtype, rng):
    kv_c, k_pe, cache, slots = latent_rows(rng, kv_cache_dtype)
    rows = [torch.randn(x.shape).to(torch.bfloat16) for x in (kv_c, k_pe)]
    cache = torch.zeros_like(to_torch(cache))
    scale = torch.tensor(0.5) if kv_cache_dtype == "int8" else None
    arguments = positional(
        _library.mla, kv_c=rows[0], k_pe=rows[1], kv_cache=cache, slot_mapping=to_torch(slots),
        kv_cache_dtype=kv_cache_dtype, scale=scale,
    )  # fmt: skip
    assert set(torch.library.opcheck(_library.mla, arguments).values()) == {"SUCCESS"}


def test_opcheck_of_scales_one_a_head(rng):
    case = small(rng, bits=False, kv_cache_dtype="int4", scales="head")
    key, value, slots = inputs(case)
    scales = [to_torch(s) for s in (case.k_scale, case.v_scale)]
    caches = [torch.zeros_like(c) for c in memory_of(case)]
    arguments = positional(
        _library.flash, key=key, value=value, key_cache=caches[0], value_cache=caches[1], slot_mapping=slots,
        kv_cache_dtype="int4", k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip
    assert set(torch.library.opcheck(_library.flash, arguments).values()) == {"SUCCESS"}


def test_opcheck_of_reading_with_scale_caches(rng):
    case = make_read(rng, kv_cache_dtype="int8", granularity="token_head", scale_layout="head block slot")
    caches, scales = (
        [to_torch(a) for a in arrays] for arrays in (case.caches, (case.options["k_scale"], case.options["v_scale"]))
    )
    query, tables, lens = (to_torch(a) for a in (case.query, case.block_tables, case.seq_lens))
    cache = {"kv_cache_dtype": "int8", "k_scale": scales[0], "v_scale": scales[1], "layout": "NHD"}
    cache["scale_layout"] = "head block slot"
    attend = attention_arguments(query, caches, tables, lens, **cache)
    gather = gather_arguments(caches, tables, lens, 7, **cache)
    assert set(torch.library.opcheck(_read_library.attention, attend).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(_read_library.gather, gather).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", range(4))
def test_autograd_is_told_what_changed(changed, backend, rng):
    """What is saved for backward and written later has to be an error, not a wrong gradient."""
    case = quantising(rng)
    key, value, slots = inputs(case)
    memory = memory_of(case)
    loss = (torch.ones(memory[changed].shape, requires_grad=True) * memory[changed]).sum()
    flash_quant(key, value, *memory, slots, "int8", backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- torch.compile


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
def test_compiled_without_copies(layout, rng):
    case = quantising(rng, layout)
    key, value, slots = inputs(case)
    memory = memory_of(case)
    op = case.op(torchkv)

    def write(key, value, slots, *memory):
        op(key, value, *memory, slots, "int8")

    assert_no_copies(compiled_code(write, key, value, slots, *memory))
    assert_bits(memory, run_oracle(case))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_ds_mla"])
def test_rows_are_compiled_without_copies(kv_cache_dtype, rng):
    kv_c, k_pe, cache, slots = latent_rows(rng, kv_cache_dtype, num_layers=3)
    want = cache
    for layer in (0, 2):
        want = mla_oracle(kv_c, k_pe, want, slots, kv_cache_dtype, layer=layer)
    got = to_torch(cache.copy())

    def write(kv_c, k_pe, cache, slots):
        for layer in (0, 2):
            mla(kv_c, k_pe, cache, slots, kv_cache_dtype, layer=layer)

    assert_no_copies(compiled_code(write, *map(to_torch, (kv_c, k_pe)), got, to_torch(slots)), writes=2)
    assert_bits([got], [want])


@pytest.mark.usefixtures("compiler")
def test_a_cache_with_scales_is_compiled_without_copies(rng):
    """Written through the object; all layers in one tensor each; the scale caches are the object's own."""
    cache = torchkv.PagedKVCache.create(
        num_layers=2, num_blocks=6, block_size=4, num_heads=3, head_size=16, kv_cache_dtype="int4",
        per_token_head=True, scale_layout="layer head block slot",
    )  # fmt: skip
    case = small(rng, bits=False)
    key, value, slots = inputs(case)

    def write(key, value, slots):
        for layer in range(2):
            cache.write(key, value, slots, layer=layer)

    assert_no_copies(compiled_code(write, key, value, slots), writes=2)
    memory = [
        np.zeros(t.shape, str(t.dtype).removeprefix("torch.")) for t in (*cache.caches, cache.k_scale, cache.v_scale)
    ]
    for layer in range(2):
        reference.reshape_and_cache_flash_per_token_head_quant(
            case.key, case.value, *memory, case.slot_mapping, "int4", layout="layer block slot head dim",
            scale_layout="layer head block slot", layer=layer,
        )  # fmt: skip
    assert_bits((*cache.caches, cache.k_scale, cache.v_scale), memory)


@pytest.mark.usefixtures("compiler")
def test_static_scales_and_reading_compiled(rng):
    case = small(rng, bits=False, dtype="float32")
    key, value, slots = inputs(case)
    tables, lens = torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([24])

    def run(key, value, key_cache, value_cache, slots):
        k_scale, v_scale = torchkv.kv_scales(key, value, "int8", "head")
        torchkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "int8", k_scale, v_scale)
        options = {"kv_cache_dtype": "int8", "k_scale": k_scale, "v_scale": v_scale}
        return k_scale, v_scale, *torchkv.gather_kv((key_cache, value_cache), tables, lens, 24, **options)

    caches = [torch.zeros(6, 4, 3, 16, dtype=torch.int8) for _ in range(2)]
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(key, value, *caches, slots)
    eager = run(key, value, *(torch.zeros_like(c) for c in caches), slots)
    assert_bits(got, [from_torch(t) for t in eager])
    scales = reference.kv_scales(case.key, case.value, "int8", "head")
    assert_bits(got[:2], scales)
    for scale, rows, back in zip(scales, (key, value), got[2:], strict=True):
        error = np.abs(from_torch(back.float())[0, case.slot_mapping] - from_torch(rows))
        assert (error <= (scale * 0.5 + np.abs(from_torch(rows)).max() * 2.0**-8)[:, None]).all()


# ---- vmap


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
def test_vmap_with_shared_memory(layout, backend, rng):
    case = quantising(rng, layout, num_tokens=12)
    key, value, slots = (x.unflatten(0, (3, 4)) for x in inputs(case))
    memory = memory_of(case)
    op = case.op(torchkv)
    torch.vmap(lambda k, v, s: (op(k, v, *memory, s, "int8", backend=backend), s)[1])(key, value, slots)
    assert_bits(memory, run_oracle(case))


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_vmap_with_memory_of_their_own(dim, rng):
    cases = [quantising(rng) for _ in range(3)]
    memory = [
        torch.stack([to_torch(a) for a in arrays], dim) for arrays in zip(*(c.memory for c in cases), strict=True)
    ]
    rows = [torch.stack(tensors) for tensors in zip(*map(inputs, cases), strict=True)]

    def write(key, value, slots, *memory):
        flash_quant(key, value, *memory, slots, "int8")
        return slots

    torch.vmap(write, in_dims=(0, 0, 0, *[dim] * 4))(*rows, *memory)
    for i, case in enumerate(cases):
        assert_bits([m.select(dim, i) for m in memory], run_oracle(case))


@pytest.mark.parametrize("mapped", range(4))
def test_vmap_that_cannot_be(mapped, rng):
    case = quantising(rng)
    key, value, slots = inputs(case)
    memory = memory_of(case)

    def write(slots, tensor):
        flash_quant(key, value, *memory[:mapped], tensor, *memory[mapped + 1 :], slots, "int8")
        return slots

    with pytest.raises(ValueError, match="vmap must map all caches or none"):
        torch.vmap(write)(torch.stack([slots] * 2), torch.stack([memory[mapped]] * 2))
    assert_bits(memory, case.memory)


@pytest.mark.parametrize("own", [False, True])
def test_vmap_of_rows(own, rng):
    kv_c, k_pe, cache, slots = latent_rows(rng, "fp8")
    kv_c, k_pe = (np.stack([x, x[::-1]]) for x in (kv_c, k_pe))
    slots = np.stack([slots, np.setdiff1d(np.arange(24), slots)[:5]])
    if own:
        caches = np.stack([cache, cache[::-1]])
        want = [mla_oracle(*x, "fp8", 0.5) for x in zip(kv_c, k_pe, caches, slots, strict=True)]
        got = to_torch(caches.copy())
        scales = torch.tensor([0.5, 0.5])
        write = torch.vmap(lambda k, p, c, s, scale: (mla(k, p, c, s, "fp8", scale), s)[1])
        write(to_torch(kv_c), to_torch(k_pe), got, to_torch(slots), scales)
        assert_bits(got, want)
    else:
        want = mla_oracle(*(x.reshape(-1, x.shape[-1]) for x in (kv_c, k_pe)), cache, slots.ravel(), "fp8", 0.5)
        got = to_torch(cache.copy())
        torch.vmap(lambda k, p, s: (mla(k, p, got, s, "fp8", 0.5), s)[1])(*map(to_torch, (kv_c, k_pe, slots)))
        assert_bits([got], [want])


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"scale": "1"}, TypeError, "scale must be a number or an array of float32, got '1'"),
        ({"scale": torch.ones(2)}, ValueError, "scale must have shape ()"),
        ({"scale": torch.ones((), dtype=torch.float64)}, TypeError, "scale must have dtype float32, got float64"),
        ({"kv_c": torch.zeros(5, 2, 16)}, ValueError,
         "kv_c must have shape (num_tokens, kv_lora_rank), got (5, 2, 16)"),
        ({"k_pe": torch.zeros(4, 16)}, ValueError, "k_pe must have shape (5, 16), got (4, 16)"),
        ({"k_pe": torch.zeros(5, 17)}, ValueError,
         "kv_cache must have shape (num_blocks, block_size, 49), got (6, 4, 48)"),
        ({"kv_cache_dtype": "fp9"}, ValueError, "kv_cache_dtype must be 'auto', 'fp8', "),
        ({"layer": 1}, ValueError, "kv_cache must have shape (num_layers, num_blocks, block_size, 48), got (6, 4, 48)"),
        ({"kv_c": torch.zeros(5, 32, device="meta")}, ValueError, "kv_c must be on device cpu, as kv_cache, got meta"),
    ],
    ids=["type of scale", "shape of scale", "dtype of scale", "rank", "tokens", "columns", "format", "layer", "device"],
)  # fmt: skip
def test_bad_rows(changes, kind, message):
    cache = torch.full((6, 4, 48), 7, dtype=torch.uint8)
    valid = {"kv_c": torch.zeros(5, 32), "k_pe": torch.zeros(5, 16), "kv_cache": cache, "kv_cache_dtype": "int8"}
    with pytest.raises(kind) as error:
        mla(slot_mapping=torch.arange(5), **(valid | changes))
    assert str(error.value).startswith(message)
    assert (cache == 7).all()


@pytest.mark.parametrize("scale_layout", [3, ["head", "block", "slot"]])
def test_scale_layouts_that_are_none(scale_layout, rng):
    case = quantising(rng)
    key, value, slots = inputs(case)
    with pytest.raises(TypeError, match=re.escape(f"scale_layout must be a pattern string, got {scale_layout!r}")):
        flash_quant(key, value, *memory_of(case), slots, "int8", scale_layout=scale_layout)


def test_scale_layouts_as_layouts(rng):
    """What `CacheSpec` holds: a pattern with one more axis, which the tensors lack."""
    case = quantising(rng, scale_layout="slot block head, head block slot")
    key, value, slots = inputs(case)
    memory = memory_of(case)
    layout = CacheLayout("slot block head dim, head block slot dim")
    flash_quant(key, value, *memory, slots, "int8", scale_layout=layout)
    assert_bits(memory, run_oracle(case))


def test_bits_of_casts_and_scales():
    """torch's own casts decide for fp8: every number of 16 bits, as it is and as a divisor's result."""
    for dtype in ("float16", "bfloat16"):
        x = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(64, 4, 256)
        for kv_cache_dtype in ("fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8", "int4", "nvfp4"):
            case = make_case(
                np.random.default_rng(0), num_tokens=64, num_heads=4, head_size=256, num_blocks=8, dtype=dtype,
                kv_cache_dtype=kv_cache_dtype, scales=(None, 0.37),
            )  # fmt: skip
            case.key, case.value = x, x[::-1].copy()
            memory = memory_of(case)
            case.call(torchkv, lambda a: to_torch(a.copy()), memory, backend="torch")
            assert_bits(memory, run_oracle(case))
