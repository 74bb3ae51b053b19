"""relayout: both frameworks, portable and interpreted kernel, bit for bit the oracle's."""

import numpy as np
import pytest
import torch

import jaxkv
import torchkv
from kvcore.layout import CONSTANTS as LAYOUTS
from kvcore.layout import CacheLayout
from tests.cases.arrays import bits, from_torch
from tests.cases.relayouts import FORMATS, PAIRS, SIZES, WAYS, arrays_of, assert_moves, cache_of, memory_of, move

HEADS = [name for name in LAYOUTS if not CacheLayout.of(name).latent]


def two(rng, source, destination, **more):
    blocks = dict(num_blocks=4, block_size=4), dict(num_blocks=5, block_size=3)
    return [
        arrays_of(rng, **(SIZES | of | more | given)) for of, given in zip(blocks, (source, destination), strict=True)
    ]


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("layout", HEADS)
def test_layouts(layout, layers):
    rng = np.random.default_rng(0)
    for there, here in ((layout, "NHD"), ("HND", layout)):
        source, destination = two(rng, dict(layout=here), dict(layout=there), num_layers=layers)
        assert_moves(source, destination, np.array(PAIRS, np.int64 if layers else np.int32))


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, layers):
    rng = np.random.default_rng(1)
    scales = dict(scale_layout=("layer " if layers else "") + "head block slot") if "tokens" in name else {}
    source, destination = two(rng, {}, dict(layout="HND") | scales, num_layers=layers, **FORMATS[name])
    assert_moves(source, destination, np.array(PAIRS, np.int32))


@pytest.mark.parametrize("options", [{}, dict(kv_cache_dtype="fp8_ds_mla"), dict(kv_cache_dtype="fp8")])
def test_latent_caches(options):
    sizes = dict(num_heads=1, head_size=576, head_size_v=512) | options
    layouts = dict(layout="block slot latent"), dict(layout="slot block latent")
    assert_moves(*two(np.random.default_rng(2), *layouts, **sizes), np.array(PAIRS, np.int32))


@pytest.mark.parametrize("blocks", [(3, 4), (12, 1), (1, 12), (2, 9)])
def test_all_slots(blocks):
    num_blocks, block_size = blocks
    destination = dict(num_blocks=num_blocks, block_size=block_size, layout="HND")
    assert_moves(*two(np.random.default_rng(3), dict(num_blocks=4, block_size=3), destination), None)


def test_every_slot_of_many_and_what_is_not_named_keeps_its_bits():
    """More pairs than a program takes, in a random order: defragmentation."""
    rng = np.random.default_rng(4)
    source, destination = two(rng, dict(num_blocks=32), dict(num_blocks=50, block_size=3), num_layers=2, head_size=8)
    pairs = np.stack([rng.permutation(128), rng.permutation(150)[:128]], axis=1)
    want = assert_moves(source, destination, pairs)
    assert any((bits(a) != bits(b)).any() for a, b in zip(want, destination[1], strict=True))
    assert any((bits(a) == bits(b)).any() for a, b in zip(want, destination[1], strict=True))


@pytest.mark.parametrize("pairs", [np.zeros((0, 2), np.int32), np.full((3, 2), -1)])
def test_nothing_to_move(pairs):
    source, destination = two(np.random.default_rng(5), {}, {})
    for array, before in zip(assert_moves(source, destination, pairs), destination[1], strict=True):
        np.testing.assert_array_equal(bits(array), bits(before))


def test_memory_of_vllm():
    """A cache of all layers in vLLM's order of axes, with K and V side by side, becomes one of ours."""
    source, destination = two(
        np.random.default_rng(6), dict(layout=CacheLayout.from_vllm("BLHNC")), dict(layout="NHD"), num_layers=3
    )
    assert_moves(source, destination, np.array(PAIRS))


# ---- other formats


def filled(rng, **extents):
    """A cache with keys and values in all slots, as a spec and NumPy's arrays."""
    cache = torchkv.PagedKVCache.create(**(SIZES | dict(num_blocks=4, block_size=4) | extents))
    spec = cache.spec
    for layer in [None] if spec.num_layers is None else range(spec.num_layers):
        rows = [rng.standard_normal((16, spec.num_heads, size)) for size in (spec.head_size, spec.head_size_v)]
        key, value = (
            torch.from_numpy(r).to(torch.float32 if spec.kv_cache_dtype != "auto" else torch.bfloat16) for r in rows
        )
        if spec.layout.latent:
            key, value = key[:, 0, : spec.head_size_v], key[:, 0, spec.head_size_v :]
        cache.write(key, value, torch.arange(16), layer=layer)
    return spec, memory_of(cache)


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, dict(kv_cache_dtype="fp8")),
        (dict(kv_cache_dtype="nvfp4"), dict(dtype="float32")),
        (dict(kv_cache_dtype="int8", per_token_head=True), dict(kv_cache_dtype="int4")),
        ({}, dict(kv_cache_dtype="int8", per_token_head=True)),
    ],
)
def test_other_formats(old, new, layers):
    """The bits of a gather, then a write: test_requantise.py has more of it."""
    rng = np.random.default_rng(7)
    source = filled(rng, **old, num_layers=layers)
    destination = arrays_of(rng, **(SIZES | dict(num_blocks=5, block_size=3, layout="HND") | new), num_layers=layers)
    pairs = np.array(PAIRS, np.int32)
    ours = cache_of(torchkv, *destination)
    read_from, keep = cache_of(torchkv, *source), [p for p in PAIRS if 0 <= p[0] < 16]
    for layer in [None] if layers is None else range(layers):
        slots, targets = torch.tensor(keep).unbind(1)
        dtype = "float32"
        key, value = read_from.read(slots, dtype=dtype, layer=layer)
        ours.write(key, value, targets, layer=layer)
    for name, way in WAYS.items():
        for got, want in zip(move(*way, source, destination, pairs), memory_of(ours), strict=True):
            np.testing.assert_array_equal(bits(got), bits(want), err_msg=name)


@pytest.mark.parametrize("new", [dict(kv_cache_dtype="fp8"), dict(kv_cache_dtype="fp8_ds_mla")])
def test_latent_rows_of_other_formats(new, monkeypatch):
    """The bits of a gather, then a write, of a chunk of slots at a time."""
    monkeypatch.setattr("kvcore.contract.relayout._CHUNK_ELEMENTS", 4 * (576 + 512))
    rng, sizes = np.random.default_rng(7), dict(num_heads=1, head_size=576, head_size_v=512, layout="block slot latent")
    source = filled(rng, **sizes, num_layers=2)
    destination = arrays_of(rng, **sizes, **new, num_blocks=5, block_size=3, num_layers=2)
    old, ours = cache_of(torchkv, *source), cache_of(torchkv, *destination)
    slots, targets = torch.tensor([p for p in PAIRS if 0 <= p[0] < 16]).unbind(1)
    for layer in range(2):
        key, _ = old.read(slots, layer=layer)
        ours.write(key[:, 0, :512], key[:, 0, 512:], targets, layer=layer)
    for name, way in WAYS.items():
        got = move(*way, source, destination, np.array(PAIRS, np.int32))
        np.testing.assert_array_equal(got[0], memory_of(ours)[0], err_msg=name)


def test_other_static_scales():
    rng = np.random.default_rng(8)
    spec, arrays = filled(rng, kv_cache_dtype="fp8")
    for module, backend in WAYS.values():
        caches = [cache_of(module, spec, arrays) for _ in range(2)]
        array = torch.tensor if module is torchkv else np.float32
        caches = [
            module.PagedKVCache(c.caches, spec, array(scale), array(scale))
            for c, scale in zip(caches, (1.0, 2.0), strict=True)
        ]
        kept = caches[0].relayout(caches[1], backend=backend) or caches[1]
        for got, want in zip(memory_of(kept), arrays, strict=True):
            np.testing.assert_array_equal(got, want)
        halved = caches[0].relayout(caches[1], requantise=True, backend=backend) or caches[1]
        slots = np.arange(16) if module is jaxkv else torch.arange(16)
        for got, want in zip(halved.read(slots, dtype="float32"), caches[0].read(slots, dtype="float32"), strict=True):
            np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2**-6)
        assert any((got != want).any() for got, want in zip(memory_of(halved), arrays, strict=True))


# ---- bad calls


BAD = {
    "layers": (dict(num_layers=2), {}, ValueError, "destination must have num_layers None, as source, got 2"),
    "heads": (dict(num_heads=3), {}, ValueError, "destination must have num_heads 2, as source, got 3"),
    "size": (dict(head_size=64), {}, ValueError, "destination must have head_size 32, as source, got 64"),
    "room": (
        dict(num_blocks=3), dict(pairs=None), ValueError,
        "pairs must be given where destination has fewer slots than source, 12 for 16, got None",
    ),
    "shape": ({}, dict(pairs=[1, 2]), ValueError, "pairs must have shape (n, 2), got (2,)"),
    "shape, other format": (
        dict(kv_cache_dtype="fp8"), dict(pairs=[[1, 2, 3]]), ValueError, "pairs must have shape (n, 2), got (1, 3)",
    ),
    "dtype": ({}, dict(pairs=[[True, False]]), TypeError, "pairs must have dtype int32 or int64, got bool"),
    "requantise": ({}, dict(requantise="no"), TypeError, "requantise must be None, True or False, got 'no'"),
    "formats": (dict(kv_cache_dtype="fp8"), dict(requantise=False), ValueError, None),
    "backend": ({}, dict(backend="cuda"), ValueError, None),
}  # fmt: skip


@pytest.mark.parametrize(("extents", "options", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_calls(extents, options, kind, text):
    said = []
    for module, convert in ((jaxkv, np.array), (torchkv, torch.tensor)):
        old = module.PagedKVCache.create(**SIZES, num_blocks=4, block_size=4)
        new = module.PagedKVCache.create(**(SIZES | dict(num_blocks=4, block_size=4) | extents))
        given = {"pairs": [[0, 1]]} | options
        pairs = given.pop("pairs")
        with pytest.raises(kind) as error:
            old.relayout(new, None if pairs is None else convert(pairs), **given)
        said.append(str(error.value).replace("xla", "torch"))
    assert said[0] == said[1] == (text or said[0])


def test_no_cache():
    for module in (jaxkv, torchkv):
        cache = module.PagedKVCache.create(**SIZES, num_blocks=1, block_size=1)
        for pair in ((cache, cache.caches), (cache.caches, cache)):
            with pytest.raises(TypeError, match="PagedKVCache"):
                module.relayout(*pair)


def test_memory_that_is_shared():
    """torch: in place, so no byte may be both caches'. JAX: values, which never share any."""
    ours = torchkv.PagedKVCache.create(**SIZES, num_blocks=2, block_size=2)
    for backend in ("torch", "interpret"):
        with pytest.raises(ValueError, match="source") as error:
            ours.relayout(ours, torch.tensor([[0, 1]]), backend=backend)
        assert "destination's key_cache" in str(error.value)
    theirs = jaxkv.PagedKVCache.create(**SIZES, num_blocks=2, block_size=2)
    theirs = theirs.write(
        np.ones((1, 2, 32), "float32").astype("bfloat16"), np.ones((1, 2, 32), "bfloat16"), np.array([0])
    )
    assert np.asarray(theirs.relayout(theirs, np.array([[0, 1]])).caches[0][0, 1]).all()


def test_strided_tensors():
    rng = np.random.default_rng(9)
    source, destination = two(rng, {}, dict(layout="HND"))
    want = move(torchkv, "torch", source, destination, np.array(PAIRS))
    for backend in ("torch", "interpret"):
        caches = []
        for spec, arrays in (source, destination):
            wide = [
                torch.zeros(*a.shape[:-1], 2 * a.shape[-1], dtype=torch.bfloat16)[..., : a.shape[-1]] for a in arrays
            ]
            cache = cache_of(torchkv, spec, arrays)
            for strided, tensor in zip(wide, cache.caches, strict=True):
                strided.copy_(tensor)
            caches.append(torchkv.PagedKVCache(tuple(wide), spec))
        pairs = torch.tensor(PAIRS).repeat(1, 2)[:, ::3]  # source, then destination, not side by side
        caches[0].relayout(caches[1], pairs, backend=backend)
        for got, array in zip(caches[1].caches, want, strict=True):
            np.testing.assert_array_equal(bits(from_torch(got.contiguous())), bits(array))


def test_pairs_past_the_end_of_a_slice_are_not_moved():
    source, destination = two(np.random.default_rng(10), {}, dict(layout="HND"))
    want = move(torchkv, "torch", source, destination, np.array(PAIRS[:5]))
    for backend in ("torch", "interpret"):
        old, new = cache_of(torchkv, *source), cache_of(torchkv, *destination)
        old.relayout(new, torch.tensor([*PAIRS[:5], (1, 1), (2, 2)])[:5], backend=backend)
        for got, array in zip(memory_of(new), want, strict=True):
            np.testing.assert_array_equal(bits(got), bits(array))
