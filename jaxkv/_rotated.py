"""A call of `rope_and_cache`, as its primitive and its backends pass it on: as `jaxkv._call` has those of other ops."""

from typing import Any, NamedTuple

from jaxkv._call import CacheOperands, CacheOptions, WriteOperands, specs_of
from kvcore.contract.rope import Rope, RopeOptions, describe_rope


class RotatedWriteOperands(NamedTuple):
    """The arrays of a write of keys that are rotated before, with their queries.

    Attributes:
        query: `(num_tokens, num_q_heads, head_size)`; it may be a view, like the next two.
        key: `(num_tokens, num_heads, head_size)`; of MLA kv_c, with one head.
        value: `(num_tokens, num_heads, head_size_v)`; of MLA k_pe, with one head.
        cache: What is written.
        slot_mapping: `(n,)`.
        positions: `(num_tokens,)`, or `(3, num_tokens)`.
        cos_sin: `(max_position, rotary_dim)`.
        q_norm: `(head_size,)`; None for no norm.
        k_norm: `(head_size,)`; None for no norm.
    """

    query: Any
    key: Any
    value: Any
    cache: CacheOperands
    slot_mapping: Any
    positions: Any
    cos_sin: Any
    q_norm: Any | None
    k_norm: Any | None

    @property
    def write(self) -> WriteOperands:
        """Those of the write."""
        return WriteOperands(self.key, self.value, self.cache, self.slot_mapping)

    @property
    def results_of(self) -> tuple[tuple[str, ...], ...]:
        """Names of operands that query's result depends on, and of those that caches and scale caches do."""
        query = "query", "positions", "cos_sin", "q_norm"
        return query, ("key", "value", "cache", "slot_mapping", "positions", "cos_sin", "k_norm")

    @property
    def updated(self) -> tuple[Any, ...]:
        """The operands whose new states are the results, with their shapes and dtypes: query, caches, scale caches."""
        return self.query, *self.cache.memory

    def named(self) -> dict[str, Any]:
        """The arrays that there are, each with what errors call it."""
        rest = {"positions": self.positions, "cos_sin": self.cos_sin, "q_norm": self.q_norm, "k_norm": self.k_norm}
        present = {name: array for name, array in rest.items() if array is not None}
        return {"query": self.query, **self.write.named(), **present}


class RotatedWriteOptions(NamedTuple):
    """What is static about a write of keys that are rotated before.

    Attributes:
        cache: What is written.
        rope: What rotation and norm compute.
        latent: Whether key and value are the two parts of MLA's rows, of which value is rotated.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
    """

    cache: CacheOptions
    rope: RopeOptions
    latent: bool
    backend: str | None
    compute_capability: int | None = None

    def describe(self, operands: RotatedWriteOperands) -> Rope:
        """The contract's description of the call."""
        specs = specs_of(operands)
        return describe_rope(
            specs.query, specs.key, specs.value, specs.positions, specs.cos_sin, specs.slot_mapping, specs.q_norm,
            specs.k_norm, self.rope, self.cache.arguments(specs.cache), self.latent,
        )  # fmt: skip
