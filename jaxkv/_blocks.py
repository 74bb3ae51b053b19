"""A call that moves whole blocks, as primitives and backends pass it on: its options and its operands."""

from typing import Any, NamedTuple

from jaxkv._call import CacheOperands, CacheOptions, specs_of
from kvcore.contract.blocks import Blocks, check_blocks


class BlocksOperands(NamedTuple):
    """The arrays of a call. With a batch, all have it in front.

    Attributes:
        cache: What is changed.
        pairs: `(n, 2)`: source and destination; None where blocks are filled with zeros.
        blocks: `(n,)`; None where blocks are copied.
    """

    cache: CacheOperands
    pairs: Any | None
    blocks: Any | None

    @property
    def indices(self) -> Any:
        """Pairs, or blocks."""
        return self.blocks if self.pairs is None else self.pairs

    @property
    def results_of(self) -> tuple[tuple[str, ...], ...]:
        """Names of operands that results depend on: of all, on all."""
        return (self._fields,)

    def named(self) -> dict[str, Any]:
        """The arrays that there are, each with what errors call it."""
        indices = {"pairs": self.pairs, "blocks": self.blocks}
        return self.cache.named() | {name: array for name, array in indices.items() if array is not None}


class BlocksOptions(NamedTuple):
    """What is static about a call.

    Attributes:
        cache: What is changed.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        batched: Whether there is a batch of caches, each with pairs or blocks of its own.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
    """

    cache: CacheOptions
    backend: str | None
    batched: bool = False
    compute_capability: int | None = None

    def describe(self, operands: BlocksOperands) -> Blocks:
        """The contract's description of the call."""
        specs = specs_of(operands)
        name = "blocks" if operands.pairs is None else "pairs"
        return check_blocks(
            name, specs.indices, specs.cache.caches, specs.cache.scale_caches, self.cache.layout,
            self.cache.scale_layout, self.batched,
        )  # fmt: skip
