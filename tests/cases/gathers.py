"""Gathers for tests: one way to call each implementation, and the comparison with the oracle."""

import numpy as np

from kvcore.oracle import read as reference_attention
from tests.cases.arrays import DTYPES, bits, from_torch, to_torch

SLOTS = (3, -1, 0, 11, 10**9, 17, 11, -(2**31), 5)
"""Slots, some of which no cache of a few blocks has."""


def gather_oracle(case, max_len, dtype):
    return reference_attention.gather_kv(
        case.caches, case.block_tables, case.seq_lens, max_len, dtype=DTYPES[dtype],
        head_size=case.query.shape[2], head_size_v=case.head_size_v, **case.options,
    )  # fmt: skip


def gather(case, module, convert, back, max_len, dtype, backend):
    caches = [convert(c) for c in case.caches]
    head_size_v = case.head_size_v if case.layout.latent else None
    out = module.gather_kv(
        caches[0] if len(caches) == 1 else caches, convert(case.block_tables), convert(case.seq_lens), max_len,
        dtype=dtype, head_size=case.query.shape[2], head_size_v=head_size_v, backend=backend, **case.options,
    )  # fmt: skip
    return [back(x) for x in out]


def gather_jax(case, max_len, dtype, backend=None):
    import jax.numpy as jnp

    import jaxkv

    return gather(case, jaxkv, jnp.asarray, np.asarray, max_len, dtype, backend)


def gather_torch(case, max_len, dtype, backend=None, device="cpu"):
    import torchkv

    return gather(case, torchkv, lambda a: to_torch(a.copy(), device), from_torch, max_len, dtype, backend)


CPU_IMPLEMENTATIONS = {
    "jax xla": lambda *x: gather_jax(*x, "xla"),
    "jax interpret": lambda *x: gather_jax(*x, "interpret"),
    "torch": lambda *x: gather_torch(*x, "torch"),
    "torch interpret": lambda *x: gather_torch(*x, "interpret"),
}


def assert_gathers(case, max_len, dtype, implementations=CPU_IMPLEMENTATIONS):
    want = gather_oracle(case, max_len, dtype)
    for name, run in implementations.items():
        for got, array in zip(run(case, max_len, dtype), want, strict=True):
            assert got.dtype == array.dtype
            assert got.shape == array.shape
            np.testing.assert_array_equal(bits(got), bits(array), err_msg=name)


# ---- slots


def wanted_slots(case, slots, dtype):
    return reference_attention.gather_slots(
        case.caches, slots, dtype=DTYPES[dtype], head_size=case.query.shape[2], head_size_v=case.head_size_v,
        **case.options,
    )  # fmt: skip


def read_slots(case, slots, dtype, module, convert, back, backend):
    caches = [convert(c) for c in case.caches]
    options = {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
    head_size_v = case.head_size_v if case.layout.latent else None
    out = module.gather_slots(
        caches[0] if len(caches) == 1 else caches, convert(slots), dtype=dtype, head_size=case.query.shape[2],
        head_size_v=head_size_v, backend=backend, **options,
    )  # fmt: skip
    return [back(x) for x in out]
