"""Files and functions stay small enough to read, and what tests share is among their cases."""

import ast
from pathlib import Path

import pytest

from tests.cases.processes import ROOT

PACKAGES = ("jaxkv", "torchkv", "kvcore")
FILE_LINES = {**dict.fromkeys(PACKAGES, 320), "benchmarks": 320, "tests": 400}
FUNCTION_LINES = 110  # the decorators, the signature and the docstring are counted


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def functions_over(path: Path, limit: int) -> list[str]:
    """Names of a file's functions that have more lines than the limit, with how many they have."""
    lengths = {
        node.name: node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return [f"{path.relative_to(ROOT)} {name}: {length}" for name, length in lengths.items() if length > limit]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it. What is imported from a package may be a module, too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            modules |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return modules


@pytest.mark.parametrize(("folder", "limit"), FILE_LINES.items(), ids=FILE_LINES)
def test_no_file_is_longer_than_its_folder_allows(folder, limit):
    assert sources(folder)
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(folder)}
    assert {name: length for name, length in lengths.items() if length > limit} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_longer_than_110_lines(package):
    assert [each for path in sources(package) for each in functions_over(path, FUNCTION_LINES)] == []


def test_functions_are_measured_with_decorators(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text("@decorator\ndef four():\n\n    pass\n\n\nclass C:\n    def one(self): ...\n")
    assert functions_over(path, 4) == []
    assert functions_over(path, 3) == ["module.py four: 4"]
    assert functions_over(path, 0) == ["module.py four: 4", "module.py one: 1"]


def test_no_test_module_imports_another():
    """What two of them need is in tests/cases, or in a conftest."""
    for path in sources("tests"):
        for module in imported(path):
            assert not module.rpartition(".")[2].startswith("test_"), f"{path.relative_to(ROOT)} imports {module}"
            assert not module.endswith("conftest"), f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize(
    "line", ["import tests.write.test_plan", "from tests.write import test_plan", "from . import test_plan"]
)
def test_imports_of_every_kind_are_seen(line, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f"def function():\n    {line}\n")
    assert any(module.endswith(".test_plan") for module in imported(path))


def test_gpu_tests_are_marked():
    """Without the mark `-m gpu` would pass them by, and a host without a GPU would not count them as skipped."""
    modules = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert modules
    assert [path.name for path in modules if "\npytestmark = pytest.mark.gpu\n" not in path.read_text()] == []
