"""Calls of `slot_mapping` for tests, and one way to make each implementation's."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcore.oracle.slots import slot_mapping as oracle_mapping
from tests.cases.arrays import from_torch, to_torch


@dataclass
class SlotCase:
    """Arguments of `slot_mapping`, as NumPy arrays."""

    block_tables: np.ndarray
    query_start_loc: np.ndarray | None
    seq_lens: np.ndarray
    block_size: int = 4
    num_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, function, convert, **more):
        starts = None if self.query_start_loc is None else convert(self.query_start_loc)
        arrays = convert(self.block_tables), starts, convert(self.seq_lens)
        return function(*arrays, self.block_size, self.num_tokens, **self.options | more)

    @property
    def wanted(self) -> np.ndarray:
        return self.call(oracle_mapping, lambda a: a)


def make_slots(
    rng,
    *,
    seq_lens=(0, 1, 5, 19),
    query_lens=(0, 1, 3, 7),
    block_size=4,
    spare=2,
    padding=0,
    dtype="int32",
    starts=None,
) -> SlotCase:
    """A case whose blocks are random, with garbage in the entries past each length.

    Args:
        rng: Source of randomness.
        query_lens: New tokens of each sequence; None for one each, without query_start_loc.
        spare: Entries of each row past the longest sequence's.
        padding: Entries of the result after the last sequence's.
        starts: query_start_loc, where it is not what query_lens make.
    """
    columns = max(-(-n // block_size) for n in (*seq_lens, 0)) + spare
    tables = rng.integers(-3, 1000, (len(seq_lens), columns))
    for row, n in zip(tables, seq_lens, strict=True):
        used = -(-n // block_size)
        row[:used] = rng.integers(0, 1000, used)
    if query_lens is None:
        return SlotCase(tables.astype(dtype), None, np.array(seq_lens, dtype), block_size, len(seq_lens) + padding)
    if starts is None:
        starts = np.concatenate([[0], np.cumsum(query_lens)])
    num_tokens = sum(query_lens) + padding
    return SlotCase(tables.astype(dtype), np.array(starts, dtype), np.array(seq_lens, dtype), block_size, num_tokens)


def map_torch(case: SlotCase, backend=None, device="cpu") -> np.ndarray:
    import torchkv

    return from_torch(case.call(torchkv.slot_mapping, lambda a: to_torch(a.copy(), device), backend=backend))


def map_jax(case: SlotCase, backend=None) -> np.ndarray:
    import jaxkv

    # int64 stays NumPy's: JAX would warn.
    return np.asarray(case.call(jaxkv.slot_mapping, np.copy, backend=backend))


CPU_IMPLEMENTATIONS = {
    "jax xla": lambda case: map_jax(case, "xla"),
    "jax interpret": lambda case: map_jax(case, "interpret"),
    "torch": lambda case: map_torch(case, "torch"),
    "torch interpret": lambda case: map_torch(case, "interpret"),
}


def assert_maps(case: SlotCase, implementations=CPU_IMPLEMENTATIONS) -> None:
    """Every implementation gives the oracle's slots."""
    want = case.wanted
    for name, run in implementations.items():
        got = run(case)
        assert got.dtype == np.int32, name
        np.testing.assert_array_equal(got, want, err_msg=name)
