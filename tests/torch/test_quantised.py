"""Quantised caches in torch: registration, strides, memory, torch.compile, vmap, launches, PagedKVCache."""

import itertools
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import torchkv
from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from kvcore.oracle import read as reference_attention
from kvcore.oracle import write as reference
from kvcore.plan.kernel import INTERPRETER
from kvcore.run import interpreter
from kvcore.run.compiler import kernel_function
from tests.cases.arrays import (
    DTYPES,
    from_torch,
    make_case,
    random_bits,
    random_normal,
    run_oracle,
    to_torch,
    with_case,
)
from tests.cases.reads import make_read, oracle
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code, compiler  # noqa: F401
from torchkv._call import AttentionCall, GatherCall, WriteCall
from torchkv._library import read as _read_library
from torchkv._library import write as _library
from torchkv._memory import share_elements
from torchkv._triton import read as _read_triton
from torchkv._triton import write as _triton

BACKENDS = ["torch", "interpret"]
flash_quant = torchkv.reshape_and_cache_flash_per_token_head_quant
diffkv_quant = torchkv.reshape_and_cache_flash_diffkv_per_token_head_quant
mla = torchkv.concat_and_cache_mla


@pytest.fixture
def rng():
    return np.random.default_rng(0)


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
    arguments = (*rows, cache, to_torch(slots), kv_cache_dtype, scale, None, None, None)
    assert set(torch.library.opcheck(_library.mla, arguments).values()) == {"SUCCESS"}


def test_opcheck_of_scales_one_a_head(rng):
    case = small(rng, bits=False, kv_cache_dtype="int4", scales="head")
    key, value, slots = inputs(case)
    scales = [to_torch(s) for s in (case.k_scale, case.v_scale)]
    caches = [torch.zeros_like(c) for c in memory_of(case)]
    arguments = (key, value, *caches, slots, "int4", *scales, None, None, None, None)
    assert set(torch.library.opcheck(_library.flash, arguments).values()) == {"SUCCESS"}


def test_opcheck_of_reading_with_scale_caches(rng):
    case = make_read(rng, kv_cache_dtype="int8", granularity="token_head", scale_layout="head block slot")
    caches, scales = (
        [to_torch(a) for a in arrays] for arrays in (case.caches, (case.options["k_scale"], case.options["v_scale"]))
    )
    query, tables, lens = (to_torch(a) for a in (case.query, case.block_tables, case.seq_lens))
    tail = ("int8", *scales, "NHD", None, None)
    attend = (query, caches, tables, lens, None, None, True, None, None, None, *tail, None, None, "head block slot")
    gather = (caches, tables, lens, 7, None, *tail, None, None, None, "head block slot")
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


# ---- strides

# How an array of some shape lies in a larger tensor: that tensor's shape, and the view.
LIES = {
    "an offset": (lambda s: (s[0] + 3, *s[1:]), lambda x: x[2:-1]),
    "every other block": (lambda s: (2 * s[0], *s[1:]), lambda x: x[1::2]),
    "padded everywhere": (lambda s: tuple(n + 2 for n in s), lambda x: x[(slice(1, -1),) * x.dim()]),
    "reversed axes": (lambda s: s[::-1], lambda x: x.permute(*range(x.dim())[::-1])),
    "every other element": (lambda s: (*s, 2), lambda x: x[..., 1]),
}


def lying(rng, name, arrays):
    """Whole tensors of random bits, and views of them that lie as the name says."""
    larger, view = LIES[name]
    wholes = [to_torch(random_bits(rng, larger(a.shape), a.dtype.name)) for a in arrays]
    return wholes, [view(w) for w in wholes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int4"])
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "INTERLEAVED"])
@pytest.mark.parametrize("name", LIES)
def test_strided_caches_and_scale_caches(name, layout, kv_cache_dtype, backend, rng):
    case = quantising(rng, layout, kv_cache_dtype=kv_cache_dtype)
    wholes, views = lying(rng, name, case.memory)
    num_caches = len(case.caches)
    arrays = [from_torch(v).copy() for v in views]
    case = with_case(case, caches=arrays[:num_caches], scale_caches=arrays[num_caches:])
    expected = [w.clone() for w in wholes]
    for whole, array in zip(expected, run_oracle(case), strict=True):
        as_bits(LIES[name][1](whole)).copy_(as_bits(to_torch(array)))
    key, value, slots = inputs(case)
    case.op(torchkv)(key, value, *views, slots, kv_cache_dtype, layout=layout, backend=backend)
    assert_bits(wholes, [from_torch(e) for e in expected])  # what lies between the elements included


def as_bits(tensor):
    return tensor.view(torch.int32) if tensor.element_size() == 4 else tensor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache_dtype", ["nvfp4", "fp8_ds_mla"])
def test_strided_blocks_with_scales_inside(kv_cache_dtype, backend, rng):
    """Blocks may be apart, as those of one layer among all layers' are."""
    if kv_cache_dtype == "nvfp4":
        case = small(rng, kv_cache_dtype="nvfp4")
        wholes = [to_torch(random_bits(rng, (6, 3, *c.shape[1:]), "uint8")) for c in case.caches]
        case = with_case(case, caches=[from_torch(w[:, 1]).copy() for w in wholes])
        want, (key, value, slots) = run_oracle(case), inputs(case)
        views = [w[:, 1] for w in wholes]
        torchkv.reshape_and_cache_flash(key, value, *views, slots, "nvfp4", case.k_scale, case.v_scale, backend=backend)
    else:
        kv_c, k_pe, _, slots = latent_rows(rng, kv_cache_dtype)
        wholes = [to_torch(random_bits(rng, (6, 3, 4, 656 + 8), "uint8"))]
        views = [wholes[0][:, 1, :, 4:-4]]
        want = [mla_oracle(kv_c, k_pe, from_torch(views[0]).copy(), slots, kv_cache_dtype)]
        mla(*map(to_torch, (kv_c, k_pe)), views[0], to_torch(slots), kv_cache_dtype, backend=backend)
    expected = [w.clone() for w in wholes]
    for whole, array in zip(expected, want, strict=True):
        (whole[:, 1] if kv_cache_dtype == "nvfp4" else whole[:, 1, :, 4:-4]).copy_(to_torch(array))
    assert_bits(wholes, [from_torch(e) for e in expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [lambda s: s.repeat(2)[::2], lambda s: s[:1].expand(3)], ids=["repeated", "expanded"])
def test_strided_scales_of_heads(view, backend, rng):
    case = small(rng, kv_cache_dtype="int8", scales="head")
    key, value, slots = inputs(case)
    caches = memory_of(case)
    scales = [view(to_torch(s)) for s in (case.k_scale, case.v_scale)]
    k_scale, v_scale = (from_torch(s).copy() for s in scales)
    torchkv.reshape_and_cache_flash(key, value, *caches, slots, "int8", *scales, backend=backend)
    assert_bits(caches, run_oracle(with_case(case, k_scale=k_scale, v_scale=v_scale)))

    tables, lens = np.array([[2, 0, 5]]), np.array([11])
    caches = [from_torch(c) for c in caches]
    want = reference_attention.gather_kv(
        caches, tables, lens, 11, dtype=DTYPES["float32"], head_size=16, kv_cache_dtype="int8", k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    got = torchkv.gather_kv(
        [to_torch(c) for c in caches], to_torch(tables), to_torch(lens), 11, dtype="float32", kv_cache_dtype="int8",
        k_scale=scales[0], v_scale=scales[1], backend=backend,
    )  # fmt: skip
    assert_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIES)
def test_reading_strided_scale_caches(name, backend, rng):
    case = make_read(rng, kv_cache_dtype="int8", granularity="token_head")
    options = dict(case.options)
    scales = [options.pop("k_scale"), options.pop("v_scale")]
    larger, view = LIES[name]
    views = []
    for scale in scales:
        whole = to_torch(random_bits(rng, larger(scale.shape), "float32"))
        views.append(view(whole))
        as_bits(views[-1]).copy_(as_bits(to_torch(scale)))
    caches = [to_torch(c) for c in case.caches]
    arrays = [to_torch(a) for a in (case.block_tables, case.seq_lens)]
    got = torchkv.paged_attention(
        to_torch(case.query), caches, *arrays, k_scale=views[0], v_scale=views[1], backend=backend, **options
    )
    want, _ = oracle(case)
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


# ---- memory


def floats_of(byte_cache, shape):
    """The first bytes of a cache, as a scale cache."""
    return byte_cache.flatten()[: 4 * np.prod(shape)].view(torch.float32).view(shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("share", "message"),
    [
        (lambda k, v, ks, vs: (k, k, ks, vs), "key_cache and value_cache must not overlap in memory"),
        (lambda k, v, ks, vs: (k, v, ks, ks), "k_scale_cache and v_scale_cache must not overlap in memory"),
        (
            lambda k, v, ks, vs: (k, v, floats_of(k, ks.shape), vs),
            "key_cache and k_scale_cache must not overlap in memory",
        ),
        (
            lambda k, v, ks, vs: (k, v, ks, floats_of(v, ks.shape)),
            "value_cache and v_scale_cache must not overlap in memory",
        ),
        (
            lambda k, v, ks, vs: (k, v, ks, vs[:1].expand_as(vs)),
            "v_scale_cache axis block with stride 0 puts its 6 elements in one place",
        ),
    ],
)
def test_memory_that_is_shared(share, message, backend, rng):
    case = quantising(rng)
    key, value, slots = inputs(case)
    memory = memory_of(case)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        flash_quant(key, value, *share(*memory), slots, "int8", backend=backend)
    assert str(error.value) == message
    assert_bits(memory, case.memory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_between_the_elements_of_caches(backend, rng):
    """One buffer for everything, as vLLM's per-token-head caches: a head's elements, then its scale."""
    case = quantising(rng)
    whole = to_torch(random_bits(rng, (2, 6, 4, 3, 16 + 4), "uint8"))
    caches = whole[..., :16].unbind()
    scales = whole.view(torch.float32)[..., 4].unbind()
    arrays = [from_torch(t).copy() for t in (*caches, *scales)]
    key, value, slots = inputs(case)
    flash_quant(key, value, *caches, *scales, slots, "int8", backend=backend)
    assert_bits((*caches, *scales), run_oracle(with_case(case, caches=arrays[:2], scale_caches=arrays[2:])))


def bytes_of(view):
    size = view.element_size()
    grids = np.indices(tuple(view.shape)).reshape(view.dim(), -1)
    first = view.storage_offset() + np.array(view.stride()) @ grids
    return set((size * first[:, None] + np.arange(size)).ravel().tolist())


def test_tensors_of_different_dtypes_share_bytes(rng):
    buffer, shared = torch.zeros(512, dtype=torch.uint8), 0
    for _ in range(300):
        a, b = (
            buffer.view(dtype).as_strided(rng.integers(1, 4, 2).tolist(), rng.integers(0, 9, 2).tolist(), int(offset))
            for dtype, offset in zip((torch.float32, torch.uint8), rng.integers(0, 40, 2), strict=True)
        )
        shares = bool(bytes_of(a) & bytes_of(b))
        assert share_elements(a, b) == share_elements(b, a) == shares
        shared += shares
    assert 30 < shared < 270


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_with_float32_scales_at_odd_addresses(offset, backend, rng):
    kv_c, k_pe, _, slots = latent_rows(rng, "fp8_ds_mla")
    memory = to_torch(random_bits(rng, (6 * 4 * 656 + 4,), "uint8"))
    before = from_torch(memory).copy()
    cache = memory[offset : offset - 4].view(6, 4, 656)
    message = "kv_cache must begin at a multiple of 4 bytes for kv_cache_dtype 'fp8_ds_mla', got address 0x"
    options = {"kv_cache_dtype": "fp8_ds_mla", "backend": backend}
    kv_c, k_pe, slots = map(to_torch, (kv_c, k_pe, slots))
    tables, lens = torch.tensor([[0, 1]]), torch.tensor([3])
    with pytest.raises(ValueError, match=message):
        mla(kv_c, k_pe, cache, slots, **options)
    with pytest.raises(ValueError, match=message):
        torchkv.reshape_and_cache_flash_diffkv(kv_c[:, None], k_pe[:, None], cache, slots, **options)
    with pytest.raises(ValueError, match=message):
        torchkv.paged_attention(torch.zeros(1, 2, 576), cache, tables, lens, head_size_v=512, **options)
    with pytest.raises(ValueError, match=message):
        torchkv.gather_kv(cache, tables, lens, 3, head_size_v=512, **options)
    assert_bits([memory], [before])


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


# ---- launches, interpreted


@pytest.fixture
def launched(monkeypatch):
    """Launches on CPU tensors: what would be compiled is interpreted. Gives what was compiled."""
    compiled = []

    def load(kernel, pointees, aligned):
        compiled.append(kernel)
        return kernel, pointees

    def start(loaded, grid, device, arguments):
        kernel, pointees = loaded
        names = kernel_function(kernel).arg_names[: len(arguments)]
        pointers = [
            interpreter.Pointer(a, pointees[name]) if pointees.get(name) not in (None, "scalar") else a
            for name, a in zip(names, arguments, strict=True)
        ]
        interpreter.run(kernel, grid, pointers)

    for module in (_triton, _read_triton):
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(module, "start", start)
        monkeypatch.setattr(module, "target", lambda: INTERPRETER)
        monkeypatch.setattr(module, "_launches", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return compiled


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
def test_launches(options, launched, rng):
    for tokens in (5, 3):
        case = small(rng, num_tokens=tokens, **options)
        memory = memory_of(case)
        scales = [] if case.scale_caches else [torch.as_tensor(s) for s in (case.k_scale, case.v_scale)]
        scales = [s.to(torch.float32) for s in scales]
        _triton.write(call_of(case, memory, *scales))
        assert_bits(memory, run_oracle(case))
    assert len(launched) == 1


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8", "fp8_ds_mla"])
def test_launches_of_rows(kv_cache_dtype, launched, rng):
    kv_cache_dtype = "auto" if kv_cache_dtype == "bfloat16" else kv_cache_dtype
    kv_c, k_pe, cache, slots = latent_rows(rng, kv_cache_dtype, num_layers=2)
    scale = torch.tensor(0.5) if kv_cache_dtype == "fp8" else None
    for layer in (1, 0):
        got = to_torch(cache.copy())
        rows = (to_torch(kv_c), to_torch(k_pe), (got,), (), to_torch(slots), kv_cache_dtype, scale, scale, None, layer)
        _triton.write(WriteCall(*rows, None, None, latent=True))
        want = mla_oracle(kv_c, k_pe, cache, slots, kv_cache_dtype, scale and scale.item(), layer=layer)
        assert_bits([got], [want])
    assert len(launched) == 1
    with pytest.raises(ValueError, match="key must have shape"):  # not mistaken for the rows of another op
        _triton.write(WriteCall(*rows, None, None))


def test_launches_differ_by_the_strides_of_scales(launched, rng):
    case = small(rng, kv_cache_dtype="fp8", scales="head")
    k_scale, v_scale = to_torch(case.k_scale), to_torch(case.v_scale)
    for view in (lambda s: s, lambda s: s.repeat_interleave(2)[::2], lambda s: s[:1].expand(3), lambda s: s[1]):
        memory, scales = memory_of(case), [view(k_scale), view(v_scale)]
        _triton.write(call_of(case, memory, *scales))
        k, v = (from_torch(s).copy() for s in scales)
        assert_bits(memory, run_oracle(with_case(case, k_scale=k, v_scale=v)))
    assert len(launched) == 4


def test_launches_see_overlaps_every_time(launched, rng):
    case = quantising(rng)
    memory = memory_of(case)
    _triton.write(call_of(case, memory))
    for i, j, names in ((2, 3, "k_scale_cache and v_scale_cache"), (0, 1, "key_cache and value_cache")):
        same = list(memory)
        same[j] = same[i]
        with pytest.raises(ValueError, match=f"{names} must not overlap in memory"):
            _triton.write(call_of(case, same))
    assert_bits(memory, run_oracle(case))


def test_launches_see_addresses_every_time(launched, rng):
    kv_c, k_pe, cache, slots = latent_rows(rng, "fp8_ds_mla")
    memory = to_torch(random_bits(rng, (cache.size + 16,), "uint8"))
    base = -memory.data_ptr() % 16
    want = mla_oracle(
        kv_c, k_pe, from_torch(memory)[base + 4 :][: cache.size].reshape(cache.shape), slots, "fp8_ds_mla"
    )
    for offset in (4, 5, 6):
        got = memory[base + offset :][: cache.size].view(cache.shape)
        rows = (to_torch(kv_c), to_torch(k_pe), (got,), (), to_torch(slots), "fp8_ds_mla", None, None, None, None)
        if offset == 4:
            _triton.write(WriteCall(*rows, None, None, latent=True))
        else:
            with pytest.raises(ValueError, match="kv_cache must begin at a multiple of 4 bytes"):
                _triton.write(WriteCall(*rows, None, None, latent=True))
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
def test_launches_that_read(options, launched, rng):
    case = make_read(rng, **options)
    caches = [to_torch(c) for c in case.caches]
    arrays = [to_torch(a) for a in (case.block_tables, case.seq_lens)]
    found = dict(case.options)
    scales = [found.pop(n, None) for n in ("k_scale", "v_scale")]
    scales = [None if s is None else torch.as_tensor(s, dtype=torch.float32) for s in scales]
    layout, scale_layout = found["layout"].pattern, found.get("scale_layout")
    head_size_v = case.head_size_v if case.layout.latent else None
    tail = (found["kv_cache_dtype"], *scales, layout, None, None)
    attend = (to_torch(case.query), caches, *arrays, None, None, True, None, None, None, *tail, head_size_v)
    out, _ = _read_triton.attention(AttentionCall(*attend, None, scale_layout))
    want, _ = oracle(case)
    np.testing.assert_allclose(out, want, atol=3e-6 * np.abs(want).max())
    gather = (caches, *arrays, 19, "float32", *tail, case.query.shape[2], head_size_v)
    got = _read_triton.gather(GatherCall(*gather, None, scale_layout))
    want = reference_attention.gather_kv(
        case.caches, case.block_tables, case.seq_lens, 19, dtype=DTYPES["float32"], head_size=case.query.shape[2],
        head_size_v=case.head_size_v, **case.options,
    )  # fmt: skip
    assert_bits(got, want)


def test_launches_that_read_differ_by_the_layout_of_scales(launched, rng):
    """As many blocks as slots: the layouts differ in nothing else."""
    caches = [to_torch(random_bits(rng, (4, 4, 1, 16), "int8")) for _ in range(2)]
    scales = [to_torch(random_normal(rng, (4, 4, 1), "float32")) for _ in range(2)]
    tables, lens = torch.tensor([[2, 1, 3, 0]]), torch.tensor([16])
    for scale_layout in ("block slot head", "slot block head", "block slot head"):
        tail = ("int8", *scales, "NHD", None, None, None, None, None, scale_layout)
        got = _read_triton.gather(GatherCall(caches, tables, lens, 16, "float32", *tail))
        want = reference_attention.gather_kv(
            [from_torch(c) for c in caches], from_torch(tables), from_torch(lens), 16, dtype=DTYPES["float32"],
            head_size=16, kv_cache_dtype="int8", k_scale=from_torch(scales[0]), v_scale=from_torch(scales[1]),
            scale_layout=scale_layout,
        )  # fmt: skip
        assert_bits(got, want)
    assert len(launched) == 2


def test_launches_that_write_differ_by_the_layout_of_scales(launched, rng):
    for scale_layout in ("block slot head", "slot block head", "block slot head"):
        case = quantising(rng, num_blocks=4, block_size=4, scale_layout=scale_layout)
        memory = memory_of(case)
        _triton.write(call_of(case, memory))
        assert_bits(memory, run_oracle(case))
    assert len(launched) == 2


# ---- PagedKVCache

TABLES, LENS = np.array([[7, 2, 9], [4, 11, -1]], np.int32), np.array([6, 3], np.int32)
SLOTS = np.array([28, 29, 30, 31, 8, 9, 16, 17, 18])  # 6 tokens of the first sequence, 3 of the second


def create(**options):
    defaults = {"num_blocks": 12, "block_size": 4, "num_heads": 2, "head_size": 32, "dtype": "float32"}
    return torchkv.PagedKVCache.create(**(defaults | options))


def assert_reads(cache, query, tables, lens, layer, **options):
    """attend and gather agree with the oracle on the cache's own memory."""
    arrays = [from_torch(c) for c in cache.caches]
    options |= {"kv_cache_dtype": cache.spec.kv_cache_dtype, "layout": cache.spec.layout, "layer": layer}
    options["head_size_v"] = cache.spec.head_size_v
    options |= {
        n: None if s is None else from_torch(s) for n, s in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale))
    }
    if cache.spec.layout.latent:
        options["v_scale"] = options["k_scale"]
    on_device = [to_torch(x) for x in (tables, lens)]
    want, _ = reference_attention.paged_attention(query, arrays, tables, lens, **options)
    np.testing.assert_allclose(cache.attend(to_torch(query), *on_device, layer=layer), want, atol=1e-5)
    want = reference_attention.gather_kv(
        arrays, tables, lens, 7, dtype=DTYPES["float32"], head_size=cache.spec.head_size, **options
    )
    assert_bits(cache.gather(*on_device, 7, dtype="float32", layer=layer), want)
    return want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_layout", [None, "head layer block slot"])
@pytest.mark.parametrize("layout", ["HND", "HEAD_MAJOR", "PACKED_NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e5m2", "int4"])
def test_cache_with_scale_caches(kv_cache_dtype, layout, scale_layout, backend, rng):
    options = {"per_token_head": True, "scale_layout": scale_layout, "num_layers": 3}
    cache = create(layout=layout, kv_cache_dtype=kv_cache_dtype, **options)
    shape = (2, 3, 12, 4) if scale_layout else (3, 12, 4, 2)
    for scale in (cache.k_scale, cache.v_scale):
        assert (tuple(scale.shape), scale.dtype, bool(scale.any())) == (shape, torch.float32, False)
    memory = (*cache.caches, cache.k_scale, cache.v_scale)
    assert cache.nbytes == sum(m.nbytes for m in memory)
    key, value = (random_normal(rng, (9, 2, 32), "float32") for _ in range(2))
    cache.write(to_torch(key), to_torch(value), to_torch(SLOTS), layer=1, backend=backend)
    assert all(a is b for a, b in zip(memory, (*cache.caches, cache.k_scale, cache.v_scale), strict=True))
    assert cache.k_scale.count_nonzero() == cache.v_scale.count_nonzero() == 9 * 2
    query = random_normal(rng, (2, 6, 32), "float32")
    got, _ = assert_reads(cache, query, TABLES, LENS, 1, scale_layout=scale_layout)
    bound = np.abs(key).max(-1, keepdims=True) / (14 if kv_cache_dtype == "int4" else 8) * (1 + 2e-7)
    assert (np.abs(got[0, :6] - key[:6]) <= bound[:6]).all()
    got, _ = assert_reads(cache, query, TABLES, LENS, 0, scale_layout=scale_layout)
    assert not got.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kv_cache_dtype", "layout"),
    [
        *itertools.product(["auto", "int8", "nvfp4", "fp8_ds_mla"], ["MLA", "block layer slot latent"]),
        ("int4", "slot block latent"),  # whose regions nvfp4 could not have: slots lie inside blocks there
        ("fp8_ds_mla", "slot block latent"),
    ],
)
def test_cache_of_rows(kv_cache_dtype, layout, backend, rng):
    rank, rope = (512, 64) if kv_cache_dtype == "fp8_ds_mla" else (32, 16)
    scale = {"int8": 0.05, "int4": 0.5, "nvfp4": 0.05}.get(kv_cache_dtype)
    layers = {"num_layers": 2} if "layer" in layout else {}
    sizes = {"num_heads": 1, "head_size": rank + rope, "head_size_v": rank}
    cache = create(layout=layout, kv_cache_dtype=kv_cache_dtype, k_scale=scale, **sizes, **layers)
    kv_c, k_pe = (random_normal(rng, (9, size), "float32") for size in (rank, rope))
    layer = 1 if layers else None
    cache.write(to_torch(kv_c), to_torch(k_pe), to_torch(SLOTS), layer=layer, backend=backend)
    query = random_normal(rng, (2, 6, rank + rope), "float32")
    key, value = assert_reads(cache, query, TABLES, LENS, layer)
    assert key.shape[-1] == rank + rope
    assert value.shape[-1] == rank
    tolerance = {"auto": 0, "int8": 0.026, "int4": 0.26, "nvfp4": 0.6, "fp8_ds_mla": 0.3}[kv_cache_dtype]
    np.testing.assert_allclose(key[0, :6, 0], np.concatenate([kv_c, k_pe], -1)[:6], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_scale": 0.5}, "k_scale must be None with per_token_head, which computes scales, got 0.5"),
        ({"v_scale": 0.5}, "v_scale must be None with per_token_head, which computes scales, got 0.5"),
        (
            {"per_token_head": False, "scale_layout": "head block slot"},
            "scale_layout must be None without per_token_head, got 'head block slot'",
        ),
        (
            {"per_token_head": False, "layout": "MLA", "num_heads": 1, "head_size_v": 16, "v_scale": 0.5},
            "v_scale must be None for layout 'block slot latent', where k_scale is for both, got 0.5",
        ),
    ],
    ids=str,
)
def test_caches_that_cannot_be(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        create(**({"kv_cache_dtype": "int8", "per_token_head": True} | options))
    assert str(error.value) == message


def test_rows_split_elsewhere():
    cache = create(layout="MLA", num_heads=1, head_size=48, head_size_v=32, kv_cache_dtype="int8")
    with pytest.raises(ValueError, match=re.escape("key must have shape (num_tokens, 32), got (2, 16)")):
        cache.write(torch.ones(2, 16), torch.ones(2, 32), torch.tensor([0, 1]))
    assert not cache.caches[0].any()


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
