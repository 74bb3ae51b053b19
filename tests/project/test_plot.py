"""The committed pictures show the committed numbers. Matplotlib is needed for the last test only."""

import json
import re
import shutil
import sys
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from benchmarks import plot, plot_style
from benchmarks.plot_data import MAKERS, RESULTS, description, picture
from benchmarks.plot_draw import DRAWERS, spread
from benchmarks.plot_text import bar, bars
from tests.cases.processes import ROOT

PICTURES = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"

# Of each picture: the numbers that it says in words beside its lines, dots and bars.
SAID = {
    "attention": lambda rows: [f"{list(rows.values())[-1]['copy'] / v:.2f}" for v in list(rows.values())[-1].values()],
    "writes": lambda rows: [f"{value:.2f}" for row in rows.values() for value in row.values()],
    "loop": lambda rows: [f"{row[n]:.1f}" for row in rows.values() for n in ("jaxkv", "xla", "projection")],
    "accuracy": lambda rows: [
        f"{row[n]:{f}}" for row in rows.values() for n, f in (("perplexity", ".2f"), ("bits", "g"))
    ],
    "decode": lambda rows: [f"{row['step']:.2f}" for row in rows.values()],
}


def read(name):
    return (PICTURES / f"{name}.svg").read_text()


def part(name, tag):
    return ElementTree.fromstring(read(name)).findtext(f"{SVG}{tag}")


def test_there_is_a_drawing_of_each_and_of_nothing_else():
    assert [*DRAWERS] == [*MAKERS] == [*SAID]
    drawn = {path.stem for path in PICTURES.glob("*.svg") if ", sha256 " in path.read_text()}
    assert drawn == {*MAKERS}


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_are_those_of_the_results(name):
    """Draw it anew where this fails: `uv run python -m benchmarks plot`."""
    shown = picture(name)
    assert part(name, "desc") == description(shown)
    assert part(name, "title") == shown.title
    texts = " ".join("".join(text.itertext()) for text in ElementTree.fromstring(read(name)).iter(f"{SVG}text"))
    assert shown.title in texts
    assert shown.subtitle in texts
    words = re.split(r"[ ;,]+", texts)
    missing = [number for number in SAID[name](shown.rows) if number.removesuffix(".00") not in words]
    assert missing == []


@pytest.mark.parametrize("name", MAKERS)
def test_other_results_are_another_picture(name, tmp_path):
    source = MAKERS[name][0]
    found = json.loads((RESULTS / source).read_text())
    (tmp_path / source).write_text(json.dumps({**found, "date": "another"}))
    moved = description(picture(name, tmp_path), tmp_path)
    assert moved != description(picture(name))
    assert moved.rpartition(",")[0] == description(picture(name)).rpartition(",")[0]  # the numbers are the same


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_for_light_and_dark_pages(name):
    text = read(name)
    drawn = text.partition("</style>")[2]
    for part in ("fill", "stroke"):
        for colour in set(re.findall(rf"{part}: (#\w+)", drawn)):
            (dark,) = [dark for light, dark in plot_style.COLOURS.values() if light == colour]
            assert f'[style*="{part}: {colour}"]{{{part}:{dark} !important}}' in text
    assert "prefers-color-scheme: dark" in text
    assert "<dc:date>" not in text
    assert plot_style.MEASURED not in text


def contrast(colour, other):
    bright, dim = sorted((luminance(colour), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_what_is_written_can_be_read(mode):
    colours = {name: pair[mode] for name, pair in plot_style.COLOURS.items()}
    for name in ("weights", "cache"):  # areas, with names in ink on them
        assert contrast(colours.pop(name), colours["ink"]) >= 4.5, name
    background = colours.pop("background")
    colours.pop("grid")
    assert {name: colour for name, colour in colours.items() if contrast(colour, background) < 4.5} == {}


def test_pages_show_every_picture():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert {*MAKERS} <= {*re.findall(r"!\[[^\n]+\]\((?:\.\./)?pictures/(\w+)\.svg\)", pages)}


def test_readme_has_the_bars():
    """Copy them anew where this fails: `python -m benchmarks plot --text`."""
    assert f"```text\n{bars()}\n```" in (ROOT / "README.md").read_text()


def test_bars_are_as_long_as_their_numbers():
    assert [len(bar(part)) for part in (0, 0.01, 0.5, 1)] == [0, 0, 20, 40]
    for chart in bars().split("\n\n"):
        found = re.findall(r"^  .{26} +([\d,]+)  (▇+)$", chart, re.M)
        times = [int(number.replace(",", "")) for number, _ in found]
        assert len(times) == len(chart.splitlines()) - 1 == 6
        assert [len(line) for _, line in found] == [round(40 * time / max(times)) for time in times]


def test_bars_change_with_the_results(tmp_path):
    for source in ("write-h100.json", "attention-h100.json"):
        shutil.copy(RESULTS / source, tmp_path)
    assert bars(tmp_path) == bars()
    found = json.loads((tmp_path / "write-h100.json").read_text())
    for row in found["rows"]:
        row["jax_us"] *= 2
    (tmp_path / "write-h100.json").write_text(json.dumps(found))
    assert bars(tmp_path) != bars()


@pytest.mark.parametrize("gap", [1, 3])
def test_names_move_apart_and_keep_their_order(gap):
    wanted = [5, 5.5, 0, 5, 20, 5.2]
    found = spread(wanted, gap)
    assert found[4] == 20
    order = sorted(range(6), key=lambda i: wanted[i])
    steps = [found[b] - found[a] for a, b in pairwise(order)]
    assert min(steps) >= gap - 1e-9


def test_names_that_are_none(capsys):
    with pytest.raises(SystemExit):
        plot.main(["writes", "nothing"])
    assert "NAME must be one of attention, writes, loop, accuracy, decode, got nothing" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="matplotlib is not installed: uv run --group plots python -m benchmarks plot"):
        plot.main(["decode", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", MAKERS)
def test_drawing_is_deterministic(name, tmp_path):
    mpl = pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        plot.main([name, "--out", str(tmp_path / folder)])
    first, second = ((tmp_path / folder / f"{name}.svg").read_text() for folder in ("a", "b"))
    assert first == second
    if f"Matplotlib v{mpl.__version__}" in read(name):
        assert first == read(name)
