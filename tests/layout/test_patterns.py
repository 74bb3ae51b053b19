"""Patterns of layouts: what they may say, what they are called, and the errors of the others."""

import dataclasses
import json
import pickle

import pytest

from kvcore.layout import CacheLayout
from tests.cases.layouts import CONSTANTS, VLLM, WITH_LAYER


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


# ---- as JSON


@pytest.mark.parametrize("pattern", [*CONSTANTS.values(), "block slot latent", *WITH_LAYER, *VLLM.values()])
def test_json_and_back(pattern):
    layout = CacheLayout(pattern)
    text = layout.to_json()
    assert CacheLayout.from_json(text) == layout
    assert CacheLayout.from_json(text.encode()) == layout
    assert CacheLayout.from_json(json.dumps(json.loads(text), indent=2)) == layout
    parsed = json.loads(text)
    assert parsed["version"] == 1
    assert parsed["arrays"] == [[list(axis) for axis in axes] for axes in layout.arrays]


def test_json_is_what_it_was():
    """Other programs have read it."""
    assert CacheLayout.HEAD_MAJOR.to_json() == (
        '{"version": 1, "arrays": [[["block"], ["head"], ["dim/x"], ["slot"], ["x"]], '
        '[["block"], ["head"], ["dim"], ["slot"]]]}'
    )
    assert CacheLayout.NHD.to_json() == (
        '{"version": 1, "arrays": [[["block"], ["slot"], ["head"], ["dim"]], [["block"], ["slot"], ["head"], ["dim"]]]}'
    )
    assert CacheLayout("block slot (kv head) dim").to_json() == (
        '{"version": 1, "arrays": [[["block"], ["slot"], ["kv", "head"], ["dim"]]]}'
    )


def test_two_arrays_of_one_order_are_one_pattern():
    twice = CacheLayout("block slot head dim,  block slot head dim")
    assert twice == CacheLayout.NHD
    assert twice.pattern == "block slot head dim"
    assert twice.arrays == CacheLayout.NHD.arrays


AXES_TEXT = "arrays must be one list or two, of axes, each a list of names, got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text must be JSON as from CacheLayout.to_json, got ''"),
        ("block slot head dim", "text must be JSON as from CacheLayout.to_json, got 'block slot head dim'"),
        (b"\xff", "text must be JSON as from CacheLayout.to_json, got b'\\xff'"),
        ("[1]", "text must be an object of version and arrays, got '[1]'"),
        ('{"version": 1}', "text must be an object of version and arrays, got '{\"version\": 1}'"),
        ('{"version": 2, "arrays": []}', "version must be 1, got 2"),
        ('{"version": true, "arrays": []}', "version must be 1, got True"),
        ('{"version": "1", "arrays": []}', "version must be 1, got '1'"),
        ('{"version": 1, "arrays": []}', AXES_TEXT + "[]"),
        ('{"version": 1, "arrays": {"0": []}}', AXES_TEXT + "{'0': []}"),
        ('{"version": 1, "arrays": [["block", "slot"]]}', AXES_TEXT + "[['block', 'slot']]"),
        ('{"version": 1, "arrays": [[["block, slot"]]]}', AXES_TEXT + "[[['block, slot']]]"),
        ('{"version": 1, "arrays": [[["block slot"]]]}', AXES_TEXT + "[[['block slot']]]"),
        ('{"version": 1, "arrays": [[["block"], []]]}', AXES_TEXT + "[[['block'], []]]"),
        ('{"version": 1, "arrays": [[["block"], [3]]]}', AXES_TEXT + "[[['block'], [3]]]"),
        ('{"version": 1, "arrays": [[["block"], ["dim"]]]}', "layout 'block dim' must name axis slot"),
        (
            '{"version": 1, "arrays": [[["block"], ["slot", "head"], ["dim"]]]}',
            "layout 'block (slot head) dim' may join only kv with one other axis, got (slot head)",
        ),
    ],
)
def test_wrong_json(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CacheLayout.from_json(text)
    assert str(error.value) == message


@pytest.mark.parametrize("text", [None, 3, {"version": 1}])
def test_json_is_text(text):
    with pytest.raises(TypeError) as error:
        CacheLayout.from_json(text)
    assert str(error.value) == f"text must be JSON as from CacheLayout.to_json, got {text!r}"
