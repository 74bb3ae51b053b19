"""The docstrings' examples run, and what is said where something is missing."""

import doctest

import pytest

from tests.cases.processes import run
from torchkv.integrations.transformers import PagedCache, continuous_batching


@pytest.mark.parametrize("documented", [PagedCache, continuous_batching])
def test_the_example(documented):
    import torch

    (test,) = doctest.DocTestFinder(recurse=False).find(documented, globs={"torch": torch})
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
