"""Examples of the page and of the docstrings run."""

import doctest
import re

from tests.cases.processes import ROOT, run
from torchkv.integrations.transformers import PagedCache


def test_the_example_of_the_page(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/transformers.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/transformers.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(cache\)  # (.*)", code)[1]


def test_the_example_of_the_class():
    import torch

    (test,) = doctest.DocTestFinder(recurse=False).find(PagedCache, globs={"torch": torch})
    results = doctest.DocTestRunner(verbose=False).run(test)
    assert results.attempted > 4
    assert not results.failed


def test_torchkv_does_not_import_transformers():
    assert "transformers" not in run("import torchkv, torchkv.integrations")


def test_without_transformers_the_error_names_the_extra():
    code = """
try:
    import torchkv.integrations.transformers
except ModuleNotFoundError as error:
    assert "transformers is not installed" in str(error) and "jaxkv[transformers]" in str(error), error
else:
    raise SystemExit(1)
"""
    run(code, {"transformers"})
