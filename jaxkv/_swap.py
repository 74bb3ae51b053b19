"""A call of `swap_blocks`, as the primitive and backends pass it on: its options and its operands."""

from typing import Any, NamedTuple

from jaxkv._call import CacheOperands, CacheOptions, specs_of
from kvcore.contract.swap import Swap, check_swap


class SwapOperands(NamedTuple):
    """The arrays of a call. With a batch, all have it in front.

    Attributes:
        cache: What is written.
        source: What is read.
        pairs: `(n, 2)`: blocks of source and of destination.
    """

    cache: CacheOperands
    source: CacheOperands
    pairs: Any

    @property
    def results_of(self) -> tuple[tuple[str, ...], ...]:
        """Names of operands that results depend on: of all, on all."""
        return (self._fields,)

    def named(self) -> dict[str, Any]:
        """The arrays, each with what errors call it."""
        sides = {"source": self.source, "destination": self.cache}
        arrays = {f"{side}'s {name}": array for side, cache in sides.items() for name, array in cache.named().items()}
        return arrays | {"pairs": self.pairs}


class SwapOptions(NamedTuple):
    """What is static about a call.

    Attributes:
        cache: What is written, and what is read.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        batched: Whether there is a batch of both caches, each with pairs of its own.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
    """

    cache: CacheOptions
    backend: str | None
    batched: bool = False
    compute_capability: int | None = None

    def describe(self, operands: SwapOperands) -> Swap:
        """The contract's description of the call."""
        specs = specs_of(operands)
        source, cache = specs.source, specs.cache
        return check_swap(
            specs.pairs, (source.caches, source.scale_caches), (cache.caches, cache.scale_caches), self.cache.layout,
            self.cache.scale_layout, self.batched,
        )  # fmt: skip
