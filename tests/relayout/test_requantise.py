"""relayout between formats: one kernel reads and writes, bit for bit as the oracle's read, then the oracle's write."""

import jax
import numpy as np
import pytest

import jaxkv
import torchkv
from kvcore.layout import CONSTANTS as LAYOUTS
from kvcore.layout import CacheLayout
from tests.cases.arrays import bits
from tests.cases.relayouts import (
    PAIRS,
    SIZES,
    WAYS,
    arrays_of,
    assert_requantises,
    cache_of,
    memory_of,
    requantise,
    requantised,
)

FORMATS = {
    "bfloat16": {},
    "float16": dict(dtype="float16"),
    "float32": dict(dtype="float32"),
    "fp8": dict(kv_cache_dtype="fp8"),
    "fp8_e5m2": dict(kv_cache_dtype="fp8_e5m2"),
    "fp8_e4m3fnuz": dict(kv_cache_dtype="fp8_e4m3fnuz"),
    "int8": dict(kv_cache_dtype="int8"),
    "int4": dict(kv_cache_dtype="int4"),
    "nvfp4": dict(kv_cache_dtype="nvfp4"),
    "int8 of tokens": dict(kv_cache_dtype="int8", per_token_head=True),
    "fp8 of tokens": dict(kv_cache_dtype="fp8", per_token_head=True),
    "int4 of tokens": dict(kv_cache_dtype="int4", per_token_head=True),
}
HEADS = [name for name in LAYOUTS if not CacheLayout.of(name).latent]
INTERPRETED = {name: way for name, way in WAYS.items() if "interpret" in name}


def two(rng, source, destination, **more):
    blocks = dict(num_blocks=4, block_size=4), dict(num_blocks=5, block_size=3)
    return [
        arrays_of(rng, **(SIZES | of | more | given)) for of, given in zip(blocks, (source, destination), strict=True)
    ]


def scales_of(rng, kind, heads, layers):
    """Static scales of keys and of values, of the source and of the destination."""
    shapes = {"none": None, "one": (), "heads": (heads,), "layers": (layers or 1, heads)[layers is None :]}
    if shapes[kind] is None:
        return (None, None), (None, None)
    made = [np.asarray(rng.uniform(0.01, 2, shapes[kind]), np.float32) for _ in range(4)]
    return made[:2], made[2:]


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("scales", ["none", "one", "heads", "layers"])
@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("old", FORMATS)
def test_formats(old, new, scales, layers):
    """Random bits: numbers, infinities and NaN of every format."""
    rng = np.random.default_rng(0)
    heads = 3
    source, destination = two(rng, FORMATS[old], FORMATS[new] | dict(layout="HND"), num_layers=layers, num_heads=heads)
    pairs = np.array(PAIRS, np.int64 if layers else np.int32)
    assert_requantises(source, destination, pairs, scales_of(rng, scales, heads, layers))


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("new", ["fp8", "int8 of tokens", "nvfp4", "float32"])
@pytest.mark.parametrize("layout", HEADS)
def test_layouts(layout, new, layers):
    if new == "nvfp4" and layout == "HEAD_MAJOR":
        new = "int4"  # nvfp4 wants dim to be the last axis
    rng = np.random.default_rng(1)
    for there, here in ((layout, "NHD"), ("HND", layout)):
        source, destination = two(rng, dict(layout=here), FORMATS[new] | dict(layout=there), num_layers=layers)
        assert_requantises(source, destination, np.array(PAIRS), ways=INTERPRETED)
        back, again = two(rng, FORMATS[new] | dict(layout=here), dict(layout=there), num_layers=layers)
        assert_requantises(back, again, np.array(PAIRS), ways=INTERPRETED)


@pytest.mark.parametrize("sizes", [(32, 16), (16, 48), (80, 80)])
@pytest.mark.parametrize("new", ["fp8", "int4 of tokens", "nvfp4"])
def test_head_sizes(sizes, new):
    """V of another size, and what is no power of two; in one array of both, too."""
    rng = np.random.default_rng(2)
    size = dict(zip(("head_size", "head_size_v"), sizes, strict=True))
    for layouts in (("NHD", "HND"), ("PACKED_NHD", "PACKED_NHD")):
        source, destination = two(
            rng, dict(layout=layouts[0]), FORMATS[new] | dict(layout=layouts[1]), num_heads=5, **size
        )
        assert_requantises(source, destination, np.array(PAIRS), ways=INTERPRETED)


@pytest.mark.parametrize("blocks", [(3, 4), (12, 1), (1, 12), (2, 9)])
@pytest.mark.parametrize("new", ["fp8", "int8 of tokens"])
def test_all_slots(blocks, new):
    num_blocks, block_size = blocks
    destination = FORMATS[new] | dict(num_blocks=num_blocks, block_size=block_size, layout="HND")
    source, destination = two(np.random.default_rng(3), dict(num_blocks=4, block_size=3), destination, num_layers=2)
    assert_requantises(source, destination, None)


def test_many_slots_take_several_programs():
    rng = np.random.default_rng(4)
    destination = dict(num_blocks=50, block_size=3, kv_cache_dtype="fp8")
    source, destination = two(rng, dict(num_blocks=32), destination, num_layers=2, head_size=8, num_heads=6)
    pairs = np.stack([rng.permutation(128), rng.permutation(150)[:128]], axis=1)
    want = assert_requantises(source, destination, pairs)
    for array, before in zip(want, destination[1], strict=True):
        assert (array != before).any()
        assert (array == before).any()


@pytest.mark.parametrize("pairs", [np.zeros((0, 2), np.int32), np.full((3, 2), -1)])
def test_nothing_to_move(pairs):
    source, destination = two(np.random.default_rng(5), {}, FORMATS["fp8"])
    for array, before in zip(assert_requantises(source, destination, pairs), destination[1], strict=True):
        np.testing.assert_array_equal(array, before)


def test_without_kernels_a_chunk_of_slots_is_read_at_a_time(monkeypatch):
    monkeypatch.setattr("kvcore.contract.relayout._CHUNK_ELEMENTS", 4 * 2 * 2 * 32)
    jax.clear_caches()  # what was traced knows other chunks
    rng = np.random.default_rng(6)
    source, destination = two(rng, FORMATS["nvfp4"], FORMATS["int8 of tokens"], num_layers=2)
    ways = {name: way for name, way in WAYS.items() if name not in INTERPRETED}
    assert_requantises(source, destination, np.array(PAIRS), ways=ways)
    jax.clear_caches()


def test_rounding_once_where_the_destination_is_a_float():
    """Of quantised elements, what is written is rounded from float32 to the destination's dtype, and not on the way."""
    rng = np.random.default_rng(7)
    scales = [np.float32([1.1]), np.float32([0.7])], (None, None)
    source, destination = two(rng, FORMATS["int8"], FORMATS["float16"])
    assert_requantises(source, destination, np.array(PAIRS), scales)


# ---- transformations and shardings of JAX


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("batched", ["caches", "caches and scales"])
def test_vmap(batched, backend):
    import jax.numpy as jnp

    rng = np.random.default_rng(8)
    pairs = np.array(PAIRS, np.int32)
    sets = [two(rng, FORMATS["int8"], FORMATS["fp8"]) for _ in range(3)]
    scales = [scales_of(rng, "heads", 2, None) for _ in sets]
    if batched == "caches":
        scales = scales[:1] * 3

    def caches(side):
        made = [cache_of(jaxkv, *each[side]) for each in sets]
        return jax.tree.map(lambda *a: jnp.stack(a), *made)

    def move(old, new, of_old, of_new):
        old, new = (jaxkv.PagedKVCache(c.caches, c.spec, *s) for c, s in ((old, of_old), (new, of_new)))
        return old.relayout(new, pairs, backend=backend)

    if batched == "caches":
        of_scales, axes = [tuple(map(jnp.asarray, s)) for s in scales[0]], None
    else:
        of_scales, axes = [tuple(jnp.stack([s[i][j] for s in scales]) for j in (0, 1)) for i in (0, 1)], 0
    got = jax.vmap(move, (0, 0, axes, axes))(caches(0), caches(1), *of_scales)
    for i, (source, destination) in enumerate(sets):
        for array, want in zip(memory_of(got), requantised(source, destination, pairs, scales[i]), strict=True):
            np.testing.assert_array_equal(bits(array[i]), bits(want))


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("new", ["fp8", "int8 of tokens"])
def test_heads_on_eight_devices(new, axis_type):
    import re

    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    rng = np.random.default_rng(9)
    source, destination = two(rng, FORMATS["int8"], FORMATS[new] | dict(layout="HND"), num_heads=8, num_layers=2)
    scales = scales_of(rng, "layers", 8, 2)
    if new != "fp8":
        scales = scales[0], (None, None)
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(AxisType[axis_type],))

    def put(spec, arrays, scales):
        axes = [*spec.layout.arrays, *([a[:-1] for a in spec.scale_layout.arrays] if spec.scale_layout else [])]
        arrays = [
            jax.device_put(array, NamedSharding(mesh, P(*("tp" if "head" in axis else None for axis in names))))
            for array, names in zip(arrays, axes, strict=True)
        ]
        cache = cache_of(jaxkv, spec, arrays)
        if spec.scale_layout is not None or scales[0] is None:
            return cache
        return jaxkv.PagedKVCache(
            cache.caches, spec, *(jax.device_put(s, NamedSharding(mesh, P(None, "tp"))) for s in scales)
        )

    with jax.set_mesh(mesh):
        old, new_cache = (put(*cache, s) for cache, s in zip((source, destination), scales, strict=True))
        pairs = jax.device_put(np.array(PAIRS, np.int32), NamedSharding(mesh, P(None, None)))
        step = jax.jit(lambda new, old, pairs: old.relayout(new, pairs), donate_argnums=0)
        compiled = step.lower(new_cache, old, pairs).compile()
        got = compiled(new_cache, old, pairs)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    for array, want in zip(memory_of(got), requantised(source, destination, PAIRS, scales), strict=True):
        np.testing.assert_array_equal(bits(array), bits(want))


def test_export_of_any_number_of_pairs():
    pairs = np.array(PAIRS, np.int32)
    source, destination = two(np.random.default_rng(14), FORMATS["int8"], FORMATS["fp8"])

    def call(old, new, pairs):
        caches = (jaxkv.PagedKVCache(tuple(c), s[0]) for c, s in ((old, source), (new, destination)))
        return next(caches).relayout(next(caches), pairs).caches

    shapes = [[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays] for _, arrays in (source, destination)]
    n = jax.export.symbolic_shape("n, 2")
    exported = jax.export.export(jax.jit(call))(*shapes, jax.ShapeDtypeStruct(n, np.int32))
    for some in (pairs, pairs[:3]):
        got = exported.call(source[1], destination[1], some)
        for array, want in zip(got, requantised(source, destination, some), strict=True):
            np.testing.assert_array_equal(np.asarray(array), want)


def test_heads_larger_than_a_tile():
    source, destination = two(np.random.default_rng(15), {}, FORMATS["int8 of tokens"], head_size=4096, num_heads=1)
    assert_requantises(source, destination, np.array(PAIRS), ways=INTERPRETED)


# ---- torch


def test_torch_knows_the_op():
    import torch

    rng = np.random.default_rng(10)
    source, destination = two(rng, FORMATS["int8"], FORMATS["fp8"] | dict(layout="HND"))
    old, new = cache_of(torchkv, *source), cache_of(torchkv, *destination)
    scales = [torch.rand(2) for _ in range(4)]
    arguments = (
        *new.caches, None, None, list(old.caches), torch.tensor(PAIRS), "fp8", new.spec.layout.pattern, None,
        old.spec.layout.pattern, None, old.spec.head_size, None, None, "int8", *scales,
    )  # fmt: skip
    results = torch.library.opcheck(torch.ops.torchkv.relayout.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_vmap_of_torch():
    import torch

    from tests.cases.arrays import from_torch

    rng = np.random.default_rng(11)
    sets = [two(rng, {}, FORMATS["fp8"]) for _ in range(2)]
    olds, news = ([cache_of(torchkv, *pair[i]) for pair in sets] for i in (0, 1))
    stacks = [torch.stack([c.caches[i] for c in caches]) for caches in (olds, news) for i in (0, 1)]

    def one(key, value, key_cache, value_cache):
        old = torchkv.PagedKVCache((key, value), olds[0].spec)
        old.relayout(torchkv.PagedKVCache((key_cache, value_cache), news[0].spec), torch.tensor(PAIRS))
        return key_cache

    torch.func.vmap(one)(*stacks)
    for i, pair in enumerate(sets):
        for got, want in zip(stacks[2:], requantised(*pair, PAIRS), strict=True):
            np.testing.assert_array_equal(bits(from_torch(got[i])), bits(want))


# ---- bad calls


BAD = {
    "shape of a scale": (
        dict(k_scale=np.ones(5, np.float32)), ValueError,
        r"k_scale must have shape \(\), \(1,\) or \(2,\), got \(5,\)",
    ),
    "dtype of a scale": (
        dict(v_scale=np.ones(1, np.float16)), TypeError, "v_scale must have dtype float32, got float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("scales", "kind", "text"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("side", [0, 1])
def test_bad_scales(scales, kind, text, side):
    import torch

    pair = two(np.random.default_rng(12), FORMATS["int8"], FORMATS["fp8"])
    for module, convert in ((jaxkv, np.asarray), (torchkv, torch.from_numpy)):
        caches = [cache_of(module, *cache) for cache in pair]
        given = {name: convert(scale) for name, scale in scales.items()}
        caches[side] = module.PagedKVCache(caches[side].caches, caches[side].spec, **given)
        with pytest.raises(kind, match=f"^{text}$"):
            caches[0].relayout(caches[1], convert(np.array(PAIRS)))


def test_scales_that_are_none():
    import torch

    for module in (jaxkv, torchkv):
        pair = [cache_of(module, *cache) for cache in two(np.random.default_rng(16), FORMATS["int8"], FORMATS["fp8"])]
        old = module.PagedKVCache(pair[0].caches, pair[0].spec, "big")
        with pytest.raises(TypeError, match=r"^k_scale must be a number or an array of float32, got 'big'$"):
            old.relayout(pair[1], [] if module is jaxkv else torch.zeros(0, 2, dtype=torch.int32))


def test_what_is_not_named_stays():
    """The kernel writes no byte beside the rows that move: destination arrays are poison elsewhere."""
    rng = np.random.default_rng(13)
    source, destination = two(rng, {}, FORMATS["int8 of tokens"])
    for way in INTERPRETED.values():
        got = requantise(*way, source, destination, np.array([[0, 7]]))
        for array, before in zip(got, destination[1], strict=True):
            changed = np.argwhere((bits(array) != bits(before)).reshape(5, 3, -1).any(-1))
            assert changed.tolist() == [[2, 1]]
