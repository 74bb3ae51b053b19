"""Runs JAX's own tests of Pallas's paged attention with `jaxkv.integrations.pallas` in its place.

    python -m tests.integrations.run_pallas_tests PATH... [pytest's options]

PATH is a file of JAX's repository, `tests/pallas/gpu_paged_attention_test.py` or
`tests/pallas/tpu_ragged_paged_attention_test.py`. What they skip for want of a GPU or a TPU runs: jaxkv needs neither.
`JAX_NUM_GENERATED_CASES` says how many cases of each test of the first are drawn; JAX's default is 10.
"""

import sys
from collections import Counter
from importlib import import_module

import pytest

from jaxkv.integrations import pallas

THEIRS = {
    "paged_attention": "jax.experimental.pallas.ops.gpu.paged_attention",
    "ragged_paged_attention": "jax.experimental.pallas.ops.tpu.ragged_paged_attention",
}


def replaced(calls: Counter) -> None:
    """Puts functions that count their calls in the place of Pallas's, and lifts the conditions on devices."""
    for name, module in THEIRS.items():
        ours = getattr(pallas, name)

        def counted(*args, _ours=ours, **options):
            calls[_ours.__name__] += 1
            return _ours(*args, **options)

        setattr(import_module(module), name, counted)
    jtu = import_module("jax._src.test_util")
    jtu.is_device_tpu_at_least = lambda version: True
    jtu.is_cuda_compute_capability_at_least = lambda capability: True


def main() -> int:
    calls: Counter = Counter()
    replaced(calls)
    status = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", "-q", *sys.argv[1:]])
    print("calls:", dict(calls))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
