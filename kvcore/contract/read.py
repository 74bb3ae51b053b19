"""The contract of the ops that read a cache: every check, every error message, once for both frameworks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvcore.arrays import ArraySpec
from kvcore.contract.checks import (
    check_devices,
    check_indices,
    check_layer,
    check_rank,
    check_same_dtype,
    check_scale,
    either,
    hnd_hint,
    is_integer,
    is_number,
    layout_of,
    shape_of,
)
from kvcore.formats import (
    DS_MLA_ROPE,
    FLOATS,
    FP8,
    KV_CACHE_DTYPES,
    PER_TOKEN_HEAD,
    FloatFormat,
    check_head_size,
    storage_of,
)
from kvcore.layout import Address, CacheLayout, Placement, array_names, check_integers
from kvcore.scales import Scales, place_scale_caches, place_stored, scale_layout_of


class Cache(NamedTuple):
    """A cache to be read; hashable.

    Attributes:
        layout: Never None.
        placement: Extents and addresses of K and V, counted in stored units: elements, or bytes of two. Of fp8_ds_mla,
            those of the part in fp8.
        dtype: dtype of the array or arrays.
        format: What they hold.
        head_scales: Steps from one head's static scale to the next, of k_scale and v_scale; 0: one scale for all heads.
        scales: The scales that were computed in writing; None: there are none. Unless they are inside the caches,
            k_scale and v_scale are the arrays that hold them.
        rope: The part of fp8_ds_mla in bfloat16, counted in elements of that.
    """

    layout: CacheLayout
    placement: Placement
    dtype: str
    format: FloatFormat
    head_scales: tuple[int, int]
    scales: Scales | None
    rope: Address | None

    @property
    def scaled(self) -> bool:
        """Whether k_scale and v_scale mean anything."""
        return self.format.name not in FLOATS and self.rope is None

    @property
    def head_size(self) -> int:
        """Elements of a key head."""
        extents = self.placement.extents
        return extents.head_size * self.format.per_byte + (0 if self.rope is None else DS_MLA_ROPE)

    @property
    def head_size_v(self) -> int:
        """Elements of a value head."""
        return self.placement.extents.head_size_v * self.format.per_byte


_LONGEST = 2**31 - 1
"""No sequence is longer: lengths are 32-bit integers to the kernels."""


class Options(NamedTuple):
    """What attention computes; hashable. See `paged_attention` for the meanings. A scale of None is the usual one."""

    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None

    def normal(self) -> "Options":
        """The same with None for what has no effect: a window longer than any sequence, a cap of 0, or one so high.

        Up to 2^52, logits in float32 are the same under a cap of 2^64, and beyond, the highest takes all weight.
        """
        window, cap = self.sliding_window, self.soft_cap
        return self._replace(
            sliding_window=None if window is None or window >= _LONGEST else window,
            soft_cap=None if not cap or cap >= 2.0**64 else cap,
        )


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
        return tokens, heads, self.cache.head_size_v


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
        front = (self.block_tables.shape[0], self.max_len, self.cache.placement.extents.num_heads)
        return (*front, self.cache.head_size), (*front, self.cache.head_size_v)


def check_attention_options(scale: Any, causal: Any, sliding_window: Any, soft_cap: Any) -> Options:
    """Checks the numbers that attention computes with; NumPy's count as Python's, which come back.

    Raises:
        ValueError: a number is out of range, or sliding_window is given without causal.
        TypeError: an argument is of another type.
    """
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    for name, number in (("scale", scale), ("soft_cap", soft_cap)):
        if number is not None and not is_number(number):
            raise TypeError(f"{name} must be None or a number, got {number!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if soft_cap is not None and not 0 <= soft_cap < math.inf:
        raise ValueError(f"soft_cap must be finite and at least 0, got {soft_cap}")
    if sliding_window is not None:
        if not is_integer(sliding_window):
            raise TypeError(f"sliding_window must be None or an int, got {sliding_window!r}")
        if sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
        if not causal:
            raise ValueError(f"sliding_window must be None where causal is False, got {sliding_window}")
    return Options(
        scale=None if scale is None else float(scale),
        causal=bool(causal),
        sliding_window=None if sliding_window is None else int(sliding_window),
        soft_cap=None if soft_cap is None else float(soft_cap),
    ).normal()


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
    scale_layout: str | CacheLayout | None = None,
) -> Attention:
    """Checks the arguments of `paged_attention`. `options` hold what `check_attention_options` lets pass.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    check_rank("query", query, 3, "(num_tokens, num_q_heads, head_size)")
    tokens, q_heads, head_size = query.shape
    cache = _cache(caches, kv_cache_dtype, k_scale, v_scale, layout, layer, head_size, head_size_v, scale_layout)
    heads = cache.placement.extents.num_heads
    if query.dtype not in FLOATS:
        raise TypeError(f"query must have dtype {either(FLOATS)}, got {query.dtype}")
    if head_size != cache.head_size:
        raise ValueError(f"query must have shape (num_tokens, num_q_heads, {cache.head_size}), got {shape_of(query)}")
    if heads == 0 or q_heads % heads:
        extents = cache.placement.extents
        fits = extents.block_size > 0 and q_heads % extents.block_size == 0
        hint = hnd_hint(layout, cache.layout, extents.block_size, extents) if fits else ""
        raise ValueError(f"query must have a multiple of {heads} heads, as the cache has, got {q_heads}{hint}")
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
    options = options.normal()  # those of torch.ops come as they are
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
    scale_layout: str | CacheLayout | None = None,
) -> Gather:
    """Checks the arguments of `gather_kv`.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    cache = _cache(caches, kv_cache_dtype, k_scale, v_scale, layout, layer, head_size, head_size_v, scale_layout)
    _tables(block_tables, seq_lens)
    check_integers(max_len=max_len)
    if max_len is None:
        raise TypeError("max_len must be an int, got None")
    if max_len < 0:
        raise ValueError(f"max_len must be at least 0, got {max_len}")
    if dtype is None:
        dtype = cache.format.name if cache.format.name in FLOATS else "bfloat16"
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {either(FLOATS)}, got {dtype}")
    _devices([("block_tables", block_tables), ("seq_lens", seq_lens)], caches, k_scale, v_scale, layer)
    return Gather(cache, block_tables, seq_lens, int(max_len), FLOATS[dtype])


def check_merge(outs: ArraySpec, lses: ArraySpec) -> None:
    """Checks the arguments of `merge_attention`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not fit.
    """
    check_rank("outs", outs, 4, "(parts, num_tokens, num_q_heads, head_size_v)")
    if tuple(lses.shape) != tuple(outs.shape[:3]):
        raise ValueError(f"lses must have shape {tuple(outs.shape[:3])}, got {shape_of(lses)}")
    if outs.dtype not in FLOATS:
        raise TypeError(f"outs must have dtype {either(FLOATS)}, got {outs.dtype}")
    if lses.dtype != "float32":
        raise TypeError(f"lses must have dtype float32, got {lses.dtype}")


def _cache(
    caches: Sequence[ArraySpec],
    kv_cache_dtype: str,
    k_scale: ArraySpec | None,
    v_scale: ArraySpec | None,
    layout: str | CacheLayout | None,
    layer: int | ArraySpec | None,
    head_size: int | None,
    head_size_v: int | None,
    scale_layout: str | CacheLayout | None,
) -> Cache:
    if len(caches) not in (1, 2):
        raise ValueError(f"caches must be (key_cache, value_cache) or one array, got {len(caches)} arrays")
    chosen = layout_of(layout, caches, layer)
    if len(chosen.arrays) != len(caches):
        wanted = "one array" if chosen.single_array else "(key_cache, value_cache)"
        raise ValueError(f"caches must be {wanted} for layout '{chosen}', got {len(caches)} arrays")
    quantised = KV_CACHE_DTYPES[kv_cache_dtype]
    check_integers(head_size=head_size, head_size_v=head_size_v)
    for name, size in (("head_size", head_size), ("head_size_v", head_size_v)):
        if quantised is not None and size is not None and quantised.name != "fp8_ds_mla":
            check_head_size(name, quantised, size)
    where = place_stored(chosen, caches, quantised, head_size, head_size_v, array_names(len(caches)))
    extents = where.placement.extents
    if len(caches) == 2:
        check_same_dtype("value_cache", caches[1], "key_cache", caches[0])
    check_layer(layer, chosen, extents.num_layers)
    stored = _format(kv_cache_dtype, caches[0].dtype, array_names(len(caches))[0])
    scales, steps = where.scales, [0, 0]
    if where.rope is not None:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                raise ValueError(f"{name} must be None for kv_cache_dtype 'fp8_ds_mla', whose rows have their own")
    elif any(s is not None and len(s.shape) > 2 for s in (k_scale, v_scale)):
        if kv_cache_dtype not in PER_TOKEN_HEAD:
            raise ValueError(
                f"kv_cache_dtype must be {either(map(repr, PER_TOKEN_HEAD))} with scales for each token and head, "
                f"got {kv_cache_dtype!r}"
            )
        if chosen.latent:  # its writer gives the two parts of a row a scale each
            raise ValueError(f"layout must not be '{chosen}' with scales for each token and head")
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is None:
                raise ValueError(f"{name} must be given where the other one has scales for each token and head")
        scale_caches = [s for s in (k_scale, v_scale) if s is not None]
        where_scales = scale_layout_of(scale_layout, chosen.has_layer)
        scales = place_scale_caches(where_scales, scale_caches, extents, ("k_scale", "v_scale"))
    else:
        steps = [
            0 if scale is None else check_scale(name, scale, extents.num_heads)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        ]
    cache = Cache(chosen, where.placement, caches[0].dtype, stored, (steps[0], steps[1]), scales, where.rope)
    if head_size_v is not None and head_size_v != cache.head_size_v:
        raise ValueError(f"head_size_v must be {cache.head_size_v}, as in the cache, got {head_size_v}")
    return cache


def _format(kv_cache_dtype: str, cache: str, name: str) -> FloatFormat:
    quantised = KV_CACHE_DTYPES[kv_cache_dtype]
    if quantised is not None:
        if cache not in storage_of(quantised):
            raise TypeError(
                f"{name} must have dtype {either(storage_of(quantised))} for kv_cache_dtype {kv_cache_dtype!r}, "
                f"got {cache}"
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
    names = array_names(len(caches))
    more = [*named, *zip(names, caches, strict=True), ("k_scale", k_scale), ("v_scale", v_scale)]
    if isinstance(layer, ArraySpec):
        more.append(("layer", layer))
    check_devices(more, names[0], caches[0])
