"""Writing with the kernels on a GPU."""

import numpy as np

from tests.cases.arrays import bits, from_torch


def assert_caches(caches, want):
    for got, cache in zip(caches, want, strict=True):
        np.testing.assert_array_equal(bits(from_torch(got)), bits(cache))
