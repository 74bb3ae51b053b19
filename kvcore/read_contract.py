"""The contract of the ops that read a cache: every check, every error message, once for both frameworks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvcore.checks import (
    ArraySpec,
    check_devices,
    check_indices,
    check_layer,
    check_rank,
    check_same_dtype,
    check_scale,
    either,
    layout_of,
    shape_of,
)
from kvcore.layout import CacheLayout, Placement
from kvcore.quantization import FLOATS, FP8, KV_CACHE_DTYPES, FloatFormat


class Cache(NamedTuple):
    """A cache to be read; hashable.

    Attributes:
        layout: Never None.
        placement: Extents and addresses of K and V.
        dtype: dtype of the array or arrays.
        format: What they hold.
    """

    layout: CacheLayout
    placement: Placement
    dtype: str
    format: FloatFormat

    @property
    def scaled(self) -> bool:
        """Whether scales mean anything."""
        return self.format.name in FP8


class Options(NamedTuple):
    """What attention computes; hashable. See `paged_attention` for the meanings. A scale of None is the usual one."""

    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None


class Attention(NamedTuple):
    """A call of `paged_attention` that fulfils the contract; hashable.

    Attributes:
        cache: What is read.
        query: The spec of query.
        block_tables: The spec of block_tables.
        seq_lens: The spec of seq_lens.
        query_start_loc: The spec of query_start_loc, or None for one token a sequence.
        sinks: The spec of sinks, or None.
        options: What is computed.
    """

    cache: Cache
    query: ArraySpec
    block_tables: ArraySpec
    seq_lens: ArraySpec
    query_start_loc: ArraySpec | None
    sinks: ArraySpec | None
    options: Options

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """Shape of the result: `(num_tokens, num_q_heads, head_size_v)`."""
        tokens, heads, _ = self.query.shape
        return tokens, heads, self.cache.placement.extents.head_size_v


class Gather(NamedTuple):
    """A call of `gather_kv` that fulfils the contract; hashable.

    Attributes:
        cache: What is read.
        block_tables: The spec of block_tables.
        seq_lens: The spec of seq_lens.
        max_len: Positions of each result.
        format: What the results hold.
    """

    cache: Cache
    block_tables: ArraySpec
    seq_lens: ArraySpec
    max_len: int
    format: FloatFormat

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of key and value: `(num_seqs, max_len, num_heads, head_size)`."""
        extents = self.cache.placement.extents
        front = (self.block_tables.shape[0], self.max_len, extents.num_heads)
        return (*front, extents.head_size), (*front, extents.head_size_v)


def check_attention_options(scale: Any, causal: Any, sliding_window: Any, soft_cap: Any) -> Options:
    """Checks the numbers that attention computes with.

    Raises:
        ValueError: a number is out of range, or sliding_window is given without causal.
        TypeError: an argument is of another type.
    """
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    for name, number in (("scale", scale), ("soft_cap", soft_cap)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise TypeError(f"{name} must be None or a number, got {number!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}")
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
            raise TypeError(f"sliding_window must be None or an int, got {sliding_window!r}")
        if sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
        if not causal:
            raise ValueError(f"sliding_window must be None where causal is False, got {sliding_window}")
    return Options(
        scale=None if scale is None else float(scale),
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=None if soft_cap is None else float(soft_cap),
    )


def check_attention(
    query: ArraySpec,
    caches: Sequence[ArraySpec],
    block_tables: ArraySpec,
    seq_lens: ArraySpec,
    query_start_loc: ArraySpec | None,
    sinks: ArraySpec | None,
    options: Options,
    kv_cache_dtype: str,
    k_scale: ArraySpec | None,
    v_scale: ArraySpec | None,
    layout: str | CacheLayout | None,
    layer: int | ArraySpec | None,
    head_size_v: int | None,
) -> Attention:
    """Checks the arguments of `paged_attention`. `options` come from `check_attention_options`.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    check_rank("query", query, 3, "(num_tokens, num_q_heads, head_size)")
    tokens, q_heads, head_size = query.shape
    cache = _cache(caches, kv_cache_dtype, k_scale, v_scale, layout, layer, head_size, head_size_v)
    heads = cache.placement.extents.num_heads
    if query.dtype not in FLOATS:
        raise TypeError(f"query must have dtype {either(FLOATS)}, got {query.dtype}")
    if head_size != cache.placement.extents.head_size:
        raise ValueError(
            f"query must have shape (num_tokens, num_q_heads, {cache.placement.extents.head_size}), "
            f"got {shape_of(query)}"
        )
    if heads == 0 or q_heads % heads:
        raise ValueError(f"query must have a multiple of {heads} heads, as the cache has, got {q_heads}")
    _tables(block_tables, seq_lens)
    sequences = block_tables.shape[0]
    if query_start_loc is not None:
        check_indices("query_start_loc", query_start_loc, (sequences + 1,))
    elif tokens != sequences:
        raise ValueError(
            f"query_start_loc must be given unless query has one token for each of {sequences} sequences, "
            f"got None and {tokens} tokens"
        )
    if sinks is not None:
        if tuple(sinks.shape) != (q_heads,):
            raise ValueError(f"sinks must have shape ({q_heads},), got {shape_of(sinks)}")
        if sinks.dtype not in FLOATS:
            raise TypeError(f"sinks must have dtype {either(FLOATS)}, got {sinks.dtype}")
    named = [("query", query), ("block_tables", block_tables), ("seq_lens", seq_lens)]
    named += [("query_start_loc", query_start_loc), ("sinks", sinks)]
    _devices(named, caches, k_scale, v_scale, layer)
    return Attention(
        cache=cache,
        query=query,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        sinks=sinks,
        options=options._replace(scale=head_size**-0.5 if options.scale is None else options.scale),
    )


def check_gather(
    caches: Sequence[ArraySpec],
    block_tables: ArraySpec,
    seq_lens: ArraySpec,
    max_len: int,
    dtype: str | None,
    kv_cache_dtype: str,
    k_scale: ArraySpec | None,
    v_scale: ArraySpec | None,
    layout: str | CacheLayout | None,
    layer: int | ArraySpec | None,
    head_size: int | None,
    head_size_v: int | None,
) -> Gather:
    """Checks the arguments of `gather_kv`.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    cache = _cache(caches, kv_cache_dtype, k_scale, v_scale, layout, layer, head_size, head_size_v)
    _tables(block_tables, seq_lens)
    if isinstance(max_len, bool) or not hasattr(max_len, "__index__"):
        raise TypeError(f"max_len must be an int, got {max_len!r}")
    if max_len < 0:
        raise ValueError(f"max_len must be at least 0, got {max_len}")
    if dtype is None:
        dtype = cache.format.name if cache.format.name in FLOATS else "bfloat16"
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {either(FLOATS)}, got {dtype}")
    _devices([("block_tables", block_tables), ("seq_lens", seq_lens)], caches, k_scale, v_scale, layer)
    return Gather(cache, block_tables, seq_lens, int(max_len), FLOATS[dtype])


def _cache(
    caches: Sequence[ArraySpec],
    kv_cache_dtype: str,
    k_scale: ArraySpec | None,
    v_scale: ArraySpec | None,
    layout: str | CacheLayout | None,
    layer: int | ArraySpec | None,
    head_size: int | None,
    head_size_v: int | None,
) -> Cache:
    if len(caches) not in (1, 2):
        raise ValueError(f"caches must be (key_cache, value_cache) or one array, got {len(caches)} arrays")
    chosen = layout_of(layout, caches, layer)
    if len(chosen.arrays) != len(caches):
        wanted = "one array" if chosen.single_array else "(key_cache, value_cache)"
        raise ValueError(f"caches must be {wanted} for layout '{chosen}', got {len(caches)} arrays")
    placement = chosen.place(
        [c.shape for c in caches],
        [c.strides for c in caches],
        head_size=head_size,
        head_size_v=head_size_v,
        names=_cache_names(caches),
    )
    extents = placement.extents
    if head_size_v is not None and head_size_v != extents.head_size_v:
        raise ValueError(f"head_size_v must be {extents.head_size_v}, as in the cache, got {head_size_v}")
    if len(caches) == 2:
        check_same_dtype("value_cache", caches[1], "key_cache", caches[0])
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_scale(name, scale)
    check_layer(layer, chosen, extents.num_layers)
    return Cache(chosen, placement, caches[0].dtype, _format(kv_cache_dtype, caches[0].dtype, _cache_names(caches)[0]))


def _cache_names(caches: Sequence[Any]) -> tuple[str, ...]:
    """What errors call the arrays."""
    return ("key_cache", "value_cache") if len(caches) == 2 else ("kv_cache",)


def _format(kv_cache_dtype: str, cache: str, name: str) -> FloatFormat:
    quantised = KV_CACHE_DTYPES[kv_cache_dtype]
    if quantised is not None:
        if cache not in (quantised.name, "uint8"):
            raise TypeError(
                f"{name} must have dtype {quantised.name} or uint8 for kv_cache_dtype {kv_cache_dtype!r}, got {cache}"
            )
        return quantised
    allowed = FLOATS | FP8
    if cache not in allowed:
        raise TypeError(f"{name} must have dtype {either(allowed)} for kv_cache_dtype 'auto', got {cache}")
    return allowed[cache]


def _tables(block_tables: ArraySpec, seq_lens: ArraySpec) -> None:
    check_indices("block_tables", block_tables, ("num_seqs", "max_blocks"))
    check_indices("seq_lens", seq_lens, (block_tables.shape[0],))


def _devices(
    named: Sequence[tuple[str, ArraySpec | None]],
    caches: Sequence[ArraySpec],
    k_scale: ArraySpec | None,
    v_scale: ArraySpec | None,
    layer: int | ArraySpec | None,
) -> None:
    names = _cache_names(caches)
    more = [*named, *zip(names, caches, strict=True), ("k_scale", k_scale), ("v_scale", v_scale)]
    if isinstance(layer, ArraySpec):
        more.append(("layer", layer))
    check_devices(more, names[0], caches[0])
