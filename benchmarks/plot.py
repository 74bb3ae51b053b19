"""Pictures of the committed results: one SVG each, for light and for dark pages.

`uv run python -m benchmarks plot` draws all of them into docs/pictures; `--text` prints README's.
"""

import argparse
from pathlib import Path

from benchmarks.plot_data import MAKERS, RESULTS, ROOT, description, picture
from benchmarks.plot_draw import DRAWERS
from benchmarks.plot_text import bars


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MAKERS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder to draw into")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--text", action="store_true", help="print the bars of README instead")
    args = parser.parse_args(argv)
    if args.text:
        print(bars(args.results))
        return
    if unknown := [name for name in args.names if name not in MAKERS]:
        parser.error(f"NAME must be one of {', '.join(MAKERS)}, got {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or MAKERS:
        path = args.out / f"{name}.svg"
        draw(name, path, args.results)
        print(path)


def draw(name: str, path: Path, results: Path = RESULTS) -> None:
    shown = picture(name, results)
    DRAWERS[name](shown).save(path, shown.title, description(shown, results))
