"""CacheLayout.draw: each element of K and V is in the picture once, where NumPy finds it, in SVG and in text."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.layout import CacheLayout
from kvcore.svg import DARK, LIGHT, Canvas
from tests.cases.drawings import SVG, assert_stands_on_its_own
from tests.cases.layouts import CONSTANTS, VLLM, WITH_LAYER, axes_of, numpy_places

PATTERNS = [
    *CONSTANTS.values(), *WITH_LAYER, *VLLM.values(), "block slot latent", "layer block slot latent",
    "slot latent layer block", "block x slot (head kv) dim/x", "block slot dim head, head x block slot dim/x",
]  # fmt: skip


def sizes_of(layout, **sizes):
    """Extents that no two axes share, where the layout lets them."""
    few = {"num_blocks": 2, "block_size": 3, "num_heads": 1 if layout.latent else 2, "head_size": 4}
    few |= {"head_size_v": 2} if layout.packed or layout.latent or "," in layout.pattern else {}
    few |= {"num_layers": 2} if layout.has_layer else {}
    return few | ({"x": 2} if re.search(r"\bx\b", layout.pattern) else {}) | sizes


def elements_by_numpy(layout, sizes):
    """What each array of the layout has at each offset: elements (K or V, layer, block, place, head, dim)."""
    shapes = layout.shapes(**sizes)
    arrays, axes = [np.arange(math.prod(shape)).reshape(shape) for shape in shapes], axes_of(layout.pattern)
    if layout.latent:  # a head of K, whose first elements are V
        axes = [[*([n] for n in layout.pattern.replace("latent", "dim").split()), ["head"]]]
        key, _ = numpy_places([arrays[0][..., None]] * 2, axes * 2, None)
        places = key, key[..., : sizes["head_size_v"]]
    else:
        places = numpy_places(arrays, axes, sizes["head_size"])
    found = [[[] for _ in range(array.size)] for array in arrays]
    for kv, cells, place in zip("KV", (found[0], found[-1]), places, strict=True):
        for index in np.ndindex(place.shape):
            cells[place[index]].append((kv, *index))
    return found


def arrays_in_text(picture):
    """The same as the text has it, and whether each cell is pointed out."""
    found = []
    for section in picture.text.split("\n\n")[1:]:
        heading, *lines = section.split("\n")
        cells, rows = [], {}
        for line in lines:
            name, _, body = line.partition("│")
            name = name.strip()
            if name.startswith("offset"):
                labels = re.sub("[│ ]+", " ", rows[list(rows)[-1 - ("token" in rows)]]).split()
                width, rest = divmod(len(body := next(iter(rows.values()))), len(labels))
                assert rest == 0
                assert {len(each) for each in rows.values()} == {len(body)}
                cells += [cell_in_text(rows, i * width, heading) for i in range(len(labels))]
                rows = {}
            elif not name.startswith("slot ") or "element" not in name:
                rows[name] = body
        found.append(cells)
    return found


def cell_in_text(rows, column, heading):
    """The elements of the cell at a column of a row's lines, and whether it is pointed out."""
    index = {"kv": {"key_cache": "K", "value_cache": "V"}.get(heading.split()[0]), "layer": 0, "head": 0}
    *outer, last = [name for name in rows if name != "token"]
    for name in outer:
        label = rows[name][rows[name].rfind("│", 0, column) + 1 :].partition("│")[0].rstrip()
        index |= {name: label} if name else dict(pair.split() for pair in label.split(", "))
    index[last] = re.match(r"\w+", rows[last][column:])[0]
    where = tuple(int(index[name]) for name in ("layer", "block", "slot", "head", "dim"))
    return [(kv, *where) for kv in index["kv"]], rows.get("token", "·" * (column + 1))[column] == "■"


def arrays_in_svg(picture):
    """The same as the SVG has it, in the order in which the cells lie in it."""
    found = {}
    for cell in ElementTree.fromstring(picture.svg).iter(SVG + "g"):
        title = cell.find(SVG + "title").text
        name, offset, kv, rest = re.fullmatch(r"(\w+) \+ (\d+): (K and V|K|V) of (.*)", title).groups()
        index = {"layer": 0} | dict(pair.split() for pair in rest.split(", "))
        where = tuple(int(index[axis]) for axis in ("layer", "block", "slot", "head", "dim"))
        boxes = cell.findall(SVG + "rect")
        kinds = [box.get("class") for box in boxes]
        assert [kind.removesuffix("-on") for kind in kinds] == kv.lower().split(" and ")
        at = float(boxes[0].get("y")), float(boxes[0].get("x"))
        found.setdefault(name, []).append(
            (at, int(offset), [(each, *where) for each in kv.split(" and ")], "-on" in kinds[0])
        )
    for name, each in found.items():
        assert sorted(each) == each, name
        assert [offset for _, offset, _, _ in each] == list(range(len(each)))
    return [[(elements, on) for _, _, elements, on in each] for each in found.values()]


def assert_pictured(layout, sizes, slot):
    picture = layout.draw(**sizes, slot=slot)
    want = elements_by_numpy(layout, sizes)
    for got in (arrays_in_svg(picture), arrays_in_text(picture)):
        assert [[elements for elements, _ in cells] for cells in got] == want
        for cells in got:
            for [(_, _, block, place, _, _), *_], on in cells:
                assert on == (block * sizes["block_size"] + place == slot)
    for cells, line in zip(want, re.findall(r"^slot \d+: .*", picture.text, re.MULTILINE), strict=slot is not None):
        mine = [i for i, [e, *_] in enumerate(cells) if e[2] * sizes["block_size"] + e[3] == slot]
        count, runs, said = re.fullmatch(rf"slot {slot}: (\d+) elements? in (\d+) runs?: (.*)", line).groups()
        assert int(count) == len(mine)
        assert int(runs) == sum(i - 1 not in mine for i in mine)
        offsets = [
            range(*(int(n) + i for i, n in enumerate((run.split("–") * 2)[:2])))
            for run in said.split(", ")
            if run != "…"
        ]
        assert len(offsets) == min(int(runs), 5)
        assert [i for run in offsets for i in run] == mine[: sum(map(len, offsets))]
        assert ("…" in said) == (int(runs) > 5)
        assert line in "".join(ElementTree.fromstring(picture.svg).itertext())


@pytest.mark.parametrize("slot", [None, 0, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_element_is_where_numpy_finds_it(pattern, slot):
    layout = CacheLayout(pattern)
    assert_pictured(layout, sizes_of(layout), slot)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_blocks": 1, "block_size": 1, "num_heads": 1, "head_size": 1, "head_size_v": 1},
        {"num_blocks": 1, "block_size": 1, "num_heads": 1, "head_size": 7, "head_size_v": 3},
        {"num_blocks": 12, "block_size": 1, "num_heads": 1, "head_size": 2, "head_size_v": 1},
        {"num_blocks": 1, "block_size": 11, "num_heads": 3, "head_size": 5, "head_size_v": 2},
        {"num_blocks": 1, "block_size": 1, "num_heads": 2, "head_size": 150, "head_size_v": 150},  # rows divide a head
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
@pytest.mark.parametrize(
    "pattern", ["block slot head dim, block head dim slot", "block head slot k+v", "head k+v slot block"]
)
def test_every_size(pattern, sizes):
    assert_pictured(CacheLayout(pattern), sizes, 0)


@settings(max_examples=40, deadline=None)
@given(st.permutations(["layer", "block", "slot", "head", "dim/x", "x", "kv"]), st.integers(1, 3), st.integers(0, 2))
def test_every_order_of_axes(names, size, joined):
    axes = [f"({names[0]} kv)", *(n for n in names[1:] if n != "kv")] if joined and names[0] != "kv" else names
    layout = CacheLayout(" ".join(axes))
    assert_pictured(layout, sizes_of(layout, block_size=size, head_size=2 * size), 1)


def test_what_is_drawn_without_sizes():
    for name in (*CONSTANTS, "MLA"):
        layout = CacheLayout.of(name)
        for each in (layout, layout.with_layer()):
            heads = 1 if name == "MLA" else 2
            want = dict(num_blocks=2, block_size=2, num_heads=heads, head_size=4)
            want |= {"num_layers": 2} if each.has_layer else {}
            want |= {"x": 2} if name == "HEAD_MAJOR" else {}
            assert each.draw() == each.draw(**want)
            assert each.describe(**want).split("\n")[0].split("  ")[-1].strip() in each.draw().text


def test_the_picture_as_text_and_as_svg():
    picture = CacheLayout.HND.draw(num_blocks=2, block_size=2, num_heads=2, head_size=4)
    assert str(picture) == repr(picture) == picture.text
    assert picture._repr_svg_() == picture.svg
    assert picture.text.startswith(
        "HND: block head slot dim\n\nkey_cache  block 2 × 16 | head 2 × 8 | slot 2 × 4 | dim 4 × 1\n"
    )
    assert all(len(line) == len(line.rstrip()) <= 80 for line in picture.text.split("\n"))
    assert CacheLayout("block  layer head slot dim").draw().text.startswith("block layer head slot dim\n")


def test_runs_of_x_and_rows_within_a_head():
    """Of the two axes that make dim, the slower one has its own index. Axes with one index in a row share a line."""
    sizes = {"num_blocks": 1, "block_size": 2, "num_heads": 1, "head_size": 6}
    assert CacheLayout("block head dim/x slot x").draw(**sizes).text.split("\n")[3:9] == [
        "       │block 0, head 0        │",
        "dim/x  │0      │1      │2      │",
        "slot   │0  │1  │0  │1  │0  │1  │",
        "dim    │0 1│0 1│2 3│2 3│4 5│4 5│",
        "offset  0   2   4   6   8   10",
        "",
    ]
    assert CacheLayout("block head x slot dim/x").draw(**sizes).text.split("\n")[3:7] == [
        "       │block 0, head 0        │",
        "x      │0          │1          │",
        "slot   │0    │1    │0    │1    │",
        "dim    │0 2 4│0 2 4│1 3 5│1 3 5│",
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_svg_stands_on_its_own(pattern):
    layout = CacheLayout(pattern)
    svg = layout.draw(**sizes_of(layout), slot=1).svg
    assert svg == layout.draw(**sizes_of(layout), slot=1).svg
    root = assert_stands_on_its_own(svg)
    assert pattern in root.find(SVG + "title").text
    assert root.find(SVG + "desc").text.startswith("kv_cache: " if layout.single_array else "key_cache: ")


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("ink", "below"),
    [("ink", "paper"), ("muted", "paper"), ("ink", "band"), ("ink", "k"), ("ink", "v"), ("on", "k-on"), ("on", "v-on")]
    + [pair for name in "abc" for pair in (("ink", name), ("on", f"{name}-on"))],
)
def test_words_can_be_read(ink, below):
    """A contrast of 4.5, which WCAG 2 asks of text (AA)."""
    for colours in (LIGHT, DARK):
        dark, light = sorted((luminance(colours[ink]), luminance(colours[below])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_words_are_escaped():
    canvas = Canvas("a < b", "c & d")
    canvas.box(0, 0, 10, 10, "k", label="<e>", title="f > g")
    canvas.text(0, 30, "h & <i>")
    root = ElementTree.fromstring(canvas.svg())
    assert [each.text for each in root.iter() if each.tag in (SVG + "title", SVG + "desc", SVG + "text")] == [
        "a < b", "c & d", "f > g", "<e>", "h & <i>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "layout", "sizes", "message"),
    [
        (ValueError, "NHD", {"num_blocks": 0}, "axis block must have a positive size, got 0"),
        (ValueError, "NHD", {"block_size": -1}, "axis slot must have a positive size, got -1"),
        (ValueError, "NHD", {"num_heads": 0}, "axis head must have a positive size, got 0"),
        (ValueError, "NHD", {"head_size_v": 0}, "axis dim must have a positive size, got 0"),
        (ValueError, "NHD", {"num_layers": 2}, "layout 'block slot head dim' has no axis layer, got size 2 for it"),
        (ValueError, "HEAD_MAJOR", {"x": 3}, "axis x of size 3 must divide head_size = 4"),
        (TypeError, "NHD", {"num_blocks": 2.0}, "num_blocks must be an int, got 2.0"),
        (TypeError, "NHD", {"num_heads": "2"}, "num_heads must be an int, got '2'"),
        (TypeError, "NHD", {"slot": 1.0}, "slot must be an int, got 1.0"),
        (ValueError, "NHD", {"slot": -1}, "slot must be at least 0, got -1"),
        (ValueError, "NHD", {"slot": 4}, "slot must be below 4, since there are 2 blocks of 2, got 4"),
        (ValueError, "NHD", {"head_size": 128}, "an array must have at most 1024 elements to be drawn, got 1024"),
        (ValueError, "NHD", {"num_blocks": 1024, "block_size": 16, "num_heads": 8, "head_size": 128},
         "an array must have at most 1024 elements to be drawn, got 16777216"),
    ],
)  # fmt: skip
def test_errors(error, layout, sizes, message):
    if message.endswith("got 1024"):  # the most there may be
        assert CacheLayout.of(layout).draw(**sizes).svg.count("<g>") == 2048
        return
    with pytest.raises(error) as raised:
        CacheLayout.of(layout).draw(**sizes)
    assert str(raised.value) == message


def test_integers_of_numpy():
    sizes = {"num_blocks": 2, "block_size": 2, "num_heads": 2, "head_size": 4, "head_size_v": 2, "slot": 1}
    numpy = {name: np.int32(size) for name, size in sizes.items()}
    assert CacheLayout.PACKED_HND.draw(**numpy) == CacheLayout.PACKED_HND.draw(**sizes)
