"""The code on the pages for those who come from elsewhere runs as it stands there."""

import re

import pytest

from tests.cases.processes import ROOT

PAGES = ["from-flashinfer", "from-pallas"]


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
