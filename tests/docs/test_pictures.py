"""The pictures in docs/pictures are what docs/_pictures.py makes, and the page shows them."""

import importlib.util
import re

import pytest

from tests.cases.drawings import assert_stands_on_its_own
from tests.cases.processes import ROOT


def script():
    spec = importlib.util.spec_from_file_location("_pictures", ROOT / "docs" / "_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PICTURES = script().pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_what_the_script_makes(name):
    """`python docs/_pictures.py` makes them anew."""
    assert (ROOT / "docs" / "pictures" / name).read_text() == PICTURES[name]
    assert_stands_on_its_own(PICTURES[name])


def test_the_page_shows_every_picture():
    page = (ROOT / "docs" / "concepts.md").read_text()
    shown = re.findall(r"!\[[^\]]{8,}\]\(pictures/([^)]+)\)", page)
    assert sorted(shown) == sorted(PICTURES)
    files = [file.name for file in (ROOT / "docs" / "pictures").iterdir() if ", sha256 " not in file.read_text()]
    assert sorted(shown) == sorted(files)  # the others are of `benchmarks plot`
