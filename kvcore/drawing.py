"""Pictures of layouts: small arrays as they lie in memory, in SVG and in text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.integers import integer
from kvcore.pattern import CONSTANTS, Axis
from kvcore.placement import Extents, Placement
from kvcore.strips import Strip, bands_of, describe, elements
from kvcore.svg import CHARACTER, MARGIN, Canvas

MOST_ELEMENTS = 1024
"""Of an array in a picture."""

COLUMN, BAND, CELL = 8, 17, 22
"""In SVG, in px: the width of such a character's place, and the heights of a band and of a row of cells."""


@dataclass(frozen=True, repr=False)
class Picture:
    """A picture of a layout, as `CacheLayout.draw` makes it: `print` shows it as text, notebooks show SVG.

    Attributes:
        svg: It as one SVG element, for light and dark pages.
        text: It in lines of text.
    """

    svg: str
    text: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def draw(
    pattern: str,
    arrays: Sequence[Sequence[Axis]],
    shapes: Sequence[Sequence[int]],
    placement: Placement,
    slot: int | None,
) -> Picture:
    """The picture of a layout applied to arrays: `CacheLayout.draw`.

    Args:
        pattern: Of the layout.
        arrays: Axes of each array.
        shapes: Their sizes.
        placement: Where K and V lie in these arrays.
        slot: A slot to point out, or None.

    Raises:
        ValueError: an array has too many elements, or the slot is none of the cache.
        TypeError: slot is no integer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if max(sizes) > MOST_ELEMENTS:
        raise ValueError(f"an array must have at most {MOST_ELEMENTS} elements to be drawn, got {max(sizes)}")
    extents = placement.extents
    if slot is not None and (slot := integer("slot", slot, 0)) >= extents.num_slots:
        raise ValueError(
            f"slot must be below {extents.num_slots}, since there are {extents.num_blocks} blocks of "
            f"{extents.block_size}, got {slot}"
        )
    strips = []
    for line, axes, cells, at in zip(
        describe(arrays, shapes), arrays, elements(placement, sizes), placement[1:], strict=False
    ):
        name, _, rest = line.partition(" ")
        mine = [i for i, (first, *_) in enumerate(cells) if first.block * extents.block_size + first.slot == slot]
        strips.append(Strip(name, rest.strip(), cells, bands_of(axes, cells, at.x), frozenset(mine)))
    names = {each: f"{name}: {each}" for name, each in CONSTANTS.items()}
    title = names.get(pattern, pattern)
    return Picture(_svg(title, strips, extents, slot), _text(title, strips, extents, slot))


def _pointed(extents: Extents, slot: int) -> str:
    """What slot is pointed out."""
    block, place = divmod(slot, extents.block_size)
    return f"slot {slot}: place {place} of block {block}"


def _text(title: str, strips: Sequence[Strip], extents: Extents, slot: int | None) -> str:
    """The picture in lines of text."""
    indent = max(len(name) for name in ("offset", *(name for strip in strips for name, _ in strip.bands))) + 1
    lines = [title if slot is None else f"{title}   ({_pointed(extents, slot)})"]
    for strip in strips:
        lines += ["", f"{strip.name}  {strip.axes}"]
        width = strip.columns
        marked = ["■" if i in strip.mine else "·" for i in range(len(strip.cells))]
        for start, end in strip.rows:
            bands = strip.outer(start, end)
            for name, runs in bands:
                line = "".join(f"│{run.label}".ljust((run.end - run.start) * width) for run in runs)
                lines.append(f"{name:<{indent}}{line}│")
            begins = {run.start for run in bands[-1][1]}
            for name, labels in (strip.bands[-1], ("token", marked))[: 1 + (slot is not None)]:
                line = "".join(f"{'│' if i in begins else ' '}{labels[i]}".ljust(width) for i in range(start, end))
                lines.append(f"{name:<{indent}}{line}│")
            line, marks = "", strip.marks(start, end)
            for mark in marks:
                line = f"{line:<{(mark - start) * width + 1}}{mark}"
            lines.append(f"{'offset':<{indent}}{line}")
        if slot is not None:
            lines.append(strip.where(slot))
    return "\n".join(lines)


def _svg(title: str, strips: Sequence[Strip], extents: Extents, slot: int | None) -> str:
    """The picture as SVG."""
    canvas = Canvas(title, "\n".join(f"{strip.name}: {strip.axes}" for strip in strips))
    left = MARGIN + CHARACTER * max(len(name) for name in ("offset", *(n for s in strips for n, _ in s.bands))) + 6
    canvas.text(MARGIN, y := MARGIN + 12, title, "bold")
    for strip in strips:
        y += 16
        canvas.text(MARGIN, y := y + 12, strip.name, "bold")
        canvas.text(MARGIN, y := y + 16, strip.axes, "muted")
        y += 7
        for start, end in strip.rows:
            y = _svg_row(canvas, strip, start, end, left, y) + 6
        if slot is not None:
            canvas.text(MARGIN, y := y + 10, strip.where(slot))
    y += 18
    legend: list[tuple[tuple[str, ...], str]] = [(("k",), "K, keys"), (("v",), "V, values")]
    if slot is not None:
        legend.append((("k-on", "v-on"), _pointed(extents, slot)))
    x = MARGIN
    for kinds, words in legend:
        canvas.box(x, y, 14, 14, *kinds)
        canvas.text(x + 20, y + 11, words)
        x += 20 + CHARACTER * (len(words) + 3)
    return canvas.svg()


def _svg_row(canvas: Canvas, strip: Strip, start: int, end: int, left: float, y: float) -> float:
    """One row of an array's cells, with its bands above and offsets below; returns where it ends."""
    width = strip.columns * COLUMN
    bands = [*strip.outer(start, end), (strip.bands[-1][0], strip.runs(len(strip.bands) - 1, start, end))]
    for band, (name, runs) in enumerate(bands):
        last = band == len(bands) - 1
        height = CELL if last else BAND
        if name:
            canvas.text(left - 6, y + height / 2 + 4, name, "muted", "end")
        for run in runs:
            at = left + (run.start - start) * width
            if not last:
                canvas.box(at, y, (run.end - run.start) * width, height, "band", label=run.label)
                continue
            on = run.start in strip.mine
            kinds = [f"{e.kv.lower()}{'-on' * on}" for e in strip.cells[run.start]]
            canvas.box(at, y, width, height, *kinds, label=run.label, title=_title(strip, run.start), ink="on" * on)
        y += height
    canvas.text(left - 6, y + 14, "offset", "muted", "end")
    for mark in strip.marks(start, end):
        canvas.text(left + (mark - start) * width + 2, y + 14, str(mark), "muted")
    return y + 18


def _title(strip: Strip, offset: int) -> str:
    """What a cell is: `key_cache + 13: K of block 0, slot 1, head 1, dim 1`."""
    cell = strip.cells[offset]
    layer = f"layer {cell[0].layer}, " if "layer" in dict(strip.bands) else ""
    _, _, block, slot, head, dim = cell[0]
    of = " and ".join(element.kv for element in cell)
    return f"{strip.name} + {offset}: {of} of {layer}block {block}, slot {slot}, head {head}, dim {dim}"
