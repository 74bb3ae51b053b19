"""A picture of the attention benchmark's series: time against context.

`uv run --with matplotlib python -m benchmarks plot attention.json attention.svg`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

LINES = {
    "gather_sdpa": ("torch: gather + SDPA", "#8a8a8a", "v"),
    "pallas": ("JAX: Pallas paged attention", "#c98a2b", "s"),
    "flashinfer": ("FlashInfer", "#3f8f5f", "D"),
    "jaxkv": ("jaxkv", "#c0392b", "o"),
    "torchkv": ("torchkv", "#2c5fa8", "x"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    parser.add_argument("json", help="what `python -m benchmarks attention --json` wrote")
    parser.add_argument("svg", help="where to write the picture")
    args = parser.parse_args(argv)
    found = json.loads(Path(args.json).read_text())
    rows = sorted((row for row in found["rows"] if row["series"]), key=lambda row: row["context"])
    if not rows:
        parser.error(f"{args.json} has no rows of the series")
    draw(rows, found["device"], args.svg)


def draw(rows: list[dict[str, Any]], device: str, path: str) -> None:
    import matplotlib as mpl  # type: ignore[import-not-found]
    import matplotlib.ticker  # type: ignore[import-not-found]

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "jaxkv", "font.size": 10})
    from matplotlib import pyplot  # type: ignore[import-not-found]

    figure, axes = pyplot.subplots(figsize=(7, 4.4))
    contexts = [row["context"] for row in rows]
    for name, (label, colour, marker) in LINES.items():
        points = [(row["context"], row[f"{name}_us"]) for row in rows if f"{name}_us" in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
    limits = [row["limit_us"] for row in rows]
    axes.plot(contexts, limits, color="black", linestyle="--", linewidth=1, label="limit: bytes of K and V, copied")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{c // 1024}k" if c % 1024 == 0 else str(c) for c in contexts])
    axes.set_xlabel("context, tokens a sequence")
    axes.set_ylabel("time a call, µs")
    heads = "{} query heads, {} KV heads".format(*rows[0]["heads"])
    about = f"{heads} of {rows[0]['head_sizes'][0]}, bfloat16, blocks of 16, in random order"
    axes.set_title(f"Decode attention, {rows[0]['batch']} sequences, {device}\n{about}", fontsize=10)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
