"""Calls of the ops: their arguments by name, and what the contract says of them.

Each kind of call has `check`, which looks at no address, so that tensors may be fake, and `check_memory`, which does.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.arrays import ArraySpec, array_names, with_unit_axis
from kvcore.contract.cache import CacheArguments, check_cache_address
from kvcore.contract.checks import check_devices, check_result
from kvcore.contract.read import (
    Attention,
    AttentionOptions,
    Gather,
    check_attention,
    check_gather,
    check_gather_slots,
)
from kvcore.contract.write import Write, check_mla, check_write
from torchkv._arguments import maybe_spec, spec_of
from torchkv._memory import address_of, check_apart, check_results_apart

Results = tuple[Tensor, Tensor]
"""Result and log-sum-exp, or key and value."""


class WriteCall(NamedTuple):
    """Arguments of an op that writes.

    Attributes:
        key: Rows of K; kv_c where latent.
        value: Rows of V; k_pe where latent.
        caches: The key and the value cache, or the one with both.
        scale_caches: Those of key and value, or none.
        slot_mapping: As it is passed to the op, like all that follow.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`.
        k_scale: None where there are scale caches.
        v_scale: None where there are scale caches.
        layout: A pattern.
        layer: A static index.
        layer_index: An index in memory; it or layer is None.
        backend: None, "triton", "torch" or "interpret".
        scale_layout: A pattern.
        latent: Whether it is `concat_and_cache_mla`, whose tensors have no axis for their single head.
    """

    key: Tensor
    value: Tensor
    caches: tuple[Tensor, ...]
    scale_caches: tuple[Tensor, ...]
    slot_mapping: Tensor
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    backend: str | None
    scale_layout: str | None = None
    latent: bool = False

    @property
    def device(self) -> torch.device:
        """Where the op runs."""
        return self.key.device

    @property
    def written(self) -> tuple[Tensor, ...]:
        """All tensors that are written to."""
        return self.caches + self.scale_caches

    @property
    def written_names(self) -> tuple[str, ...]:
        """What errors call the tensors that are written to."""
        return array_names(len(self.caches), len(self.scale_caches))

    @property
    def cache_arguments(self) -> CacheArguments:
        """The cache that is written, as the contract is told of it."""
        return CacheArguments(
            caches=[spec_of(c) for c in self.caches],
            kv_cache_dtype=self.kv_cache_dtype,
            k_scale=maybe_spec(self.k_scale),
            v_scale=maybe_spec(self.v_scale),
            layout=self.layout,
            layer=_layer_spec(self),
            scale_caches=[spec_of(c) for c in self.scale_caches],
            scale_layout=self.scale_layout,
        )

    def check(self) -> Write:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit.
            TypeError: a dtype does not fit.
        """
        key, value, slot_mapping = spec_of(self.key), spec_of(self.value), spec_of(self.slot_mapping)
        cache = self.cache_arguments
        if self.latent:
            kv_cache, scale = cache.caches[0], cache.k_scale
            check_mla(key, value, kv_cache, self.kv_cache_dtype, cache.layer, scale=scale)
            check_devices([("kv_c", key), ("k_pe", value), ("scale", scale)], "kv_cache", kv_cache)
            key, value = with_unit_axis(key, 1), with_unit_axis(value, 1)
            if self.kv_cache_dtype != "fp8_ds_mla":  # whose layout has no axis head either
                cache = cache._replace(caches=[with_unit_axis(kv_cache, len(kv_cache.shape) - 1)])
        return check_write(key, value, slot_mapping, cache)

    def check_memory(self, write: Write) -> None:
        """Raises a ValueError unless written tensors share no memory, and the cache's address lets it be read."""
        check_apart(self.written_names, self.written)
        check_cache_address(write.cache.format, address_of(self.caches[0]))


class AttentionCall(NamedTuple):
    """Arguments of `paged_attention`, in the order of its schema; layer is a static index, layer_index one in memory.

    `results` are the tensors that `paged_attention_out` writes to.
    """

    query: Tensor
    caches: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    head_size_v: int | None
    backend: str | None
    scale_layout: str | None = None
    results: Results | None = None

    @property
    def device(self) -> torch.device:
        """Where the op runs."""
        return self.query.device

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """What is read, by the names of the arguments."""
        return {
            "query": self.query, **_named(self.caches), "block_tables": self.block_tables, "seq_lens": self.seq_lens,
            "query_start_loc": self.query_start_loc, "sinks": self.sinks, "k_scale": self.k_scale,
            "v_scale": self.v_scale, "layer": self.layer_index,
        }  # fmt: skip

    def check(self) -> Attention:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit, or a tensor for a result is not contiguous.
            TypeError: a dtype does not fit.
        """
        attention = check_attention(
            spec_of(self.query),
            spec_of(self.block_tables),
            spec_of(self.seq_lens),
            maybe_spec(self.query_start_loc),
            maybe_spec(self.sinks),
            AttentionOptions(self.scale, self.causal, self.sliding_window, self.soft_cap),
            _cache_read(self),
            self.head_size_v,
        )
        if self.results is not None:
            shape = attention.out_shape
            expected = [(shape, attention.query.dtype), (shape[:2], "float32")]
            _check_results(ATTENTION_RESULTS, self.results, expected, ("query", attention.query))
        return attention

    def check_memory(self, attention: Attention) -> None:
        """Raises a ValueError unless results share no memory with inputs, and the cache's address lets it be read."""
        check_cache_address(attention.cache.format, address_of(self.caches[0]))
        if self.results is not None:
            check_results_apart(ATTENTION_RESULTS, self.results, self.inputs)


class GatherCall(NamedTuple):
    """Arguments of `gather_kv`, in the order of its schema; layer is a static index, layer_index one in memory.

    Where seq_lens is None, it is `gather_slots`: block_tables are slots, `(n,)`, and max_len says nothing.
    `results` are the tensors that `gather_kv_out` writes to.
    """

    caches: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor | None
    max_len: int
    dtype: str | None
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    head_size: int | None
    head_size_v: int | None
    backend: str | None
    scale_layout: str | None = None
    results: Results | None = None

    @property
    def device(self) -> torch.device:
        """Where the op runs."""
        return self.caches[0].device

    @property
    def _table(self) -> str:
        return "slots" if self.seq_lens is None else "block_tables"

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """What is read, by the names of the arguments."""
        return {
            **_named(self.caches), self._table: self.block_tables, "seq_lens": self.seq_lens,
            "k_scale": self.k_scale, "v_scale": self.v_scale, "layer": self.layer_index,
        }  # fmt: skip

    def check(self) -> Gather:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit, or a tensor for a result is not contiguous.
            TypeError: a dtype does not fit.
        """
        tables, rest = spec_of(self.block_tables), (self.dtype, _cache_read(self), self.head_size, self.head_size_v)
        if self.seq_lens is None:
            gather = check_gather_slots(tables, *rest)
        else:
            gather = check_gather(tables, spec_of(self.seq_lens), self.max_len, *rest)
        if self.results is not None:
            expected = [(shape, gather.format.name) for shape in gather.shapes]
            _check_results(GATHER_RESULTS, self.results, expected, (self._table, gather.block_tables))
        return gather

    def check_memory(self, gather: Gather) -> None:
        """Raises a ValueError unless results share no memory with inputs, and the cache's address lets it be read."""
        check_cache_address(gather.cache.format, address_of(self.caches[0]))
        if self.results is not None:
            check_results_apart(GATHER_RESULTS, self.results, self.inputs)


Call = WriteCall | AttentionCall | GatherCall

ATTENTION_RESULTS, GATHER_RESULTS = ("out", "lse"), ("out[0]", "out[1]")
"""What errors call tensors that are given for results."""


def layer_of(call: Call) -> int | Tensor | None:
    """The layer: a static index, or one in memory."""
    return call.layer if call.layer_index is None else call.layer_index


def _layer_spec(call: Call) -> int | ArraySpec | None:
    """The layer, as the contract is told of it."""
    return call.layer if call.layer_index is None else spec_of(call.layer_index)


def _cache_read(call: AttentionCall | GatherCall) -> CacheArguments:
    """The cache that is read, as the contract is told of it."""
    return CacheArguments(
        caches=[spec_of(c) for c in call.caches],
        kv_cache_dtype=call.kv_cache_dtype,
        k_scale=maybe_spec(call.k_scale),
        v_scale=maybe_spec(call.v_scale),
        layout=call.layout,
        layer=_layer_spec(call),
        scale_layout=call.scale_layout,
    )


def _check_results(
    names: Sequence[str],
    results: Results,
    expected: Sequence[tuple[tuple[int, ...], str]],
    home: tuple[str, ArraySpec],
) -> None:
    """Checks tensors for results, against shapes and dtypes; they are on the device of `home`, a named input."""
    specs = [spec_of(r) for r in results]
    for name, spec, (shape, dtype) in zip(names, specs, expected, strict=True):
        check_result(name, spec, shape, dtype)
    check_devices(list(zip(names, specs, strict=True)), *home)


def _named(caches: Sequence[Tensor]) -> Mapping[str, Tensor]:
    return dict(zip(array_names(len(caches)), caches, strict=True))
