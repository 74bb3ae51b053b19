"""Arrays of a layout as they lie in memory: which elements are where, in words and as cells in rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import NamedTuple

from kvcore.arrays import array_names, contiguous_strides
from kvcore.pattern import Axis, spell
from kvcore.placement import Placement

COLUMNS = 64
"""Width of a picture's rows, in characters of text."""

SHOWN = {"k+v": ("kv", "dim"), "latent": ("kv", "dim")}
"""What pictures show along axes on which K and V lie side by side, or are the same."""


class Element(NamedTuple):
    """An element of K or V, by its indices. `slot` is a place."""

    kv: str
    layer: int
    block: int
    slot: int
    head: int
    dim: int


class Run(NamedTuple):
    """Cells from `start` to before `end` that have an index in common."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Strip:
    """An array as it lies in memory.

    Attributes:
        name: Of the array.
        axes: The rest of its line of `describe`.
        cells: For each offset, the elements that lie there: one; or one of K and one of V that share it.
        bands: Names of axes from the slowest to the fastest, and each cell's index along them.
        mine: Offsets of the elements of the slot that is pointed out.
    """

    name: str
    axes: str
    cells: list[list[Element]]
    bands: list[tuple[str, list[str]]]
    mine: frozenset[int]

    def runs(self, band: int, start: int, end: int) -> list[Run]:
        """Neighbours, of the cells from start to end, with the same index along an axis and along all slower ones."""
        outer = [labels for _, labels in self.bands[: band + 1]]
        first = [i for i in range(start, end) if i == start or any(each[i] != each[i - 1] for each in outer)]
        return [Run(a, b, outer[-1][a]) for a, b in pairwise([*first, end])]

    @cached_property
    def columns(self) -> int:
        """Characters for each cell, the space or line before it among them, so that all indices fit."""
        runs = [run for band in range(len(self.bands)) for run in self.runs(band, 0, len(self.cells))]
        return max(2, *(-(-(len(run.label) + 1) // (run.end - run.start)) for run in runs))

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """Where each row of the picture starts and ends: after whole runs of the slowest axis of which one fits."""
        step = most = COLUMNS // self.columns
        for band in range(len(self.bands)):
            lengths = {run.end - run.start for run in self.runs(band, 0, len(self.cells))}
            if len(lengths) == 1 and (length := lengths.pop()) <= most:
                step = most // length * length
                break
        return [(start, min(start + step, len(self.cells))) for start in range(0, len(self.cells), step)]

    def outer(self, start: int, end: int) -> list[tuple[str, list[Run]]]:
        """Names and runs of a row's bands but for the fastest; those with one index in all of the row are one band."""
        bands = [(name, self.runs(band, start, end)) for band, (name, _) in enumerate(self.bands[:-1])]
        alike = next((i for i, (_, runs) in enumerate(bands) if len(runs) > 1), len(bands))
        label = ", ".join(f"{name} {runs[0].label}" for name, runs in bands[:alike])
        if alike > 1 and len(label) < (end - start) * self.columns:
            bands[:alike] = [("", [Run(start, end, label)])]
        return bands

    def marks(self, start: int, end: int) -> list[int]:
        """Offsets to write below a row: where runs begin, of the fastest axis whose runs are wide enough for them."""
        width = len(str(len(self.cells))) + 1
        for band in reversed(range(len(self.bands))):
            runs = self.runs(band, start, end)
            if all((run.end - run.start) * self.columns >= width for run in runs):
                return [run.start for run in runs]
        return [start]

    def where(self, slot: int) -> str:
        """Which elements are the slot's, in words."""
        firsts = sorted(i for i in self.mine if i - 1 not in self.mine)
        lasts = sorted(i for i in self.mine if i + 1 not in self.mine)
        said = [str(a) if a == b else f"{a}–{b}" for a, b in zip(firsts, lasts, strict=True)]
        runs = _count(len(said), "run")
        said[5:] = ["…"] if said[5:] else []
        return f"slot {slot}: {_count(len(self.mine), 'element')} in {runs}: {', '.join(said)}"


def describe(arrays: Sequence[Sequence[Axis]], shapes: Sequence[Sequence[int]]) -> list[str]:
    """A line for each array: its name, and its axes as `name size × stride`, slowest first."""
    names = array_names(len(arrays))
    return [
        f"{name:<{len(names[-1])}}  "
        + " | ".join(
            f"{spell((axis,))} {size} × {stride}"
            for axis, size, stride in zip(axes, shape, contiguous_strides(shape), strict=True)
        )
        for name, axes, shape in zip(names, arrays, shapes, strict=True)
    ]


def small(
    arrays: Sequence[Sequence[Axis]], num_heads: int | None, num_layers: int | None, x: int | None
) -> tuple[int, int | None, int | None]:
    """Sizes for a picture, where None was given: 2 of each axis that there is; of heads 1 where no axis has them."""
    named = {name for axes in arrays for axis in axes for name in axis}
    few = [
        2 if size is None and name in named else size
        for name, size in zip(("head", "layer", "x"), (num_heads, num_layers, x), strict=True)
    ]
    return (1 if few[0] is None else few[0]), few[1], few[2]


def elements(placement: Placement, sizes: Sequence[int]) -> list[list[list[Element]]]:
    """The elements at each offset of each array, by the addresses of K and of V."""
    found: list[list[list[Element]]] = [[[] for _ in range(size)] for size in sizes]
    layers, blocks, slots, heads, *dims = placement.extents
    for kv, address, cells, dim in zip("KV", placement[1:], (found[0], found[-1]), dims, strict=True):
        for index in product(range(layers or 1), range(blocks), range(slots), range(heads), range(dim)):
            cells[address.of(*index)].append(Element(kv, *index))
    return found


def bands_of(axes: Sequence[Axis], cells: Sequence[Sequence[Element]], x: int) -> list[tuple[str, list[str]]]:
    """The bands of an array. Of the two axes that make dim, the faster one's says dim."""
    names = [shown for axis in axes for name in axis for shown in SHOWN.get(name, (name,))]
    if "x" in names:
        names[max(names.index("dim/x"), names.index("x"))] = "dim"
    index = {
        "kv": lambda cell: "".join(element.kv for element in cell),
        "dim/x": lambda cell: cell[0].dim // x,
        "x": lambda cell: cell[0].dim % x,
    }
    return [
        (name, [str(index[name](cell) if name in index else getattr(cell[0], name)) for cell in cells])
        for name in names
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
