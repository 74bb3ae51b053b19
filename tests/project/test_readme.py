"""What README must have. That its code runs is tests/docs/test_pages.py's."""

from tests.cases.pages import README, python_blocks


def test_there_is_a_quickstart_for_each_framework_and_one_for_both():
    blocks = python_blocks(README.read_text())
    assert [block.count("import jaxkv") for block in blocks] == [1, 0, 0]
    assert [block.count("import torchkv") for block in blocks] == [0, 1, 0]
    assert [block.count("from jaxkv import BlockPool") for block in blocks] == [0, 0, 1]


def test_every_layout_is_listed():
    from kvcore.layout import CONSTANTS

    for name, pattern in CONSTANTS.items():
        assert f"`{name}`" in README.read_text()
        assert f"`{pattern}`" in README.read_text()
