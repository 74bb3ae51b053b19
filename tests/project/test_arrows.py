"""Who imports whom, read from the source: no arrow runs up, none between the twins, none in a circle.

Every import counts, also one inside a function or for type checkers only. What is loaded by a name that is made at run
time does not show: `kvcore.run` finds the kernel of a plan so.

`python -m tests.project.test_arrows` draws the arrows.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The parts of each package, lowest first: a part imports parts of its own line and of lines above it, nothing else.
# The package's own module is called after the package.
LEVELS = {
    "kvcore": [
        "installed",
        "kvcore",
        "integers",
        "arrays nbytes contents pool_statistics svg",
        "pool",
        "sequence",
        "batch",
        "formats",
        "pattern",
        "placement",
        "strips",
        "drawing",
        "layout",
        "scales",
        "choices slots",
        "contract",
        "cache_spec rope_table",
        "fitting relayout swap",
        "plan",
        "kernels",
        "oracle",
        "run",
    ],
    "jaxkv": [
        "_views _arguments _call _rotated _slots _blocks _swap _relayout _mesh _memory _sharded",
        "_triton _xla",
        "_primitive",
        "_write _read",
        "ahead",
        "write quantize mla rope blocks read slots merge scales tables views",
        "move",
        "_readable _writable devices",
        "cache",
        "_exported dlpack",
        "integrations",
        "jaxkv",
    ],
    "torchkv": [
        "_arguments _call _memory _rotated _slots _blocks _swap _relayout",
        "_triton _torch",
        "_library",
        "_state ahead _read distributed",
        "write quantize mla rope blocks read slots merge scales tables",
        "move",
        "_readable _writable",
        "cache",
        "dlpack",
        "integrations",
        "torchkv",
    ],
}

# Parts that know nothing of each other, although their places in the order would allow it.
APART = {
    ("jaxkv._triton", "jaxkv._xla"): "two ways of doing the same",
    ("torchkv._triton", "torchkv._torch"): "two ways of doing the same",
    ("kvcore.oracle", "kvcore.contract"): "the oracle judges what the contract lets pass",
    ("kvcore.oracle", "kvcore.plan"): "the oracle judges what plans launch",
}

# Packages that only some parts may import.
OUTSIDE = {
    "jax": ("jaxkv",),
    "jax_triton": ("jaxkv._triton",),
    "torch": ("torchkv",),
    "triton": ("kvcore.kernels", "kvcore.run", "jaxkv._triton", "torchkv._triton"),
}

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in LEVELS
    for file in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Names of all modules that a module's source imports, of whatever package."""
    folder = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = folder[: len(folder) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in MODULES else source


IMPORTS = {module: set(imported(module, ast.parse(file.read_text()))) for module, file in MODULES.items()}
GRAPH = {module: (names & MODULES.keys()) - {module} for module, names in IMPORTS.items()}


def part_of(module: str) -> str:
    """A module's part: the first two names, `kvcore.plan` of `kvcore.plan.rows`."""
    return ".".join(module.split(".")[:2])


def level_of(part: str) -> int:
    """The place of a part in its package's order, from the lowest; one that has none comes last."""
    lines, name = LEVELS[part.split(".")[0]], part.split(".")[-1]
    return next((i for i, line in enumerate(lines) if name in line.split()), len(lines))


def arrows() -> set[tuple[str, str]]:
    """All pairs of a module and one that it imports."""
    return {(module, name) for module, names in GRAPH.items() for name in names}


def drawing() -> str:
    """The arrows between parts, one line for each part, lowest first."""

    def place(part: str) -> tuple[str, int, str]:
        return part.split(".")[0], level_of(part), part

    parts = sorted({part_of(module) for module in MODULES}, key=place)
    lines = []
    for part in parts:
        targets = {part_of(name) for module, name in arrows() if part_of(module) == part} - {part}
        inside = sorted((name for name in targets if name.split(".")[0] == part.split(".")[0]), key=place)
        names = [name.split(".")[-1] for name in inside] + sorted(targets - set(inside))
        lines.append(f"{part:<22} → {', '.join(names)}" if names else part)
    return "\n".join(lines)


def test_every_module_has_a_place_in_the_order():
    listed = {
        package if name == package else f"{package}.{name}"
        for package, lines in LEVELS.items()
        for line in lines
        for name in line.split()
    }
    assert {part_of(module) for module in MODULES} - listed == set()


def test_imports_of_every_kind_are_seen():
    code = "import kvcore.layout\ndef f():\n    from kvcore import formats\n    from .plan.rows import Rows\n"
    assert set(imported("kvcore.scales", ast.parse(code))) == {"kvcore.layout", "kvcore.formats", "kvcore.plan.rows"}
    assert "kvcore.kernels.decode" in GRAPH["kvcore.kernels.encode"]  # a relative one
    assert "kvcore.run.interpreter" in GRAPH["torchkv._triton.launch"]  # inside a function


def test_packages_meet_in_kvcore_only():
    between = {(a.split(".")[0], b.split(".")[0]) for a, b in arrows()}
    assert {(a, b) for a, b in between if a != b} == {("jaxkv", "kvcore"), ("torchkv", "kvcore")}


def test_kernels_import_nothing_else():
    crossing = {(part_of(a), part_of(b)) for a, b in arrows() if "kvcore.kernels" in (part_of(a), part_of(b))}
    assert crossing == {("kvcore.kernels", "kvcore.kernels"), ("kvcore.run", "kvcore.kernels")}


@pytest.mark.parametrize("package", LEVELS)
def test_no_arrow_runs_up(package):
    inside = {(a, b) for a, b in arrows() if a.split(".")[0] == b.split(".")[0] == package}
    assert sorted((a, b) for a, b in inside if level_of(part_of(a)) < level_of(part_of(b))) == []


@pytest.mark.parametrize("parts", APART, ids=" and ".join)
def test_parts_that_know_nothing_of_each_other(parts):
    assert sorted((a, b) for a, b in arrows() if {part_of(a), part_of(b)} == set(parts)) == []


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", OUTSIDE)
def test_packages_that_only_some_parts_import(package):
    importers = [m for m, names in IMPORTS.items() if package in {name.split(".")[0] for name in names}]
    assert importers
    assert [m for m in importers if not f"{m}.".startswith(tuple(f"{part}." for part in OUTSIDE[package]))] == []


if __name__ == "__main__":
    print(drawing())
