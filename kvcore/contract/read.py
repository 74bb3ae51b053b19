"""The contract of the ops that read a cache: every check, every error message, once for both frameworks."""

import math
from typing import Any, NamedTuple

import numpy as np

from kvcore.arrays import ArraySpec, check_integers, shape_of, with_unit_axis
from kvcore.contract.cache import (
    Cache,
    CacheArguments,
    check_cache,
    check_cache_devices,
)
from kvcore.contract.checks import (
    check_devices,
    check_indices,
    check_rank,
    either,
    hnd_hint,
    is_integer,
    is_number,
)
from kvcore.formats import FLOATS, FloatFormat

LONGEST = 2**31 - 1
"""No sequence is longer: lengths are 32-bit integers to the kernels."""


class AttentionOptions(NamedTuple):
    """What attention computes; hashable. See `paged_attention` for the meanings. A scale of None is the usual one."""

    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None

    def normal(self) -> "AttentionOptions":
        """The options with None for what has no effect: a window longer than any sequence, a cap of 0 or of 2^64 up.

        A cap of 2^64 or more leaves float32 logits up to 2^52 as they are; among larger ones, the highest takes all
        weight with the cap and without it.
        """
        scale, causal, window, cap = self
        if window is None and cap is None:
            return self
        window = None if window is None or window >= LONGEST else window
        return AttentionOptions(scale, causal, window, None if not cap or cap >= 2.0**64 else cap)


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
    options: AttentionOptions

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """Shape of the result: `(num_tokens, num_q_heads, head_size_v)`."""
        tokens, heads, _ = self.query.shape
        return tokens, heads, self.cache.head_size_v


class Gather(NamedTuple):
    """A call of `gather_kv`, or of `gather_slots`, that fulfils the contract; hashable.

    Attributes:
        cache: What is read.
        block_tables: The spec of block_tables; of slots as the one row `(1, n)`.
        seq_lens: The spec of seq_lens; None for slots.
        max_len: Positions of each result; the number of slots.
        format: What the results hold.
    """

    cache: Cache
    block_tables: ArraySpec
    seq_lens: ArraySpec | None
    max_len: int
    format: FloatFormat

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of key and value: `(num_seqs, max_len, num_heads, head_size)`, without the first axis for slots."""
        sequences = () if self.seq_lens is None else (self.block_tables.shape[0],)
        front = (*sequences, self.max_len, self.cache.extents.num_heads)
        return (*front, self.cache.head_size), (*front, self.cache.head_size_v)


def check_attention_options(scale: Any, causal: Any, sliding_window: Any, soft_cap: Any) -> AttentionOptions:
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
    return AttentionOptions(
        scale=None if scale is None else float(scale),
        causal=bool(causal),
        sliding_window=None if sliding_window is None else int(sliding_window),
        soft_cap=None if soft_cap is None else float(soft_cap),
    ).normal()


def check_attention(
    query: ArraySpec,
    block_tables: ArraySpec,
    seq_lens: ArraySpec,
    query_start_loc: ArraySpec | None,
    sinks: ArraySpec | None,
    options: AttentionOptions,
    arguments: CacheArguments,
    head_size_v: int | None,
) -> Attention:
    """Checks the arguments of `paged_attention`.

    Args:
        query: `(num_tokens, num_q_heads, head_size)`.
        block_tables: `(num_seqs, max_blocks)`.
        seq_lens: `(num_seqs,)`.
        query_start_loc: `(num_seqs + 1,)`, or None for one query token a sequence.
        sinks: `(num_q_heads,)`, or None.
        options: What `check_attention_options` lets pass.
        arguments: The cache that is read; where its k_scale and v_scale have more than two axes, they are scale caches.
        head_size_v: Elements of a value head, where the layout does not tell.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    check_rank("query", query, 3, "(num_tokens, num_q_heads, head_size)")
    tokens, q_heads, head_size = query.shape
    cache = check_cache(arguments, head_size, head_size_v)
    heads = cache.extents.num_heads
    if query.dtype not in FLOATS:
        raise TypeError(f"query must have dtype {either(FLOATS)}, got {query.dtype}")
    if head_size != cache.head_size:
        raise ValueError(f"query must have shape (num_tokens, num_q_heads, {cache.head_size}), got {shape_of(query)}")
    if head_size == 0:
        raise ValueError(f"query must have a head_size of at least 1, got shape {shape_of(query)}")
    if heads == 0 or q_heads % heads:
        block_size = cache.extents.block_size
        fits = block_size > 0 and q_heads % block_size == 0
        hint = hnd_hint(arguments.layout, cache.layout, block_size, cache.extents) if fits else ""
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
    check_cache_devices(arguments, named)
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
    block_tables: ArraySpec,
    seq_lens: ArraySpec,
    max_len: int,
    dtype: str | None,
    arguments: CacheArguments,
    head_size: int | None,
    head_size_v: int | None,
) -> Gather:
    """Checks the arguments of `gather_kv`.

    Args:
        block_tables: `(num_seqs, max_blocks)`.
        seq_lens: `(num_seqs,)`.
        max_len: Positions of each result.
        dtype: Of the results; None: the cache's, or bfloat16 where it is quantised.
        arguments: The cache that is read; where its k_scale and v_scale have more than two axes, they are scale caches.
        head_size: Elements of a key head, where the layout does not tell.
        head_size_v: Elements of a value head, where the layout does not tell.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    cache = check_cache(arguments, head_size, head_size_v)
    _tables(block_tables, seq_lens)
    check_integers(max_len=max_len)
    if max_len is None:
        raise TypeError("max_len must be an int, got None")
    if max_len < 0:
        raise ValueError(f"max_len must be at least 0, got {max_len}")
    stored = _gathered(cache, dtype)
    check_cache_devices(arguments, [("block_tables", block_tables), ("seq_lens", seq_lens)])
    return Gather(cache, block_tables, seq_lens, int(max_len), stored)


def check_gather_slots(
    slots: ArraySpec, dtype: str | None, arguments: CacheArguments, head_size: int | None, head_size_v: int | None
) -> Gather:
    """Checks the arguments of `gather_slots`.

    Args:
        slots: `(n,)`.
        dtype: As for `check_gather`, like all that follow.
        arguments: The cache that is read.
        head_size: Elements of a key head.
        head_size_v: Elements of a value head.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    cache = check_cache(arguments, head_size, head_size_v)
    check_indices("slots", slots, ("n",))
    stored = _gathered(cache, dtype)
    check_cache_devices(arguments, [("slots", slots)])
    return Gather(cache, with_unit_axis(slots, 0), None, slots.shape[0], stored)


def _gathered(cache: Cache, dtype: str | None) -> FloatFormat:
    """What the results of a gather hold."""
    if dtype is None:
        dtype = cache.format.name if cache.format.name in FLOATS else "bfloat16"
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {either(FLOATS)}, got {dtype}")
    return FLOATS[dtype]


def check_merge(outs: ArraySpec, lses: ArraySpec) -> None:
    """Checks the arguments of `merge_attention`.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    check_rank("outs", outs, 4, "(parts, num_tokens, num_q_heads, head_size_v)")
    if tuple(lses.shape) != tuple(outs.shape[:3]):
        raise ValueError(f"lses must have shape {tuple(outs.shape[:3])}, got {shape_of(lses)}")
    if outs.dtype not in FLOATS:
        raise TypeError(f"outs must have dtype {either(FLOATS)}, got {outs.dtype}")
    if lses.dtype != "float32":
        raise TypeError(f"lses must have dtype float32, got {lses.dtype}")
    check_devices([("lses", lses)], "outs", outs)


def _tables(block_tables: ArraySpec, seq_lens: ArraySpec) -> None:
    check_indices("block_tables", block_tables, ("num_seqs", "max_blocks"))
    check_indices("seq_lens", seq_lens, (block_tables.shape[0],))
