"""The reading ops as XLA programs: for CPU, TPU, and wherever there is no Triton.

Attention takes tiles of queries, each of one sequence, all at once, and tiles of positions one at a time: it needs
memory for what a tile of positions holds, however long the sequences are.
"""

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._primitive.write import vary, varying_axes
from jaxkv._xla.access import Part, parts_of, take
from jaxkv._xla.formats import decode, encode, from_bytes, times
from kvcore.contract.cache import Cache
from kvcore.contract.read import Attention, Gather
from kvcore.formats import BFLOAT16, DS_MLA_GROUP, DS_MLA_LATENT, DS_MLA_ROPE, E4M3, FP8_DS_MLA, NVFP4, NVFP4_GROUP
from kvcore.layout import CacheLayout

if TYPE_CHECKING:
    from jaxkv._primitive.read import Operands

_TILE = 256
"""Positions of a tile, or a block where that is more."""

_TILE_ELEMENTS = 2**24
"""About as many numbers as keys, values and logits of a tile of positions may have; else it has fewer positions."""

_MOST_QUERIES = 64
"""Queries of a tile."""

_Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Each row's largest logit, the sum of its weights relative to that, and the sum of values by these weights."""


class _Queries(NamedTuple):
    """Queries in tiles, each of one sequence.

    Attributes:
        query: `[tiles, queries, num_q_heads, head_size]`.
        position: Of each query, `[tiles, queries]`. Those after a sequence's last are no one's.
        length: Positions of the tile's sequence, `[tiles]`.
        block_tables: `[tiles, max_blocks]`.
    """

    query: jax.Array
    position: jax.Array
    length: jax.Array
    block_tables: jax.Array


def attention(
    call: Attention, operands: "Operands", layer: int | None, scale_layout: CacheLayout | None
) -> tuple[jax.Array, jax.Array]:
    """The result, in query's dtype, and the log-sum-exp of each row: online softmax in float32."""
    x, extents = _narrow(operands), call.cache.extents
    num_tokens, q_heads, _ = call.query.shape
    sinks = jnp.full(q_heads, -jnp.inf, jnp.float32) if x.sinks is None else x.sinks.astype(jnp.float32)
    if 0 in (num_tokens, q_heads, extents.num_blocks, *call.block_tables.shape):
        return jnp.zeros(call.out_shape, call.query.dtype), jnp.broadcast_to(sinks, call.out_shape[:2])
    heads, group = extents.num_heads, q_heads // extents.num_heads
    queries = _tile_queries(x)
    count, width = queries.position.shape

    source = _Source.of(call.cache, x, scale_layout)
    k_scale, v_scale = (None if s is None else s.reshape(1, -1, 1, 1) for s in source.static)  # of heads, or of all
    query = queries.query.astype(jnp.float32)
    query = query.reshape(count, width, heads, group, -1).swapaxes(1, 2).reshape(count, heads, width * group, -1)
    factor = jnp.float32(call.options.scale)
    query = query * (factor if k_scale is None else factor * k_scale)
    top, total, out = _online_softmax(call, source, _layer(x, layer), queries._replace(query=query))
    saw_nothing = (total == 0)[..., None]

    if x.sinks is not None:
        sink = jnp.tile(sinks.reshape(1, heads, group), (1, 1, width))
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp(top - new_top)
        top, total, out = new_top, total * shrink + jnp.exp(sink - new_top), out * shrink[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    out = out / jnp.where(total == 0, 1, total)[..., None]
    out = out if v_scale is None else jnp.where(saw_nothing, 0, out * v_scale)  # even where the scale is NaN

    def by_token(a: jax.Array) -> jax.Array:
        a = a.reshape(count, heads, width, group, -1).swapaxes(1, 2)
        return a.reshape(count * width, q_heads, -1)

    out, lse = by_token(out), by_token(lse)[..., 0]
    if x.query_start_loc is not None:
        inside, place = _places(x.query_start_loc, num_tokens, width)
        out = jnp.where(inside[:, None, None], out[place], 0)
        lse = jnp.where(inside[:, None], lse[place], sinks[None])
    return out.astype(call.query.dtype), lse


# ---- tiles of queries


def _tile_queries(x: "Operands") -> _Queries:
    query, start = jnp.asarray(x.query), x.query_start_loc
    if start is None:
        return _Queries(query[:, None], x.seq_lens[:, None] - 1, x.seq_lens, x.block_tables)
    num_tokens, num_seqs = query.shape[0], x.seq_lens.shape[0]
    average = _known(-(-num_tokens // num_seqs), 16)
    width = min(1 << (average - 1).bit_length(), _MOST_QUERIES)
    begin = _begins(start, num_tokens)
    first_tile = _first_tiles(begin, width)
    tile = jnp.arange(num_tokens // width + num_seqs, dtype=start.dtype)
    seq = jnp.maximum(jnp.sum(first_tile[None] <= tile[:, None], axis=1) - 1, 0)
    token = (begin[seq] + (tile - first_tile[seq]) * width)[:, None] + jnp.arange(width, dtype=start.dtype)[None]
    length = x.seq_lens[seq]
    position = (length - start[seq + 1])[:, None] + token
    return _Queries(query.at[token].get(mode="clip"), position, length, x.block_tables[seq])


def _begins(start: jax.Array, num_tokens: int) -> jax.Array:
    """Where each sequence begins in query, and where the last one ends: nowhere before any earlier start."""
    return jnp.clip(lax.cummax(start), 0, num_tokens)


def _first_tiles(begin: jax.Array, width: int) -> jax.Array:
    """The first tile of each sequence: with one more for each, no two sequences share any."""
    return begin[:-1] // width + jnp.arange(begin.shape[0] - 1, dtype=begin.dtype)


def _places(start: jax.Array, num_tokens: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Whether each token is one of a sequence, and its place among those of the tiles."""
    begin = _begins(start, num_tokens)
    token = jnp.arange(num_tokens, dtype=begin.dtype)
    begun = jnp.sum(begin[None] <= token[:, None], axis=1)
    inside = (begun > 0) & (begun < begin.shape[0])
    seq = jnp.where(inside, begun - 1, 0)
    return inside, jnp.where(inside, _first_tiles(begin, width)[seq] * width + token - begin[seq], 0)


# ---- tiles of positions


def _online_softmax(call: Attention, source: "_Source", index: jax.Array, queries: _Queries) -> _Softmax:
    cache, extents, options = call.cache, call.cache.extents, call.options
    window = options.sliding_window
    position, table = queries.position, queries.block_tables
    (count, heads, rows, _), width = queries.query.shape, position.shape[1]
    per_position = count * heads * (cache.head_size + cache.head_size_v + rows)
    blocks = max(1, min(_TILE, _known(_TILE_ELEMENTS // per_position, _TILE)) // extents.block_size)
    blocks = min(_known(table.shape[1], blocks), blocks)
    positions = blocks * extents.block_size

    there = (table >= 0) & (table < extents.num_blocks) & (index >= 0) & (index < (extents.num_layers or 1))
    limit = jnp.minimum(queries.length, table.shape[1] * extents.block_size)
    if options.causal:
        limit = jnp.minimum(limit, position[:, -1] + 1)
    # Not `-width % blocks`: of a symbolic width, jax.export would not know that the sum holds a tile.
    more = -(-table.shape[1] // blocks) * blocks - table.shape[1]
    table = jnp.pad(jnp.where(there, table, -1), ((0, 0), (0, more)), constant_values=-1)
    end = -(-jnp.max(limit) // positions)
    first = 0
    if window is not None:  # sequences of length 0 must not make the loop begin early
        lowest = jnp.where(limit > 0, jnp.maximum(position[:, 0], -1) - (window - 1), jnp.max(limit))
        first = jnp.maximum(jnp.min(lowest), 0) // positions

    def step(t: jax.Array, state: _Softmax) -> _Softmax:
        top, total, out = state
        n = t * positions + jnp.arange(positions, dtype=jnp.int32)[None]
        block = lax.dynamic_slice_in_dim(table, t * blocks, blocks, axis=1)
        exists = jnp.repeat(block >= 0, extents.block_size, axis=1) & (n < limit[:, None])
        if window is not None:  # what no query of the tile sees may have been freed, and hold anything
            exists = exists & (position[:, :1] - n < window)
        seen = exists[:, None]
        if width > 1 and options.causal:
            seen = seen & (n[None] <= position[..., None])
            if window is not None:
                seen = seen & (position[..., None] - n[None] < window)
        key, value = _tile(source, index, jnp.maximum(block, 0))

        logit = jnp.einsum("thrd,thnd->thrn", queries.query, key, precision=lax.Precision.HIGHEST)
        if options.soft_cap is not None:
            logit = options.soft_cap * jnp.tanh(logit / options.soft_cap)
        logit = logit.reshape(count, heads, width, -1, positions)
        logit = jnp.where(seen[:, None, :, None], logit, -jnp.inf).reshape(count, heads, rows, positions)
        new_top = jnp.maximum(top, jnp.max(logit, axis=-1))
        weight = jnp.exp(logit - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        value = jnp.where(exists[:, None, :, None], value, 0)
        more = jnp.einsum("thrn,thnd->thrd", weight, value, precision=lax.Precision.HIGHEST)
        out = jnp.where(jnp.isfinite(out), out * shrink[..., None], out)
        if width > 1 and options.causal:
            # A value that only some rows see spoils others if it is not finite: 0 · NaN.
            rows_see = jnp.repeat(seen, rows // width, axis=1)[:, None]
            more = lax.cond(jnp.isfinite(more).all(), lambda *_: more, _sum_of_seen, weight, rows_see, value)
        return new_top, total * shrink + jnp.sum(weight, axis=-1), out + more

    front = (count, heads, rows)
    # The lowest number, not -inf: a row that has seen nothing yet has weights exp(-inf), not exp(-inf + inf).
    top = jnp.full(front, jnp.finfo(jnp.float32).min)
    state = (top, jnp.zeros(front, jnp.float32), jnp.zeros((*front, cache.head_size_v), jnp.float32))
    state = jax.tree.map(lambda s: vary(s, varying_axes(queries.query)), state)  # within shard_map
    if table.shape[1] == blocks:  # without a loop, XLA makes one program of it: twice as fast for small models on a CPU
        return step(jnp.int32(0), state)
    return lax.fori_loop(jnp.int32(first), end.astype(jnp.int32), step, state)


def _sum_of_seen(weight: jax.Array, seen: jax.Array, value: jax.Array) -> jax.Array:
    """Sums of values by weights, where infinities and NaN reach only the rows that see them."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("thrn,thnd->thrd", a, b, precision=lax.Precision.HIGHEST)

    saw = jnp.broadcast_to(seen, weight.shape).astype(value.dtype)
    total = product(weight, jnp.where(jnp.isfinite(value), value, 0))
    for infinity in (jnp.inf, -jnp.inf):  # NaN is both
        meets = product(saw, (jnp.isnan(value) | (value == infinity)).astype(value.dtype)) > 0
        total = jnp.where(meets, total + infinity, total)
    return total


def _tile(source: "_Source", layer: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of blocks `[tiles, blocks]` as `[tiles, num_heads, positions, dim]` float32."""
    cache = source.cache
    # With heads among the indices, the gather leaves elements in the order in which the products want them.
    head = jnp.arange(cache.extents.num_heads, dtype=jnp.int32)
    at = {"layer": layer, "block": block[:, None, :], "head": head[:, None]}

    def read(kv: int) -> jax.Array:
        found = source.read(kv, at, "slot")
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    key = read(0)
    return key, key[..., : cache.head_size_v] if cache.layout.latent else read(1)


# ---- access to a cache


class _Source(NamedTuple):
    """A cache to read from.

    Attributes:
        cache: Its description.
        arrays: Caches, then scale caches.
        parts: Where K is in them, and V: elements, and scales if they were computed.
        static: The other scales, of K and of V.
    """

    cache: Cache
    arrays: tuple[jax.Array, ...]
    parts: tuple[tuple[Part, Part | None], ...]
    static: tuple[jax.Array | None, jax.Array | None]

    @classmethod
    def of(cls, cache: Cache, x: "Operands", scale_layout: CacheLayout | None) -> "_Source":
        scales: Any = (x.k_scale, x.v_scale)
        arrays = x.caches if scale_layout is None else (*x.caches, *scales)
        parts = tuple(parts_of(cache, [a.shape for a in arrays], scale_layout, kv) for kv in (0, 1))
        return cls(cache, arrays, parts, scales if scale_layout is None else (None, None))

    def read(
        self,
        kv: int,
        at: Mapping[str, jax.Array],
        window: str,
        multiply: Callable[[jax.Array, jax.Array], jax.Array] = operator.mul,
    ) -> jax.Array:
        """K (`kv` 0) or V (1) as float32, multiplied by computed scales, not by static ones. As `take`."""
        part, scale_part = self.parts[kv]
        stored, units = self.cache.format, take(self.arrays, part, at, window)
        if stored == FP8_DS_MLA:
            return _decode_mla(units, multiply)[..., : (self.cache.head_size, self.cache.head_size_v)[kv]]
        rows = decode(units, stored)
        if scale_part is None:
            return rows
        scales = take(self.arrays, scale_part, at, window)
        if stored == NVFP4:  # an exact product, and a normal number
            scales = decode(scales, E4M3)[..., None]
            return (rows.reshape(*scales.shape[:-1], NVFP4_GROUP) * scales).reshape(rows.shape)
        return multiply(rows, scales)


def _decode_mla(row: jax.Array, multiply: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Rows of fp8_ds_mla as float32."""
    front, rope_at = row.shape[:-1], row.shape[-1] - 2 * DS_MLA_ROPE
    latent = decode(row[..., :DS_MLA_LATENT], FP8_DS_MLA).reshape(*front, -1, DS_MLA_GROUP)
    scales = from_bytes(row[..., DS_MLA_LATENT:rope_at], jnp.float32)
    rope = from_bytes(row[..., rope_at:], jnp.bfloat16)
    return jnp.concatenate([multiply(latent, scales[..., None]).reshape(*front, -1), decode(rope, BFLOAT16)], axis=-1)


def _narrow(x: "Operands") -> "Operands":
    """Indices and lengths as int32. What does not fit is far outside, and stays so."""

    def narrow(a: jax.Array | None) -> jax.Array | None:
        return a if a is None or a.dtype == jnp.int32 else jnp.clip(a, -(2**31), 2**31 - 1).astype(jnp.int32)

    fields = ("block_tables", "seq_lens", "query_start_loc", "layer")
    return x._replace(**{name: narrow(getattr(x, name)) for name in fields})


def _known(number: int, otherwise: int) -> int:
    """A number that depends on shapes; `otherwise` where jax.export leaves these open."""
    return number if isinstance(number, int) else otherwise


def _layer(x: "Operands", layer: int | None) -> jax.Array:
    return jnp.int32(layer or 0) if x.layer is None else x.layer[0]


# ---- gather


def gather(
    call: Gather, operands: "Operands", layer: int | None, scale_layout: CacheLayout | None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values, `[num_seqs, max_len, num_heads, dim]`. Bits as the oracle's."""
    x, extents = _narrow(operands), call.cache.extents
    if 0 in (*call.shapes[0], extents.num_blocks, call.block_tables.shape[1]):
        key, value = (jnp.zeros(shape, call.format.name) for shape in call.shapes)
        return key, value
    index, n = _layer(x, layer), jnp.arange(call.max_len, dtype=jnp.int32)
    block = x.block_tables.at[:, n // extents.block_size].get(mode="fill", fill_value=-1)
    there = (block >= 0) & (block < extents.num_blocks) & (n[None] < x.seq_lens[:, None])
    there = there & (index >= 0) & (index < (extents.num_layers or 1))
    # A block that is not there becomes one outside, and gives zeros.
    at = {"layer": index, "block": jnp.where(there, block, extents.num_blocks), "slot": n % extents.block_size}
    source = _Source.of(call.cache, x, scale_layout)

    def one(kv: int) -> jax.Array:
        if call.cache.format == call.format:
            found = take(source.arrays, source.parts[kv][0], at, "head")
        else:
            found, scale = source.read(kv, at, "head", times), source.static[kv]
            if scale is not None:
                found = times(found, scale.reshape(-1, 1))  # of heads, or of all
            found = lax.bitcast_convert_type(encode(found, call.format), jnp.dtype(call.format.name))
        # A scale may be negative, or NaN.
        return jnp.where(there[..., None, None], found.reshape(call.shapes[kv]), 0)

    return one(0), one(1)
