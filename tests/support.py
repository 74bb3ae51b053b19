"""`docs/support.md`: what was tested where, of what tests have recorded. `python -m tests.support` writes it anew.

Records are the files that `pytest --record=FILE` writes, `benchmarks/results/*-tests.json`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvcore.formats import FLOATS, KV_CACHE_DTYPES, PER_TOKEN_HEAD
from kvcore.pattern import CONSTANTS, VLLM
from tests.record import Found, loads

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
RECORDS = ROOT / "benchmarks" / "results"

LETTERS = {"write": "W", "rope": "R", "attention": "A", "gather": "G", "relayout": "M", "blocks": "B", "swap": "S"}
FORMATS = [
    *FLOATS,
    *(name for name in KV_CACHE_DTYPES if name not in ("auto", "fp8")),
    *(f"{name} token_head" for name in PER_TOKEN_HEAD if name != "fp8"),
    "any",
]
LAYOUTS = {**CONSTANTS, **VLLM}

BEGINNING = """# Support

What was tested where. Nobody types this page: `python -m tests.support` makes it of the records that
`pytest --record=FILE` writes, and a test fails where the two differ. A letter stands for an op that was called with
this format and this layout, in a test that passed:

| | op | | op |
|---|---|---|---|
| **W** | write, as it is, cast or quantised | **M** | `relayout`, from or to such a cache |
| **R** | `rope_and_cache` | **B** | `copy_blocks`, `zero_blocks` |
| **A** | `paged_attention` | **S** | `swap_blocks` |
| **G** | `gather_kv`, `gather_slots` | | |

B and S move whole blocks of any format. `token_head` is a scale for each token's head (`per_token_head=True`). A
layout counts with and without an axis `layer` in front. What has no letter may work all the same: the kernels are made
of parts, and tests take every pair of what matters, not every combination.
"""

COMPILED = """## Compiled, not run

Kernels, compiled by Triton for GPUs that were not there, and looked at: they fit, and their loads and stores are as
wide as they can be. `sm_90` is an H100, `gfx942` an MI300.
"""

ON_CPU = """## On a CPU

XLA's and torch's own operations, which CPUs and TPUs use, and *kernels*: the same kernels as on a GPU, in Triton's
interpreter. All are compared with the oracle.
"""

ORDER = {"gpu": 0, "compiled": 1, "cpu": 2}


# ---- tables


def letters(found: Iterable[Found], both: Callable[[Found], Any] | None = None) -> str:
    """Ops as letters, in order; with `both`, those that one framework alone has come with its name."""
    ops: dict[str, set[Any]] = {}
    for each in found:
        ops.setdefault(each[2], set()).add(each[1])
    parts = []
    for op, letter in LETTERS.items():
        if op in ops:
            alone = both is not None and len(ops[op]) == 1
            parts.append(f"{letter}({next(iter(ops[op]))})" if alone else letter)
    return "\N{NO-BREAK SPACE}".join(parts)


def table(
    rows: Iterable[str], columns: dict[str, Callable[[Found], bool]], found: set[Found], place: int, **more: Any
) -> str:
    """A table of letters: rows are layouts or formats, by their place in what was found. Empty lines are left out."""
    columns = {name: test for name, test in columns.items() if any(map(test, found))}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [
            letters((each for each in found if each[place] == row and test(each)), **more) for test in columns.values()
        ]
        if any(cells):
            lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_format_and_layout(columns: dict[str, Callable[[Found], bool]], found: set[Found]) -> str:
    """Two tables: what each format has met, in whichever layout, and each layout, in whichever format."""
    return f"{table(FORMATS, columns, found, 4)}\n\n{table(layouts_of(found), columns, found, 3)}"


def layouts_of(found: set[Found]) -> list[str]:
    """Layouts with a name, then others."""
    return [*LAYOUTS, *sorted({each[3] for each in found} - set(LAYOUTS))]


# ---- parts of the page


def on_gpu(record: dict[str, Any], met: set[Found]) -> str:
    """The kernels on a GPU: layouts and formats, and what one framework alone has met."""
    launched = {each for each in met if each[0] not in ("portable", "interpret") and each[1] != "kernel"}
    # Some tests export for a GPU that is not there: for another than most.
    counts = Counter(each[0] for each in launched)
    ran = {each for each in launched if each[0] == max(counts, key=counts.__getitem__)}
    columns = {f"`{name}`": lambda each, name=name: each[4] == name for name in FORMATS}
    text = table(layouts_of(ran), columns, ran, 3, both=lambda each: each[1])
    return (
        f"## On an {record['device']}\n\nThe kernels, launched from JAX and from torch; "
        f"a framework's name in brackets where one alone has launched it.\n\n{text}"
    )


def compiled(record: dict[str, Any], met: set[Found]) -> str:
    """Kernels that were compiled for GPUs that were not there."""
    made = {each for each in met if each[0] not in ("portable", "interpret")}
    columns = {name: lambda each, name=name: each[0] == name for name in sorted({each[0] for each in made}, key=_size)}
    return f"{COMPILED}\n{by_format_and_layout(columns, made)}"


def on_cpu(record: dict[str, Any], met: set[Found]) -> str:
    """Without a GPU: XLA's and torch's own operations, and the kernels, interpreted."""
    names = {
        "JAX": ("portable", "jax"), "JAX, kernels": ("interpret", "jax"),
        "torch": ("portable", "torch"), "torch, kernels": ("interpret", "torch"),
    }  # fmt: skip
    columns = {name: lambda each, where=where: each[:2] == where for name, where in names.items()}
    ran = {each for each in met if each[0] in ("portable", "interpret")}
    return f"{ON_CPU}\n{by_format_and_layout(columns, ran)}"


PARTS = {"gpu": on_gpu, "compiled": compiled, "cpu": on_cpu}


def page(records: dict[str, str]) -> str:
    """The page, of records by the beginnings of their files' names: "gpu", "compiled" and "cpu", or "gpu-…" and so on.

    Records of one machine, with other versions or of other tests, share their tables.
    """
    heads = [
        "## Records\n",
        "| | machine | versions | date, commit | passed | skipped | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    parts: dict[tuple[str, str], tuple[dict[str, Any], set[Found]]] = {}
    for name in sorted(records, key=lambda name: (ORDER[_kind(name)], name)):
        record, met = loads(records[name])
        versions = ", ".join(
            f"{package} {record['versions'][package]}"
            for package in ("jax", "torch", "triton")
            if package in record["versions"]
        )
        counts = " | ".join(f"{record[key]:,}" for key in ("passed", "skipped", "failed"))
        link = f"[{name}](../benchmarks/results/{name}-tests.json)"
        heads.append(
            f"| {link} | {record['device']} | {versions} | {record['date']}, `{record['commit']}` | {counts} |"
        )
        if "note" in record:  # written by hand
            notes.append(f"**{name}**: {record['note']}")
        parts.setdefault((_kind(name), record["device"]), (record, set()))[1].update(met)
    tables = [PARTS[kind](record, met) for (kind, _), (record, met) in parts.items()]
    return "\n\n".join([BEGINNING.strip(), "\n".join(heads), *notes, *tables]) + "\n"


def page_of_project() -> str:
    """What `docs/support.md` must be."""
    ending = "-tests.json"
    return page({file.name.removesuffix(ending): file.read_text() for file in RECORDS.glob(f"*{ending}")})


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _size(target: str) -> tuple[bool, int | str]:
    number = target.removeprefix("sm_")
    return (False, int(number)) if number.isdecimal() else (True, target)


if __name__ == "__main__":
    PAGE.write_text(page_of_project())
