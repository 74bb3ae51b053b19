"""Drawing each picture; matplotlib is imported when one is drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.plot_data import ATTENTION, INSTEAD, LAYOUTS, SLOW, Picture
from benchmarks.plot_style import HEADER, LIGHT, MARGIN, TEXT, WIDTH, Sheet

DASHES = (0, (4, 2))
# Of attention's lines: a short name, the colour, how it is drawn. jaxkv's is a band below torchkv's, as they coincide.
LINES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "copy": ("copy", "ink", {"linestyle": DASHES, "linewidth": 1.2}),
    "gather_sdpa": ("gather", "torch", {"marker": "v"}),
    "pallas": ("Pallas", "pallas", {"marker": "s"}),
    "jaxkv": ("jaxkv", "jaxkv", {"linewidth": 4}),
    "flashinfer": ("FlashInfer", "flashinfer", {"marker": "D", "markersize": 4}),
    "torchkv": ("torchkv", "torchkv", {"linewidth": 1.4}),
}
RIGHT = WIDTH - MARGIN


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places as near to the wanted ones as their order and the gap between neighbours allow, in the order given."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[float, list[int]]] = []  # of each: its middle, and who is in it
    for index in order:
        groups.append((places[index], [index]))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (len(groups[-1][1]) + len(groups[-2][1])) / 2:
            members = groups[-2][1] + groups[-1][1]
            groups[-2:] = [(sum(places[i] for i in members) / len(members), members)]
    found = [0.0] * len(places)
    for middle, members in groups:
        for at, index in enumerate(members):
            found[index] = middle + gap * (at - (len(members) - 1) / 2)
    return found


def name_lines(axes: Any, x: float, ends: Mapping[str, tuple[float, str, str]]) -> None:
    """Names at the right ends of lines: of each, its end, the name, the colour. A hair leads to one that moved."""
    axes.figure.canvas.draw()
    scale = 72 / axes.figure.dpi
    wanted = [axes.transData.transform((x, end))[1] * scale for end, _, _ in ends.values()]
    start = axes.transData.transform((x, 1))[0] * scale
    pixels = axes.transAxes.inverted()
    for place, moved, (_, name, colour) in zip(wanted, spread(wanted, TEXT + 2.5), ends.values(), strict=True):
        hair = [pixels.transform((a / scale, b / scale)) for a, b in ((start + 5, place), (start + 15, moved))]
        axes.plot(*zip(*hair, strict=True), transform=axes.transAxes, color=LIGHT[colour], linewidth=0.8, clip_on=False)
        at = pixels.transform(((start + 18) / scale, moved / scale))
        axes.text(*at, name, transform=axes.transAxes, color=LIGHT[colour], va="center_baseline")


def attention(shown: Picture) -> Sheet:
    sheet = Sheet(424, shown.title, shown.subtitle)
    contexts = [int(row.replace(",", "")) for row in shown.rows]
    names = {"copy": "limit: copy of K and V"} | ATTENTION
    sheet.write(MARGIN, HEADER + 14, shown.unit, colour="muted")
    times = sheet.axes(MARGIN + 34, HEADER + 24, 316, 228, grid="both")
    sheet.write(MARGIN, 258, "part of the limit: 1 is as fast as a copy", colour="muted")
    parts = sheet.axes(MARGIN + 34, 270, 316, 378, grid="both")
    times.set_yscale("log")
    ends: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, (short, colour, style) in LINES.items():
        found = [row[name] for row in shown.rows.values()]
        part = [row["copy"] / row[name] for row in shown.rows.values()]
        times.plot(contexts, found, color=LIGHT[colour], **style)
        parts.plot(contexts, part, color=LIGHT[colour], **style)
        ends[0][name] = (found[-1], names[name], colour)
        ends[1][name] = (part[-1], f"{short} {part[-1]:.2f}".removesuffix(".00"), colour)
    for axes in (times, parts):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [""] * len(contexts) if axes is times else [f"{c // 1024}k" for c in contexts])
        axes.minorticks_off()
        axes.set_xlim(contexts[0] * 0.92, contexts[-1] * 1.06)
    times.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    times.set_ylim(9, 1500)
    parts.set_ylim(0, 1.1)
    parts.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    for axes, labels in zip((times, parts), ends, strict=True):
        name_lines(axes, contexts[-1], labels)
    sheet.write(MARGIN + 34, 412, "context, tokens a sequence", colour="muted")
    return sheet


def bars(axes: Any, rows: int, pitch: float) -> None:
    """Makes axes of horizontal rows, the first on top, `pitch` points each."""
    axes.set_ylim(rows * pitch, 0)
    axes.set_yticks([])


def writes(shown: Picture) -> Sheet:
    groups = {"Without this package, NHD": INSTEAD, "Layouts": LAYOUTS, "Slow in any kernel": SLOW}
    pitch, title = 18, 25
    length = sum(title + pitch * len(group) for group in groups.values())
    sheet = Sheet(HEADER + length + 42, shown.title, shown.subtitle)
    left, top = 176, HEADER
    axes = sheet.axes(left, top, 400, top + length)
    bars(axes, 1, length)
    place = 0.0
    for group, members in groups.items():
        place += title
        sheet.write(MARGIN, top + place - 6, group, weight="bold")
        for label in members.values():
            row = shown.rows[label]
            sheet.write(MARGIN, top + place + 12.5, label)
            longest = max(row.values())
            at = left + (400 - left) * longest / 10 + 5
            for number, (name, value) in enumerate(row.items()):
                colour = name if name in LIGHT else ("torch" if name == "index_put_" else "xla")
                thick = 5.5 if len(row) == 2 else 11
                axes.barh(place + 6 + 6 * number if len(row) == 2 else place + 9, value, thick, color=LIGHT[colour])
                text = f"{value:.2f}" + (f" {name}" if label == "NHD" else "")
                sheet.write(at, top + place + 12.5, text, colour=colour)
                at += 29 if label != "NHD" else 64
            place += pitch
    axes.set_xlim(0, 10)
    axes.set_xticks([0, 2, 4, 6, 8, 10])
    axes.axvline(1, color=LIGHT["ink"], linestyle=DASHES, linewidth=1.2)
    at = left + (400 - left) / 10
    sheet.write(at + 4, top + 17, "1: a plain copy")
    sheet.write(left, top + length + 36, "time, as a multiple of the copy's", colour="muted")
    return sheet


def loop(shown: Picture) -> Sheet:
    pitch, title, left, right, top = 21, 25, 92, 320, HEADER + 20
    caches = list(dict.fromkeys(row.partition(", ")[2] for row in shown.rows))
    groups = {cache: [row for row in shown.rows if row.endswith(f", {cache}")] for cache in caches}
    length = title * len(caches) + pitch * len(shown.rows)
    sheet = Sheet(top + length + 42, shown.title, shown.subtitle)
    columns = {
        "jaxkv": ("jaxkv", 362, "jaxkv"),
        "xla": ("XLA", 400, "xla"),
        "projection": ("projection", RIGHT, "muted"),
    }
    for name, at, colour in columns.values():
        sheet.write(at, top + 18, name, colour=colour, ha="right")
    sheet.write(RIGHT, top + 3, "microseconds", colour="muted", ha="right")
    axes = sheet.axes(left, top, right, top + length)
    bars(axes, 1, length)
    place = 0.0
    for cache, rows in groups.items():
        place += title
        sheet.write(MARGIN, top + place - 6, f"{cache} cache", weight="bold")
        for row in rows:
            values, tokens = shown.rows[row], row.partition(", ")[0]
            sheet.write(MARGIN, top + place + 14, f"{tokens} token{'s' * (tokens != '1')}")
            axes.barh(place + pitch / 2, values["jaxkv"] / values["xla"], 12, color=LIGHT["jaxkv"])
            axes.plot(values["steps"] / values["xla"], place + pitch / 2, "o", mfc="none", mec=LIGHT["jaxkv"], ms=6)
            for key, (_, at, colour) in columns.items():
                sheet.write(at, top + place + 14, f"{values[key]:.1f}", colour=colour, ha="right")
            place += pitch
    axes.set_xlim(0, 2)
    axes.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "2"])
    axes.axvline(1, color=LIGHT["xla"], linestyle=DASHES, linewidth=1.4)
    sheet.write(MARGIN, top + 3, "■ rope_and_cache", colour="jaxkv")
    sheet.write(128, top + 3, "○ in steps", colour="jaxkv")
    sheet.write((left + right) / 2 + 5, top + 3, "1: XLA's best", colour="xla")
    sheet.write(left, top + length + 36, "time beyond the projection, divided by XLA's best", colour="muted")
    return sheet


def accuracy(shown: Picture) -> Sheet:
    pitch, top, left, right = 17.5, HEADER + 24, 186, 404
    rows = sorted(shown.rows.items(), key=lambda row: (-row[1]["bits"], abs(row[1]["delta"])))
    length = pitch * len(rows)
    sheet = Sheet(top + length + 42, shown.title, shown.subtitle)
    axes = sheet.axes(left, top, right, top + length)
    bars(axes, 1, length)
    axes.set_xscale("log")
    axes.set_xlim(4e-4, 2)
    axes.axvspan(4e-4, 1e-3, color=LIGHT["grid"], linewidth=0)
    sheet.write(RIGHT, top - 8, "perplexity", colour="muted", ha="right")
    sheet.write(MARGIN, top - 8, "bits of an element, with scales", colour="muted")
    sheet.write(left, top - 8, "○ within two standard errors", colour="jaxkv")
    seen = None
    for number, (name, row) in enumerate(rows):
        place, baseline = pitch * (number + 0.5), top + pitch * number + 12.5
        if row["bits"] != seen:
            seen = row["bits"]
            sheet.write(MARGIN + 22, baseline, f"{seen:g}", weight="bold", ha="right")
            if number:
                axes.axhline(pitch * number, -0.8, 1.3, color=LIGHT["grid"], linewidth=0.8, clip_on=False)
        sheet.write(MARGIN + 32, baseline, name.replace("_head", " head").replace("fp8_", "fp8 "))
        sheet.write(RIGHT, baseline, f"{row['perplexity']:.2f}", ha="right")
        if not row["se"]:
            continue
        if abs(row["delta"]) <= 2 * row["se"]:
            axes.plot(6.3e-4, place, "o", mfc="none", mec=LIGHT["jaxkv"], ms=6)
        else:
            axes.errorbar(
                row["delta"], place, xerr=row["se"], fmt="o", ms=6, color=LIGHT["jaxkv"], elinewidth=1.4, capsize=0
            )
    marks = {"+0.1 %": 1.001, "+1 %": 1.01, "+10 %": 1.1, "×2": 2}
    axes.set_xticks([math.log(factor) for factor in marks.values()], list(marks))
    axes.minorticks_off()
    sheet.write(left, top + length + 36, "rise of perplexity, ± one standard error", colour="muted")
    return sheet


def decode(shown: Picture) -> Sheet:
    pitch, top, left, right = 52, HEADER + 4, 76, RIGHT
    length = pitch * len(shown.rows)
    sheet = Sheet(top + length + 42, shown.title, shown.subtitle)
    axes = sheet.axes(left, top, right, top + length)
    bars(axes, 1, length)
    axes.set_xlim(0, 13)

    def at(value: float) -> float:
        return left + (right - left) * value / 13

    for number, (batch, row) in enumerate(shown.rows.items()):
        place, limit = pitch * number, row["weights"] + row["cache"]
        sheet.write(MARGIN, top + place + 32, f"batch {batch}")
        starts = {"weights": (0, row["weights"]), "cache": (row["weights"], row["cache"])}
        starts["muted"] = (limit, row["step"] - limit)
        for colour, (start, width) in starts.items():
            axes.barh(place + 28, width, 20, left=start, color=LIGHT[colour], linewidth=0)
        step = f"{row['step']:.2f} ms; reading alone {limit:.2f} ms, {limit / row['step']:.2f} of it"
        sheet.write(left, top + place + 14, f"{step}; {row['tokens a second']:,.0f} tokens a second")
    last = list(shown.rows.values())[-1]
    middle = top + pitch * (len(shown.rows) - 1) + 32
    limit = last["weights"] + last["cache"]
    for name, start, end in (
        ("weights", 0, last["weights"]),
        ("cache", last["weights"], limit),
        ("the rest", limit, last["step"]),
    ):
        sheet.write(
            at((start + end) / 2), middle, name, ha="center", colour="background" if name == "the rest" else "ink"
        )
    axes.set_xticks(range(0, 13, 2))
    sheet.write(left, top + length + 36, "milliseconds a step", colour="muted")
    return sheet


DRAWERS: Mapping[str, Callable[[Picture], Sheet]] = {
    "attention": attention,
    "writes": writes,
    "loop": loop,
    "accuracy": accuracy,
    "decode": decode,
}
