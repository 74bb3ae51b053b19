"""README's code runs as it stands there."""

import pytest

from tests.cases.readme import BLOCKS, README


def test_there_is_a_quickstart_for_each_framework():
    assert [block.count("import jaxkv") for block in BLOCKS] == [1, 0]
    assert [block.count("import torchkv") for block in BLOCKS] == [0, 1]


@pytest.mark.parametrize("block", BLOCKS, ids=["jax", "torch"])
def test_quickstart(block):
    exec(compile(block, str(README), "exec"), {})


def test_every_layout_is_listed():
    from kvcore.layout import CONSTANTS

    for name, pattern in CONSTANTS.items():
        assert f"`{name}`" in README.read_text()
        assert f"`{pattern}`" in README.read_text()
