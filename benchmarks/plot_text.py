"""README's picture: bars of text, which every reader of README can show, an index and a terminal, too."""

import json
from pathlib import Path
from typing import Any

from benchmarks.plot_data import ATTENTION, INSTEAD, RESULTS

WIDTH, LABEL, NUMBER = 40, 26, 6  # columns of the longest bar, of labels, of numbers


def bar(part: float) -> str:
    """A bar of this part of the width, in whole columns. Its blocks are not as high as a line: bars do not touch."""
    return "▇" * round(part * WIDTH)


def chart(title: str, times: dict[str, float]) -> str:
    """Times by their labels, in microseconds, each with a bar as long as it takes."""
    longest = max(times.values())
    lines = [f"  {label:{LABEL}} {time:{NUMBER},.0f}  {bar(time / longest)}" for label, time in times.items()]
    return "\n".join([title, *lines])


def bars(results: Path = RESULTS) -> str:
    """What README shows: a write of 8,192 tokens, and decode attention over 64 contexts of 8,192."""

    def rows(file: str) -> list[dict[str, Any]]:
        return json.loads((results / file).read_text())["rows"]

    write = next(row for row in rows("write-h100.json") if (row["case"], row["tokens"]) == ("NHD", 8192))
    wrote = {"a plain copy": write["copy_us"], "torchkv": write["torch_us"], "jaxkv": write["jax_us"]}
    wrote |= {label: write[f"{name}_us"] for name, label in reversed(INSTEAD.items())}
    decode = ("decode", "NHD", "64x8192")
    attend = next(
        row for row in rows("attention-h100.json") if (row["case"], row["layout_name"], row["size"]) == decode
    )
    attended = {"limit: a copy": attend["limit_us"]}
    attended |= {label: attend[f"{name}_us"] for name, label in reversed(ATTENTION.items())}
    return "\n".join(
        [
            chart("Writing 8,192 tokens, microseconds on an H100", wrote),
            "",
            chart("Decode attention, 64 sequences of 8,192 tokens, microseconds", attended),
        ]
    )
