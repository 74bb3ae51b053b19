"""A call of `slot_mapping`, as primitive and backends pass it on: see `jaxkv._call`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv._call import specs_of
from kvcore.contract.slots import SlotMapping, check_slot_mapping


class SlotOperands(NamedTuple):
    """The arrays of a slot mapping.

    Attributes:
        block_tables: `(num_seqs, max_blocks)`.
        query_start_loc: `(num_seqs + 1,)`; None for one token a sequence.
        seq_lens: `(num_seqs,)`.
    """

    block_tables: Any
    query_start_loc: Any | None
    seq_lens: Any

    def named(self) -> dict[str, Any]:
        """The arrays that there are, each with what errors call it."""
        return {name: array for name, array in self._asdict().items() if array is not None}


class SlotOptions(NamedTuple):
    """What is static about a slot mapping.

    Attributes:
        block_size: Slots of a block.
        num_tokens: Entries of the result; None: one a sequence.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
    """

    block_size: int
    num_tokens: int | None
    backend: str | None
    compute_capability: int | None = None

    def describe(self, operands: SlotOperands) -> SlotMapping:
        """The contract's description of the call."""
        specs = specs_of(operands)
        return check_slot_mapping(
            specs.block_tables, specs.query_start_loc, specs.seq_lens, self.block_size, self.num_tokens
        )


def slots_result(call: SlotMapping) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the result."""
    return jax.ShapeDtypeStruct((call.num_tokens,), jnp.int32)
