"""A call of an op, as primitives and backends pass it on: its options and its operands.

Options are the static half: hashable, and without shapes, which sharding and batching change. Operands are the arrays,
a pytree with a name for each; the same classes hold specs, shardings or partition specs instead of arrays. Key, value
and query may be views of heads (`jaxkv._views`), whose one leaf is the array that they are of. Both halves have a part
`cache`, the same for all ops. `options.describe(operands)` is the contract's description of the call.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv._views import Heads, is_view
from kvcore.arrays import ArraySpec, array_names
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import (
    Attention,
    AttentionOptions,
    Gather,
    check_attention,
    check_gather,
    check_gather_slots,
)
from kvcore.contract.write import Write, check_write
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis


class CacheOptions(NamedTuple):
    """What is static about the cache of a call.

    Attributes:
        kv_cache_dtype: Name of the format in which elements are stored.
        layout: Of the caches.
        scale_layout: Of the scale caches; None where there are none.
        layer: Index into the layout's axis layer; None where it has none, or where the index is an operand.
    """

    kv_cache_dtype: str
    layout: CacheLayout
    scale_layout: CacheLayout | None
    layer: int | None

    @property
    def arrays(self) -> list[Sequence[Axis]]:
        """Axes of each cache, then of each scale cache. The latter lack the last axis of their layout."""
        scale_arrays = () if self.scale_layout is None else self.scale_layout.arrays
        return [*self.layout.arrays, *(axes[:-1] for axes in scale_arrays)]

    def with_layer_axis(self) -> "CacheOptions":
        """The same cache with an axis layer in front; an operand is the index into that."""
        scale_layout = None if self.scale_layout is None else self.scale_layout.with_layer()
        return self._replace(layout=self.layout.with_layer(), scale_layout=scale_layout, layer=None)

    def arguments(self, specs: "CacheOperands") -> CacheArguments:
        """What the contract is told of a cache whose arrays have these specs."""
        return CacheArguments(
            caches=specs.caches,
            kv_cache_dtype=self.kv_cache_dtype,
            k_scale=specs.k_scale,
            v_scale=specs.v_scale,
            layout=self.layout,
            layer=layer_of(self, specs),
            scale_caches=specs.scale_caches,
            scale_layout=self.scale_layout,
        )


class CacheOperands(NamedTuple):
    """The arrays of a cache.

    Attributes:
        caches: The key and the value cache, or the one array that holds both.
        scale_caches: The scales of keys and of values where each token's head has one; else empty.
        k_scale: Static scale of keys, `(1,)` or `(num_heads,)`, maybe with `num_layers` in front; None for none.
        v_scale: Static scale of values, of the same shapes; None for none.
        layer: Index of shape `(1,)` into the layout's axis layer; None where it has none, or where the index is static.
    """

    caches: tuple[Any, ...]
    scale_caches: tuple[Any, ...]
    k_scale: Any | None
    v_scale: Any | None
    layer: Any | None

    @property
    def memory(self) -> tuple[Any, ...]:
        """All arrays that a write updates: caches, then scale caches."""
        return *self.caches, *self.scale_caches

    def with_memory(self, memory: Sequence[Any]) -> "CacheOperands":
        """The same with other arrays for `memory`."""
        count = len(self.caches)
        return self._replace(caches=tuple(memory[:count]), scale_caches=tuple(memory[count:]))

    @property
    def scales(self) -> tuple[Any | None, Any | None]:
        """What K and V are multiplied by where they are read: scale caches, or static scales; None for none."""
        k_scale, v_scale = self.scale_caches or (self.k_scale, self.v_scale)
        return k_scale, v_scale

    def named(self, scale_names: Sequence[str] = ("k_scale_cache", "v_scale_cache")) -> dict[str, Any]:
        """The arrays that there are, each with what errors call it; scale caches have names that depend on the op."""
        names = *array_names(len(self.caches)), *scale_names[: len(self.scale_caches)]
        rest = {"k_scale": self.k_scale, "v_scale": self.v_scale, "layer": self.layer}
        present = {name: array for name, array in rest.items() if array is not None}
        return dict(zip(names, self.memory, strict=True)) | present


class WriteOperands(NamedTuple):
    """The arrays of a write.

    Attributes:
        key: `(num_tokens, num_heads, head_size)`; it may be a view.
        value: `(num_tokens, num_heads, head_size_v)`; it may be a view.
        cache: What is written.
        slot_mapping: `(n,)`.
    """

    key: Any
    value: Any
    cache: CacheOperands
    slot_mapping: Any

    @property
    def results_of(self) -> tuple[tuple[str, ...], ...]:
        """Names of operands that results depend on: of all, on all."""
        return (self._fields,)

    @property
    def updated(self) -> tuple[Any, ...]:
        """The operands whose new states are the results, with their shapes and dtypes."""
        return self.cache.memory

    def named(self) -> dict[str, Any]:
        """The arrays, each with what errors call it."""
        return {"key": self.key, "value": self.value, **self.cache.named(), "slot_mapping": self.slot_mapping}


class WriteOptions(NamedTuple):
    """What is static about a write.

    Attributes:
        cache: What is written.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
    """

    cache: CacheOptions
    backend: str | None
    compute_capability: int | None = None

    def describe(self, operands: WriteOperands) -> Write:
        """The contract's description of the write."""
        specs = specs_of(operands)
        return check_write(specs.key, specs.value, specs.slot_mapping, self.cache.arguments(specs.cache))


class ReadOperands(NamedTuple):
    """The arrays of an attention or a gather.

    Attributes:
        query: `(num_tokens, num_q_heads, head_size)`, maybe a view; None for a gather.
        cache: What is read.
        block_tables: `(num_seqs, max_blocks)`; slots `(n,)`, where these are gathered.
        seq_lens: `(num_seqs,)`; None for slots.
        query_start_loc: `(num_seqs + 1,)`; None for one query a sequence, and for a gather.
        sinks: `(num_q_heads,)`; None for none.
    """

    query: Any | None
    cache: CacheOperands
    block_tables: Any
    seq_lens: Any  # None for slots
    query_start_loc: Any | None
    sinks: Any | None

    @property
    def results_of(self) -> tuple[tuple[str, ...], ...]:
        """Names of operands that results depend on: of all, on all."""
        return (self._fields,)

    def named(self) -> dict[str, Any]:
        """The arrays that there are, each with what errors call it."""
        named = {
            "query": self.query,
            **self.cache.named(("k_scale", "v_scale")),
            "slots" if self.seq_lens is None else "block_tables": self.block_tables,
            "seq_lens": self.seq_lens,
            "query_start_loc": self.query_start_loc,
            "sinks": self.sinks,
        }
        return {name: array for name, array in named.items() if array is not None}


class ReadOptions(NamedTuple):
    """What is static about an attention or a gather.

    Attributes:
        cache: What is read.
        head_size: Elements of a key where neither query nor the layout tells; else None.
        head_size_v: Elements of a value where the layout does not tell; else None.
        backend: "triton", "xla" or "interpret"; None for the platform's usual one.
        attention: What attention computes; None for a gather.
        max_len: Positions of a sequence in the results of a gather; None where slots are gathered.
        dtype: Of these results; None for the usual one.
        compute_capability: Of the CUDA devices that are compiled for; None where it is not known.
    """

    cache: CacheOptions
    head_size: int | None
    head_size_v: int | None
    backend: str | None
    attention: AttentionOptions | None = None
    max_len: int | None = 0
    dtype: str | None = None
    compute_capability: int | None = None

    def describe(self, operands: ReadOperands) -> Attention | Gather:
        """The contract's description of the read."""
        specs = specs_of(operands)
        k_scale, v_scale = specs.cache.scales  # users pass scale caches as k_scale and v_scale, and errors say so
        cache = specs.cache._replace(scale_caches=(), k_scale=k_scale, v_scale=v_scale)
        arguments = self.cache.arguments(cache)
        if specs.seq_lens is None:
            return check_gather_slots(specs.block_tables, self.dtype, arguments, self.head_size, self.head_size_v)
        if self.attention is None:
            return check_gather(
                specs.block_tables, specs.seq_lens, self.max_len or 0, self.dtype, arguments, self.head_size,
                self.head_size_v,
            )  # fmt: skip
        return check_attention(
            specs.query, specs.block_tables, specs.seq_lens, specs.query_start_loc, specs.sinks, self.attention,
            arguments, self.head_size_v,
        )  # fmt: skip


def layer_of(options: CacheOptions, operands: CacheOperands) -> Any:
    """The index of the layer: static, or in an array; None where the layout has no such axis."""
    return options.layer if operands.layer is None else operands.layer


def specs_of(operands: Any) -> Any:
    """Operands, a pytree, with specs in place of arrays and views."""
    return jax.tree.map(spec_of, operands, is_leaf=is_view)


def spec_of(array: Any) -> ArraySpec:
    """What the contract asks of an array, or of a view."""
    if isinstance(array, Heads):
        return array.check().spec
    return ArraySpec(tuple(array.shape), np.dtype(array.dtype).name)


def read_results(call: Attention | Gather) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what a read returns: result and log-sum-exp, or key and value."""
    if isinstance(call, Gather):
        dtype = jnp.dtype(call.format.name)
        key, value = (jax.ShapeDtypeStruct(shape, dtype) for shape in call.shapes)
        return key, value
    shape = call.out_shape
    return jax.ShapeDtypeStruct(shape, jnp.dtype(call.query.dtype)), jax.ShapeDtypeStruct(shape[:2], jnp.float32)
