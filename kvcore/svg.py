"""SVG of boxes, words and lines, readable on light and on dark pages, with nothing from elsewhere. Imports nothing."""

from html import escape

CHARACTER = 7.4
"""Width of a character, in px: of the widest of the fonts below."""

MARGIN = 12

# Colours are written out for both schemes: not every program that shows SVG knows CSS variables. The background is the
# picture's own, so that it can be read wherever it is put. a, b and c are sequences; "-on" is what is pointed out.
LIGHT = {
    "paper": "#ffffff", "ink": "#1f2328", "muted": "#59636e", "line": "#8c959f", "band": "#f3f5f7",
    "k": "#c9e2fb", "v": "#fde0c2", "k-on": "#0b61ad", "v-on": "#a84b00", "on": "#ffffff",
    "a": "#cdeed3", "b": "#e6dafa", "c": "#f9d8e4", "a-on": "#1a7f37", "b-on": "#7446b8", "c-on": "#b03060",
}  # fmt: skip
DARK = {
    "paper": "#14181d", "ink": "#e6edf3", "muted": "#9aa5b1", "line": "#6b7683", "band": "#20262e",
    "k": "#163c60", "v": "#5a3410", "k-on": "#79c0ff", "v-on": "#ffa657", "on": "#0d1117",
    "a": "#1b4a2a", "b": "#40306b", "c": "#5e2540", "a-on": "#7ee08f", "b-on": "#c9a8ff", "c-on": "#ff9bc0",
}  # fmt: skip


def _rules(colours: dict[str, str]) -> str:
    """The rules of one colour scheme."""
    fills = "".join(f".kv-picture .{name}{{fill:{colour}}}" for name, colour in colours.items() if name != "line")
    return (
        f".kv-picture text{{fill:{colours['ink']}}}.kv-picture rect{{stroke:{colours['line']}}}"
        f".kv-picture path{{stroke:{colours['muted']}}}{fills}"
        f".kv-picture text.muted{{fill:{colours['muted']}}}.kv-picture text.on{{fill:{colours['on']}}}"
    )


STYLE = (
    '.kv-picture text{font:12px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}'
    ".kv-picture .bold{font-weight:bold}.kv-picture .none{fill:none}.kv-picture path{fill:none;stroke-width:1.5}"
    ".kv-picture .dashed{stroke-dasharray:3 2}"
    f"{_rules(LIGHT)}.kv-picture .paper{{stroke:none}}"
    f"@media(prefers-color-scheme:dark){{{_rules(DARK)}.kv-picture .paper{{stroke:none}}}}"
)
"""Of every picture the same, and of pictures only, since a page's rules and those of SVGs in it apply to each other."""


class Canvas:
    """A picture that boxes and words are put on; its size is what they reach.

    Args:
        title: What the picture is, in a line, for screen readers.
        description: What it says, for those who do not see it.
    """

    def __init__(self, title: str, description: str) -> None:
        self.width, self.height = 0.0, 0.0
        self._title, self._description = title, description
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *kinds: str,
        label: str = "",
        title: str = "",
        ink: str = "",
    ) -> None:
        """A box, with a label in its middle.

        Args:
            x: Left edge, in px.
            y: Upper edge.
            width: Of the box.
            height: Of the box.
            *kinds: Classes, such as the name of its colour; of two, the second is that of its lower edge.
            label: Words in it.
            title: What a reader sees who points at it.
            ink: Classes of the label.
        """
        self._reach(x + width, y + height)
        edge = 5 * (len(kinds) - 1)
        box = self._rect(x, y, width, height - edge, kinds[0])
        if edge:
            box += self._rect(x, y + height - edge, width, edge, kinds[1])
        if label:
            box += self._words(x + width / 2, y + height / 2 + 4, label, ink, "middle")
        self._parts.append(f"<g><title>{escape(title)}</title>{box}</g>" if title else box)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words on a base line.

        Args:
            x: Where they begin, have their middle, or end.
            y: The base line.
            words: One line.
            kind: Classes: muted; bold; on.
            anchor: start; middle; end.
        """
        share = {"start": 1, "middle": 0.5, "end": 0}[anchor]
        self._reach(x + share * CHARACTER * len(words), y + 4)
        self._parts.append(self._words(x, y, words, kind, anchor))

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through these points, with a head at the last."""
        (x, y), (px, py) = points[-1], points[-2]
        for each in points:
            self._reach(*each)
        length = ((x - px) ** 2 + (y - py) ** 2) ** 0.5
        ux, uy = (x - px) / length * 6, (y - py) / length * 6  # the head's two strokes are this far back
        head = f"M{x - ux - uy / 2:g} {y - uy + ux / 2:g}L{x:g} {y:g}L{x - ux + uy / 2:g} {y - uy - ux / 2:g}"
        self._parts.append(f'<path d="M{"L".join(f"{a:g} {b:g}" for a, b in points)}{head}"/>')

    def svg(self) -> str:
        """The picture: one SVG element."""
        width, height = (round(n + MARGIN) for n in (self.width, self.height))
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="kv-picture" role="img" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" style="max-width:100%;height:auto">',
                f"<title>{escape(self._title)}</title>",
                f"<desc>{escape(self._description)}</desc>",
                f"<style>{STYLE}</style>",
                f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
                *self._parts,
                "</svg>\n",
            ]
        )

    def _reach(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)

    @staticmethod
    def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
        return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'

    @staticmethod
    def _words(x: float, y: float, words: str, kind: str, anchor: str) -> str:
        classes = f' class="{kind}"' if kind else ""
        at = f' text-anchor="{anchor}"' if anchor != "start" else ""
        return f'<text{classes} x="{x:g}" y="{y:g}"{at}>{escape(words)}</text>'
