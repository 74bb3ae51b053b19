"""A call of `relayout`, as the primitive and backends pass it on: its options and its operands."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv._call import CacheOperands, CacheOptions, specs_of
from kvcore.contract.cache import CacheArguments
from kvcore.contract.relayout import Relayout, check_relayout


class RelayoutOperands(NamedTuple):
    """The arrays of a call.

    Attributes:
        cache: What is written.
        source: What is read.
        pairs: `(n, 2)`, slots of source and destination; None for all slots.
    """

    cache: CacheOperands
    source: CacheOperands
    pairs: Any | None

    @property
    def results_of(self) -> tuple[tuple[str, ...], ...]:
        """Names of operands that results depend on: of all, on all."""
        return (self._fields,)

    def named(self) -> dict[str, Any]:
        """The arrays that there are, each with what errors call it."""
        source = {f"source's {name}": array for name, array in self.source.named().items()}
        pairs = {} if self.pairs is None else {"pairs": self.pairs}
        return self.cache.named() | source | pairs

    def slots(self, num_pairs: Any) -> tuple[jax.Array, jax.Array]:
        """Slots of the source and of the destination; in a vmap, pairs may have a batch in front."""
        if self.pairs is None:
            slots = jnp.arange(num_pairs, dtype=jnp.int32)
            return slots, slots
        return self.pairs[..., 0], self.pairs[..., 1]


class RelayoutOptions(NamedTuple):
    """What is static about a call.

    Attributes:
        cache: What is written.
        source: What is read.
        head_size: Elements of a key head.
        head_size_v: Elements of a value head where the layout does not tell; else None.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
        requantise: Whether keys and values are read and written; else bits move.
    """

    cache: CacheOptions
    source: CacheOptions
    head_size: int
    head_size_v: int | None
    backend: str | None
    compute_capability: int | None = None
    requantise: bool = False

    def describe(self, operands: RelayoutOperands) -> Relayout:
        """The contract's description of the call."""
        specs = specs_of(operands)
        caches = _arguments(self.source, specs.source), _arguments(self.cache, specs.cache)
        return check_relayout(*caches, specs.pairs, self.head_size, self.head_size_v, self.requantise)


def _arguments(options: CacheOptions, specs: CacheOperands) -> CacheArguments:
    k_scale, v_scale = specs.scales  # readers are told of scale caches so
    return options.arguments(specs._replace(scale_caches=(), k_scale=k_scale, v_scale=v_scale))
