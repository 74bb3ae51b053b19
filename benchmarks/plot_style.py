"""How all pictures look: colours by what they stand for, sizes, fonts; and one SVG for light and dark pages.

A picture has a media query: it follows the `color-scheme` of the page around it, and the system where that names none.
It has a background of its own, so that it can be read where it and the page disagree.
"""

import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# On light, on dark. What is written in a colour has a contrast of 4.5 to the background, which a test computes.
COLOURS = {
    "background": ("#ffffff", "#11151c"),
    "ink": ("#1f2329", "#e6e9ef"),
    "muted": ("#59616b", "#9aa4b1"),
    "grid": ("#e3e6ea", "#2a313b"),
    "jaxkv": ("#0b5fd0", "#6aaeff"),
    "torchkv": ("#b93a06", "#ff9561"),
    "flashinfer": ("#14793a", "#4fc98a"),
    "pallas": ("#7a45d4", "#bb9bf5"),
    "xla": ("#8a5d00", "#dcae3c"),
    "torch": ("#6a6f76", "#a0a7b0"),
    "weights": ("#c3c9d1", "#4a5462"),
    "cache": ("#7fb0a8", "#33706a"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}

WIDTH = 480  # points, of all pictures
TITLE, TEXT = 12.5, 10.5  # points; at a width of 400 pixels, TEXT is as large as 9 pixels are
MARGIN = 12
HEADER = 52  # points that title and subtitle take

# Measured by the widest of these, which comes with matplotlib; shown by whatever the reader has.
MEASURED = "DejaVu Sans"
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"


def pyplot() -> Any:
    """Matplotlib's pyplot, set to this style."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise SystemExit("matplotlib is not installed: uv run --group plots python -m benchmarks plot") from error
    mpl.use("svg")
    mpl.rcParams.update(mpl.rcParamsDefault)
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "jaxkv",
            "font.family": MEASURED,
            "font.size": TEXT,
            "text.color": LIGHT["ink"],
            "axes.labelcolor": LIGHT["muted"],
            "axes.edgecolor": LIGHT["grid"],
            "axes.linewidth": 0.8,
            "axes.facecolor": LIGHT["background"],
            "figure.facecolor": LIGHT["background"],
            "xtick.color": LIGHT["grid"],
            "ytick.color": LIGHT["grid"],
            "xtick.labelcolor": LIGHT["muted"],
            "ytick.labelcolor": LIGHT["ink"],
            "xtick.labelsize": TEXT,
            "ytick.labelsize": TEXT,
            "grid.color": LIGHT["grid"],
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
            "axes.axisbelow": True,
        }
    )
    from matplotlib import pyplot  # type: ignore[import-not-found]

    return pyplot


class Sheet:
    """A figure whose places are points from its upper left corner."""

    def __init__(self, height: float, title: str, subtitle: str):
        self.height = height
        self.figure = pyplot().figure(figsize=(WIDTH / 72, height / 72))
        self.write(MARGIN, 22, title, size=TITLE, weight="bold")
        self.write(MARGIN, 39, subtitle, colour="muted")

    def write(self, x: float, y: float, text: str, colour: str = "ink", size: float = TEXT, **options: Any) -> None:
        """Text whose baseline is there."""
        place = (x / WIDTH, 1 - y / self.height)
        self.figure.text(*place, text, color=LIGHT[colour], fontsize=size, va="baseline", **options)

    def axes(self, left: float, top: float, right: float, bottom: float, grid: str = "x") -> Any:
        """Axes between these places, with lines across `grid`, and no frame."""
        size = (right - left) / WIDTH, (bottom - top) / self.height
        axes = self.figure.add_axes((left / WIDTH, 1 - bottom / self.height, *size))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, pad=5, which="both")
        axes.grid(axis=grid, which="major")
        return axes

    def save(self, path: Path, title: str, description: str) -> None:
        """Writes it as one SVG for light and dark, with its words for those who cannot see it."""
        self.figure.savefig(path, metadata={"Date": None})
        pyplot().close(self.figure)
        path.write_text(adapted(path.read_text(), title, description))


def adapted(svg: str, title: str, description: str) -> str:
    """Matplotlib's SVG with title and description, the reader's fonts, and colours for dark pages."""
    svg = re.sub(rf"'{MEASURED}'[^;\"]*", FONTS, svg)
    # Rules of a style sheet that are important win over matplotlib's style attributes.
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark} !important}}\n'
        for light, dark in COLOURS.values()
        for part in ("fill", "stroke")
        if f"{part}: {light}" in svg
    )
    style = f"<style>\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n</style>"
    words = f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape(description)}</desc>'
    opening = re.search(r"<svg [^>]*", svg)
    assert opening is not None
    start = f'{opening[0]} role="img" aria-labelledby="title desc"'
    svg = svg.replace(f"{opening[0]}>", f"{start}>\n{words}\n{style}", 1)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
