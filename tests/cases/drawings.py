"""What every picture keeps to, whatever it shows."""

import re
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def assert_stands_on_its_own(svg):
    """It is SVG with a title and a description, fetches nothing, and shows all that is in it; returns the element."""
    root = ElementTree.fromstring(svg)
    assert root.tag == SVG + "svg"
    assert root.get("role") == "img"
    assert [child.tag for child in root][:2] == [SVG + "title", SVG + "desc"]
    assert all(child.text for child in root[:2])
    assert "prefers-color-scheme:dark" in root.find(SVG + "style").text
    assert not re.search(r"href|url\(|@import|<script|currentColor", svg)
    *_, width, height = map(float, root.get("viewBox").split())
    assert (width, height) == (float(root.get("width")), float(root.get("height")))
    assert width <= 700
    for box in root.iter(SVG + "rect"):
        left, top = float(box.get("x", 0)), float(box.get("y", 0))
        assert 0 <= left <= left + float(box.get("width")) <= width
        assert 0 <= top <= top + float(box.get("height")) <= height
    for text in root.iter(SVG + "text"):
        length = 7.3 * len(text.text)  # in DejaVu Sans Mono; other fonts of the style are not wider
        begin = float(text.get("x")) - {"middle": length / 2, "end": length, None: 0}[text.get("text-anchor")]
        assert 0 <= begin <= begin + length <= width, text.text
        assert 10 <= float(text.get("y")) <= height
    return root
