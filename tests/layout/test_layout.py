import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.arrays import contiguous_strides
from kvcore.layout import CacheLayout
from kvcore.placement import Address
from tests.cases.layouts import CONSTANTS, VLLM, WITH_LAYER, axes_of, numpy_places

# ---- addresses, against NumPy


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


@pytest.mark.parametrize("pattern", [*CONSTANTS.values(), *WITH_LAYER, *VLLM.values()])
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


@pytest.mark.parametrize("pattern", [*CONSTANTS.values(), *WITH_LAYER, *VLLM.values()])
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
