"""The example runs as it stands."""

import runpy

from tests.cases.processes import ROOT


def test_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "one_buffer.py"))
    assert capsys.readouterr().out == "40 tokens written by torch, 8 by JAX, in one memory\n"
