import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.arrays import contiguous_strides
from kvcore.layout import CacheLayout
from kvcore.placement import Address

CONSTANTS = {
    "NHD": "block slot head dim",
    "HND": "block head slot dim",
    "HEAD_MAJOR": "block head dim/x slot x, block head dim slot",
    "PALLAS": "head block slot dim",
    "KV_NHD": "kv block slot head dim",
    "BLOCK_KV_NHD": "block kv slot head dim",
    "BLOCK_KV_HND": "block kv head slot dim",
    "PACKED_NHD": "block slot head k+v",
    "PACKED_HND": "block head slot k+v",
    "INTERLEAVED": "block slot (head kv) dim",
}
WITH_LAYER = [", ".join(f"layer {array.strip()}" for array in p.split(",")) for p in CONSTANTS.values()]


# ---- addresses, against NumPy


def axes_of(pattern):
    """Axes of each array, each axis a list of names, by means other than the implementation's."""
    arrays = [
        [axis.strip("()").split("&") for axis in re.sub(r"(\([^ ]+) ", r"\1&", array).split()]
        for array in pattern.split(",")
    ]
    single = {"kv", "k+v"} & {name for axis in arrays[0] for name in axis}
    return arrays if single or len(arrays) == 2 else arrays * 2


def numpy_view(array, axes):
    """The array with axes [kv, layer, block, slot, head, dim], by reshaping and transposing only."""
    names, shape = [], []
    for axis, size in zip(axes, array.shape, strict=True):
        rest = size if len(axis) == 1 else size // 2
        names += axis
        shape += [2 if name == "kv" and len(axis) == 2 else rest for name in axis]
    array = array.reshape(shape)
    for name in ("kv", "layer"):
        if name not in names:
            array, names = array[None], [name, *names]
    last = ["dim/x", "x"] if "x" in names else ["k+v" if "k+v" in names else "dim"]
    array = array.transpose([names.index(n) for n in ["kv", "layer", "block", "slot", "head", *last]])
    return array.reshape(*array.shape[:5], -1)


def numpy_places(arrays, axes, head_size):
    """Positions of K's and of V's elements from each array's first, `[layer, block, slot, head, dim]`."""
    views = [numpy_view(a - a[(0,) * a.ndim], x) for a, x in zip(arrays, axes, strict=True)]
    if len(views) == 2:
        return views[0][0], views[1][0]
    if len(views[0]) == 2:
        return views[0][0], views[0][1]
    return views[0][0, ..., :head_size], views[0][0, ..., head_size:]


def strides_of(array):
    return tuple(s // array.itemsize for s in array.strides)


def assert_places(pattern, arrays, *, head_size, strides):
    layout = CacheLayout(pattern)
    placement = layout.place([a.shape for a in arrays], strides, head_size=head_size)
    for at, want in zip(
        (placement.key, placement.value), numpy_places(arrays, axes_of(pattern), head_size), strict=True
    ):
        got = at.of(*np.ogrid[tuple(slice(n) for n in want.shape)])
        np.testing.assert_array_equal(got, want)
        assert all(type(n) is int for n in at)
        assert at.of(*(n - 1 for n in want.shape)) == want[(-1,) * 5]
    layers, *rest, size = want.shape
    assert placement.extents == (layers if layout.has_layer else None, *rest, head_size, size)


@pytest.mark.parametrize("pattern", [*CONSTANTS.values(), *WITH_LAYER])
def test_addresses_of_every_pattern(pattern):
    layout = CacheLayout(pattern)
    shapes = layout.shapes(
        num_blocks=5,
        block_size=4,
        num_heads=3,
        head_size=6,
        head_size_v=10 if "dim" not in pattern or "," in pattern else 6,
        num_layers=2 if layout.has_layer else None,
        x=2 if "x" in pattern else None,
    )
    arrays = [np.arange(math.prod(shape)).reshape(shape) for shape in shapes]
    assert_places(pattern, arrays, head_size=6, strides=None)
    assert_places(pattern, arrays, head_size=6, strides=[None] * len(arrays))
    assert_places(pattern, arrays, head_size=6, strides=[strides_of(a) for a in arrays])


@st.composite
def caches(draw, strided):
    """A pattern with axes in any order, and arrays for it; elements are their positions in memory."""
    kind = draw(st.sampled_from(["one pattern", "two patterns", "kv", "joined", "k+v"]))
    small = st.integers(1, 3)
    sizes = {name: draw(small) for name in ("layer", "block", "slot", "head", "dim/x", "x")} | {"kv": 2}
    names = ["block", "slot", "head"] + ["layer"] * draw(st.booleans())

    def dims(sizes_of):
        if kind == "k+v":
            return ["k+v"]
        packed = draw(st.booleans())
        sizes_of["dim"] = sizes_of["dim/x"] * sizes_of["x"]
        return ["dim/x", "x"] if packed else ["dim"]

    arrays, patterns = [], []
    first = None
    for i in range(2 if kind in ("one pattern", "two patterns") else 1):
        own = sizes | ({} if i == 0 else {"dim/x": draw(small)})
        if first is None or kind == "two patterns":
            axes = [[name] for name in draw(st.permutations(names + dims(own) + ["kv"] * (kind == "kv")))]
            if kind == "joined":
                j = draw(st.integers(0, len(axes) - 1))
                axes[j] = draw(st.permutations([*axes[j], "kv"]))
            first = axes
        own["dim"] = own["dim/x"] * own["x"]
        own["k+v"] = own["dim"] + draw(small)
        shape = [math.prod(own[name] for name in axis) for axis in first]
        arrays.append(draw(memory(shape)) if strided else np.arange(math.prod(shape)).reshape(shape))
        spelled = " ".join(a[0] if len(a) == 1 else f"({' '.join(a)})" for a in first)
        patterns.append(spelled)
        if i == 0:
            head_size = own["dim"]
    if kind == "one pattern":
        patterns = patterns[:1]
    return ", ".join(patterns), arrays, head_size


@st.composite
def memory(draw, shape):
    """A view, of this shape, of a larger array whose axes lie in any order; elements as for `caches`."""
    first = [draw(st.integers(0, 1)) for _ in shape]
    step = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    more = [draw(st.integers(0, 1)) for _ in shape]
    whole = [f + n * s + m for f, n, s, m in zip(first, shape, step, more, strict=True)]
    order = draw(st.permutations(range(len(shape))))
    array = np.arange(math.prod(whole)).reshape([whole[i] for i in order])
    array = array.transpose([order.index(i) for i in range(len(shape))])
    return array[tuple(slice(f, f + n * s, s) for f, n, s in zip(first, shape, step, strict=True))]


@settings(max_examples=300, deadline=None)
@given(caches(strided=False))
def test_addresses_of_any_order_of_axes(drawn):
    pattern, arrays, head_size = drawn
    assert_places(pattern, arrays, head_size=head_size, strides=None)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(caches(strided=True))
def test_addresses_of_arrays_with_strides(drawn):
    pattern, arrays, head_size = drawn
    assert_places(pattern, arrays, head_size=head_size, strides=[strides_of(a) for a in arrays])


@given(st.lists(st.integers(1, 5), max_size=6))
def test_contiguous_strides_are_numpys(shape):
    assert contiguous_strides(shape) == strides_of(np.empty(shape, np.int64))


def test_address_counts_runs_of_x():
    at = Address(offset=1000, layer=500, block=100, slot=20, head=10, dim=7, x=4, x_stride=2)
    assert at.of(1, 2, 3, 4, 9) == 1000 + 500 + 200 + 60 + 40 + 2 * 7 + 1 * 2


@pytest.mark.parametrize("pattern", [*CONSTANTS.values(), *WITH_LAYER])
def test_caches_without_blocks_do_not_overlap(pattern):
    layout = CacheLayout(pattern)
    shapes = layout.shapes(
        num_blocks=1,
        block_size=2,
        num_heads=3,
        head_size=4,
        num_layers=2 if layout.has_layer else None,
        x=2 if "x" in pattern else None,
    )
    empty = [
        tuple(0 if "block" in axis else n for axis, n in zip(axes, shape, strict=True))
        for axes, shape in zip(layout.arrays, shapes, strict=True)
    ]
    assert layout.place(empty, head_size=4).extents.num_slots == 0


# ---- shapes


@pytest.mark.parametrize(
    ("layout", "more", "shapes"),
    [
        ("NHD", {}, ((7, 16, 3, 24), (7, 16, 3, 24))),
        ("NHD", {"head_size_v": 40}, ((7, 16, 3, 24), (7, 16, 3, 40))),
        ("HND", {}, ((7, 3, 16, 24), (7, 3, 16, 24))),
        ("HEAD_MAJOR", {"x": 8}, ((7, 3, 3, 16, 8), (7, 3, 24, 16))),
        ("HEAD_MAJOR", {"x": 8, "head_size_v": 10}, ((7, 3, 3, 16, 8), (7, 3, 10, 16))),
        ("PALLAS", {}, ((3, 7, 16, 24), (3, 7, 16, 24))),
        ("KV_NHD", {}, ((2, 7, 16, 3, 24),)),
        ("BLOCK_KV_NHD", {}, ((7, 2, 16, 3, 24),)),
        ("BLOCK_KV_HND", {}, ((7, 2, 3, 16, 24),)),
        ("PACKED_NHD", {"head_size_v": 10}, ((7, 16, 3, 34),)),
        ("PACKED_HND", {"head_size_v": 10}, ((7, 3, 16, 34),)),
        ("PACKED_NHD", {}, ((7, 16, 3, 48),)),
        ("INTERLEAVED", {}, ((7, 16, 6, 24),)),
        ("layer block slot head dim", {"num_layers": 4}, ((4, 7, 16, 3, 24),) * 2),
        ("block layer slot (kv head) dim", {"num_layers": 4}, ((7, 4, 16, 6, 24),)),
        (
            "block head dim/x slot x",
            {"x": 4, "head_size_v": 8},
            ((7, 3, 6, 16, 4), (7, 3, 2, 16, 4)),
        ),
        ("block head dim slot, block head dim/x slot x", {"x": 5, "head_size_v": 10},
         ((7, 3, 24, 16), (7, 3, 2, 16, 5))),
    ],
)  # fmt: skip
def test_shapes(layout, more, shapes):
    assert CacheLayout.of(layout).shapes(num_blocks=7, block_size=16, num_heads=3, head_size=24, **more) == shapes


@pytest.mark.parametrize(
    ("layout", "more", "message"),
    [
        (
            "layer block slot head dim",
            {},
            "layout 'layer block slot head dim' needs the size of axis layer, got None",
        ),
        (
            "block head dim/x slot x",
            {},
            "layout 'block head dim/x slot x' needs the size of axis x, got None",
        ),
        ("NHD", {"num_layers": 2}, "layout 'block slot head dim' has no axis layer, got size 2 for it"),
        ("NHD", {"x": 8}, "layout 'block slot head dim' has no axis x, got size 8 for it"),
        ("NHD", {"num_blocks": 0}, "axis block must have a positive size, got 0"),
        ("NHD", {"block_size": -1}, "axis slot must have a positive size, got -1"),
        ("NHD", {"num_heads": 0}, "axis head must have a positive size, got 0"),
        ("NHD", {"head_size": 0}, "axis dim must have a positive size, got 0"),
        ("NHD", {"head_size_v": 0}, "axis dim must have a positive size, got 0"),
        (
            "layer block slot head dim",
            {"num_layers": 0},
            "axis layer must have a positive size, got 0",
        ),
        ("HEAD_MAJOR", {"x": 0}, "axis x must have a positive size, got 0"),
        ("HEAD_MAJOR", {"x": 16}, "axis x of size 16 must divide head_size = 24"),
        (
            "block head dim/x slot x",
            {"x": 8, "head_size_v": 12},
            "axis x of size 8 must divide head_size_v = 12",
        ),
        (
            "KV_NHD",
            {"head_size_v": 16},
            "layout 'kv block slot head dim' needs head_size_v = head_size along axis dim, got 16 and 24",
        ),
        (
            "INTERLEAVED",
            {"head_size_v": 16},
            "layout 'block slot (head kv) dim' needs head_size_v = head_size along axis dim, got 16 and 24",
        ),
    ],
)
def test_shapes_refuse_sizes_that_do_not_fit(layout, more, message):
    sizes = {"num_blocks": 7, "block_size": 16, "num_heads": 3, "head_size": 24} | more
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CacheLayout.of(layout).shapes(**sizes)
    assert str(error.value) == message


# ---- patterns


@pytest.mark.parametrize(("name", "pattern"), CONSTANTS.items())
def test_constants(name, pattern):
    layout = getattr(CacheLayout, name)
    assert isinstance(layout, CacheLayout)
    assert layout == CacheLayout(pattern) == CacheLayout.of(name) == CacheLayout.of(pattern)
    assert CacheLayout.of(layout) is layout
    assert str(layout) == layout.pattern == pattern
    assert repr(layout) == repr(CacheLayout(pattern)) == f"CacheLayout.{name}"
    assert eval(repr(layout)) == layout
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize("pattern", [*WITH_LAYER, "slot block head dim", "block slot head dim, block head slot dim"])
def test_a_layout_without_a_name_prints_its_pattern(pattern):
    layout = CacheLayout(pattern)
    assert str(layout) == pattern
    assert repr(layout) == f"CacheLayout('{pattern}')"
    assert eval(repr(layout)) == layout


@pytest.mark.parametrize(
    ("spelled", "pattern"),
    [
        ("  block\tslot  head\ndim ", "block slot head dim"),
        ("block slot ( head   kv ) dim", "block slot (head kv) dim"),
        ("block slot (head kv)dim", "block slot (head kv) dim"),
        ("block slot (head) dim", "block slot head dim"),
        ("block head dim/x slot x,block head dim slot", "block head dim/x slot x, block head dim slot"),
        ("block head dim/x slot x  ,  block head dim slot", "block head dim/x slot x, block head dim slot"),
    ],
)
def test_white_space_does_not_matter(spelled, pattern):
    layout = CacheLayout(spelled)
    assert layout.pattern == pattern
    assert layout == CacheLayout(pattern)
    assert hash(layout) == hash(CacheLayout(pattern))
    assert {layout: 1}[CacheLayout(pattern)] == 1


def test_layouts_of_other_orders_differ():
    layouts = {CacheLayout(p) for p in [*CONSTANTS.values(), *WITH_LAYER]}
    assert len(layouts) == 20
    assert CacheLayout.NHD != CacheLayout.HND
    assert CacheLayout.NHD != "block slot head dim"
    assert CacheLayout("block slot (head kv) dim") != CacheLayout("block slot (kv head) dim")


def test_layouts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheLayout.NHD.pattern = "block head slot dim"
    assert CacheLayout.NHD.pattern == "block slot head dim"


@pytest.mark.parametrize("name", CONSTANTS)
def test_with_layer(name):
    layout = CacheLayout.of(name)
    stacked = layout.with_layer()
    assert not layout.has_layer
    assert stacked.has_layer
    assert all(axes[0] == ("layer",) for axes in stacked.arrays)
    assert [axes[1:] for axes in stacked.arrays] == [tuple(axes) for axes in layout.arrays]
    assert stacked.with_layer() is stacked
    assert str(stacked) in WITH_LAYER
    between = CacheLayout("block layer slot head dim")
    assert between.has_layer
    assert between.with_layer() is between


@pytest.mark.parametrize(
    ("layout", "single_array", "packed"),
    [
        ("NHD", False, False),
        ("HND", False, False),
        ("HEAD_MAJOR", False, False),
        ("PALLAS", False, False),
        ("KV_NHD", True, False),
        ("BLOCK_KV_NHD", True, False),
        ("BLOCK_KV_HND", True, False),
        ("PACKED_NHD", True, True),
        ("PACKED_HND", True, True),
        ("INTERLEAVED", True, False),
        ("layer block slot head k+v", True, True),
    ],
)
def test_kinds_of_layouts(layout, single_array, packed):
    layout = CacheLayout.of(layout)
    assert layout.single_array is single_array
    assert len(layout.arrays) == (1 if single_array else 2)
    assert layout.packed is packed


UNKNOWN = "known are layer, block, slot, head, kv, dim, dim/x, x, k+v, latent"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "layout '' must name axis block"),
        ("slot head dim", "layout 'slot head dim' must name axis block"),
        ("block head dim", "layout 'block head dim' must name axis slot"),
        ("block slot dim", "layout 'block slot dim' must name axis head"),
        ("block slot head", "layout 'block slot head' must name exactly one of the axes dim, dim/x, k+v and latent"),
        (
            "block slot head dim k+v",
            "layout 'block slot head dim k+v' must name exactly one of the axes dim, dim/x, k+v and latent",
        ),
        ("block slot head dim x", "layout 'block slot head dim x' must name axes dim/x and x together"),
        ("block slot head dim/x", "layout 'block slot head dim/x' must name axes dim/x and x together"),
        ("block slot head Dim", f"layout 'block slot head Dim' has an unknown axis 'Dim'; {UNKNOWN}"),
        ("batch slot head dim", f"layout 'batch slot head dim' has an unknown axis 'batch'; {UNKNOWN}"),
        (
            "block slot (head kv dim",
            f"layout 'block slot (head kv dim' has an unknown axis '(head'; {UNKNOWN}",
        ),
        (
            "block slot head dim dim",
            "layout 'block slot head dim dim' must name axis dim once, got it 2 times",
        ),
        (
            "block slot (head head) dim",
            "layout 'block slot (head head) dim' must name axis head once, got it 2 times",
        ),
        (
            "kv block slot head k+v",
            "layout 'kv block slot head k+v' must name only one of the axes kv and k+v",
        ),
        (
            "kv block slot head dim, block slot head dim",
            "layout 'kv block slot head dim, block slot head dim' has two arrays, so neither may have axis kv",
        ),
        (
            "block slot head dim, block slot head k+v",
            "layout 'block slot head dim, block slot head k+v' has two arrays, so neither may have axis k+v",
        ),
        (
            "block slot (head layer) dim",
            "layout 'block slot (head layer) dim' may join only kv with one other axis, got (head layer)",
        ),
        (
            "block (slot head kv) dim",
            "layout 'block (slot head kv) dim' may join only kv with one other axis, got (slot head kv)",
        ),
        (
            "block slot head dim ()",
            "layout 'block slot head dim ()' may join only kv with one other axis, got ()",
        ),
        (
            "layer block slot head dim, block slot head dim",
            "layout 'layer block slot head dim, block slot head dim' must name axis layer for both arrays or for none",
        ),
        (
            "block slot head dim, block slot head dim, block slot head dim",
            "layout must have one pattern or two, got 3: "
            "'block slot head dim, block slot head dim, block slot head dim'",
        ),
        ("block slot head dim,", "layout 'block slot head dim, ' must name axis block"),
        ("block  slot head  dims", f"layout 'block slot head dims' has an unknown axis 'dims'; {UNKNOWN}"),
    ],
)
def test_wrong_patterns(pattern, message):
    for make in (CacheLayout, CacheLayout.of):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make(pattern)
        assert str(error.value) == message


@pytest.mark.parametrize("make", [CacheLayout, CacheLayout.of])
@pytest.mark.parametrize(("pattern", "shown"), [(3, "3"), (None, "None"), (["block"], "['block']"), (b"NHD", "b'NHD'")])
def test_a_pattern_is_a_string(make, pattern, shown):
    with pytest.raises(TypeError) as error:
        make(pattern)
    assert str(error.value) == f"layout must be a pattern string or a CacheLayout, got {shown}"


# ---- placing


PLACED = {
    "rank": (
        "NHD", [(7, 16, 24), (7, 16, 3, 24)], {},
        "key_cache must have 4 axes (block slot head dim), got shape (7, 16, 24)",
    ),
    "rank of the value cache": (
        "HEAD_MAJOR", [(7, 3, 3, 16, 8), (7, 3, 3, 16, 8)], {},
        "value_cache must have 4 axes (block head dim slot), got shape (7, 3, 3, 16, 8)",
    ),
    "rank of a single array": (
        "INTERLEAVED", [(7, 16, 3, 2, 24)], {},
        "kv_cache must have 4 axes (block slot (head kv) dim), got shape (7, 16, 3, 2, 24)",
    ),
    "names": (
        "NHD", [(7, 16, 3, 24), (7, 16, 3)], {"names": ("k", "v")},
        "v must have 4 axes (block slot head dim), got shape (7, 16, 3)",
    ),
    "odd heads": (
        "INTERLEAVED", [(7, 16, 3, 24)], {}, "kv_cache axis (head kv) must have an even size, got 3",
    ),
    "kv of 3": ("KV_NHD", [(3, 7, 16, 3, 24)], {}, "kv_cache axis kv must have size 2, got 3"),
    "kv of 1": ("BLOCK_KV_HND", [(7, 1, 3, 16, 24)], {}, "kv_cache axis kv must have size 2, got 1"),
    "no head_size": (
        "PACKED_NHD", [(7, 16, 3, 34)], {},
        "layout 'block slot head k+v' needs head_size to split axis k+v, got None",
    ),
    "head_size takes all": (
        "PACKED_NHD", [(7, 16, 3, 34)], {"head_size": 34},
        "kv_cache axis k+v must have a size above head_size = 34, got 34",
    ),
    "blocks differ": (
        "NHD", [(7, 16, 3, 24), (8, 16, 3, 24)], {},
        "value_cache axis block must have size 7, as in key_cache, got 8",
    ),
    "slots differ": (
        "HEAD_MAJOR", [(7, 3, 3, 16, 8), (7, 3, 24, 15)], {},
        "value_cache axis slot must have size 16, as in key_cache, got 15",
    ),
    "heads differ": (
        "HND", [(7, 3, 16, 24), (7, 4, 16, 24)], {},
        "value_cache axis head must have size 3, as in key_cache, got 4",
    ),
    "layers differ": (
        "layer block slot head dim", [(2, 7, 16, 3, 24), (1, 7, 16, 3, 24)], {},
        "value_cache axis layer must have size 2, as in key_cache, got 1",
    ),
    "blocks on one place": (
        "NHD", [(7, 16, 3, 24)] * 2, {"strides": [(0, 72, 24, 1), None]},
        "key_cache axis block with stride 0 puts its 7 elements in one place",
    ),
    "slots overlap heads": (
        "NHD", [(7, 16, 3, 24)] * 2, {"strides": [None, (1152, 71, 24, 1)]},
        "value_cache axis slot with stride 71 overlaps the axes inside it, which reach 72 elements",
    ),
    "K overlaps V": (
        "KV_NHD", [(2, 7, 16, 3, 24)], {"strides": [(8063, 1152, 72, 24, 1)]},
        "kv_cache axis kv with stride 8063 overlaps the axes inside it, which reach 8064 elements",
    ),
    "K overlaps V between heads": (
        "INTERLEAVED", [(7, 16, 6, 24)], {"strides": [(6 * 16 * 24, 6 * 24, 20, 1)]},
        "kv_cache axis kv with stride 20 overlaps the axes inside it, which reach 24 elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "shapes", "more", "message"), PLACED.values(), ids=PLACED)
def test_arrays_that_do_not_fit(layout, shapes, more, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CacheLayout.of(layout).place(shapes, **more)
    assert str(error.value) == message


def test_strides_of_axes_of_size_1_do_not_matter():
    placement = CacheLayout.NHD.place([(1, 4, 1, 8)] * 2, [(0, 8, 3, 1), (1, 8, 0, 1)])
    assert placement.extents == (None, 1, 4, 1, 8, 8)


def test_key_and_value_cache_have_strides_of_their_own():
    placement = CacheLayout.NHD.place([(7, 4, 3, 8)] * 2, [(96, 24, 8, 1), (1000, 50, 10, 1)])
    assert placement.key == Address(0, 0, 96, 24, 8, 1, 1, 0)
    assert placement.value == Address(0, 0, 1000, 50, 10, 1, 1, 0)


def test_describe_two_arrays():
    assert CacheLayout.HND.describe(num_blocks=1024, block_size=16, num_heads=8, head_size=128) == (
        "key_cache    block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1\n"
        "value_cache  block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1"
    )


def test_describe_packed_runs():
    assert CacheLayout.HEAD_MAJOR.describe(num_blocks=2, block_size=16, num_heads=8, head_size=128, x=8) == (
        "key_cache    block 2 × 16384 | head 8 × 2048 | dim/x 16 × 128 | slot 16 × 8 | x 8 × 1\n"
        "value_cache  block 2 × 16384 | head 8 × 2048 | dim 128 × 16 | slot 16 × 1"
    )


def test_describe_single_arrays():
    sizes = {"num_blocks": 2, "block_size": 16, "num_heads": 8, "head_size": 128}
    assert CacheLayout.INTERLEAVED.describe(**sizes) == (
        "kv_cache  block 2 × 32768 | slot 16 × 2048 | (head kv) 16 × 128 | dim 128 × 1"
    )
    assert CacheLayout.PACKED_NHD.with_layer().describe(**sizes, head_size_v=64, num_layers=3) == (
        "kv_cache  layer 3 × 49152 | block 2 × 24576 | slot 16 × 1536 | head 8 × 192 | k+v 192 × 1"
    )


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32])
def test_extents_of_numpy_do_not_overflow(kind):
    sizes = {"num_blocks": 100, "block_size": 16, "num_heads": 90, "head_size": 120}
    for layout in (CacheLayout.INTERLEAVED, CacheLayout.PACKED_NHD):
        got = layout.shapes(**{n: kind(size) for n, size in sizes.items()})
        assert got == layout.shapes(**sizes)
        assert all(type(n) is int for shape in got for n in shape)
