"""What tests of bad calls that move blocks share."""

import numpy as np

from kvcore.contract.blocks import DTYPES
from tests.cases.arrays import DTYPES as ARRAYS
from tests.cases.arrays import random_bits

SPELLED = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
CHOICES = {"jaxkv": "'triton', 'xla' or 'interpret'", "torchkv": "'triton', 'torch' or 'interpret'"}


def array(*shape, dtype="bfloat16"):
    return random_bits(np.random.default_rng(0), shape, dtype) if dtype in ARRAYS else np.ones(shape, dtype)


def pairs(*shape, dtype="int32"):
    return np.zeros(shape, dtype)


def convert(arguments, one):
    return {
        name: tuple(map(one, x)) if isinstance(x, tuple) else one(x) if isinstance(x, np.ndarray) else x
        for name, x in arguments.items()
    }
