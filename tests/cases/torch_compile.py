"""torch.compile in tests."""

import re

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tests.cases.arrays import bits, from_torch


def assert_bits(got, want):
    for tensor, array in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(from_torch(tensor)), bits(array))


@pytest.fixture
def compiler():
    """Nothing compiled before counts, nor what inductor has stored."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def compiled_code(function, *arguments, **options):
    """Runs a function compiled by inductor; gives the part of its code that calls kernels and ops."""
    _, (code,) = run_and_get_code(torch.compile(function, fullgraph=True, **options), *arguments)
    code = re.search(r"def call\(.*?\n\S", code, re.DOTALL).group()
    return re.sub(r"#.*", "", code)


def assert_no_copies(code, writes=1):
    """The code calls the op, and neither allocates nor computes anything."""
    assert len(re.findall(r"torch\.ops\.torchkv\.\w+\.default\(", code)) == writes, code
    assert not re.search(r"empty_strided|clone|copy(?!_blocks)|cpp_|extern_kernels|\baten\b", code), code
