"""README's code runs as it stands there."""

import pytest

from tests.cases.readme import BLOCKS, README


def test_there_is_a_quickstart_for_each_framework_and_one_for_both():
    assert [block.count("import jaxkv") for block in BLOCKS] == [1, 0, 0]
    assert [block.count("import torchkv") for block in BLOCKS] == [0, 1, 0]
    assert [block.count("from jaxkv import BlockPool") for block in BLOCKS] == [0, 0, 1]


@pytest.mark.parametrize("block", BLOCKS, ids=["jax", "torch", "blocks"])
def test_quickstart(block):
    exec(compile(block, str(README), "exec"), {})


def test_every_layout_is_listed():
    from kvcore.layout import CONSTANTS

    for name, pattern in CONSTANTS.items():
        assert f"`{name}`" in README.read_text()
        assert f"`{pattern}`" in README.read_text()
