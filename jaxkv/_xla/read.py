"""The reading ops as XLA programs: for CPU, TPU, and wherever there is no Triton.

Attention takes tiles of queries, each of one sequence, all at once, and tiles of positions one at a time: it needs
memory for what a tile of positions holds, however long the sequences are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._call import CacheOperands, CacheOptions, ReadOperands, ReadOptions
from jaxkv._mesh import vary, varying_axes
from jaxkv._xla.access import Source, static_scales
from kvcore.contract.read import Attention

_TILE = 256
"""Positions of a tile, or a block where that is more."""

_TILE_ELEMENTS = 2**24
"""About as many numbers as keys, values and logits of a tile of positions may have; else it has fewer positions."""

_MOST_QUERIES = 64
"""Queries of a tile."""

_Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""The running maximum of each row's logits, its normalizer (the sum of its weights, relative to that maximum), and the
sum of values by these weights."""


class _Queries(NamedTuple):
    """Queries in tiles, each of one sequence.

    Attributes:
        query: `[tiles, queries, num_q_heads, head_size]`.
        position: Of each query, `[tiles, queries]`. Those after a sequence's last are no one's.
        seq_len: Positions of the tile's sequence, `[tiles]`.
        block_tables: `[tiles, max_blocks]`.
    """

    query: jax.Array
    position: jax.Array
    seq_len: jax.Array
    block_tables: jax.Array


def attention(call: Attention, options: ReadOptions, operands: ReadOperands) -> tuple[jax.Array, jax.Array]:
    """The result, in query's dtype, and the log-sum-exp of each query row: online softmax in float32."""
    operands, extents = with_int32(operands), call.cache.extents
    num_tokens, q_heads, _ = call.query.shape
    sinks = jnp.full(q_heads, -jnp.inf) if operands.sinks is None else operands.sinks
    sinks = sinks.astype(jnp.float32)
    if 0 in (num_tokens, q_heads, extents.num_blocks, *call.block_tables.shape):
        return jnp.zeros(call.out_shape, call.query.dtype), jnp.broadcast_to(sinks, call.out_shape[:2])
    heads, q_per_kv = extents.num_heads, q_heads // extents.num_heads
    queries = _tile_queries(operands)
    tiles, width = queries.position.shape

    source = Source.of(call.cache, options.cache, operands.cache)
    scales = static_scales(options.cache, operands.cache)  # of heads, or of all
    k_scale, v_scale = (None if scale is None else scale.reshape(1, -1, 1, 1) for scale in scales)
    query = queries.query.astype(jnp.float32)
    query = query.reshape(tiles, width, heads, q_per_kv, -1).swapaxes(1, 2)
    query = query.reshape(tiles, heads, width * q_per_kv, -1)
    factor = jnp.float32(call.options.scale)
    query = query * (factor if k_scale is None else factor * k_scale)
    layer = layer_index(options.cache, operands.cache)
    maximum, normalizer, out = _online_softmax(call, source, layer, queries._replace(query=query))
    saw_nothing = (normalizer == 0)[..., None]

    if operands.sinks is not None:
        sink = jnp.tile(sinks.reshape(1, heads, q_per_kv), (1, 1, width))
        new_maximum = jnp.maximum(maximum, sink)
        shrink = jnp.exp(maximum - new_maximum)
        maximum, normalizer = new_maximum, normalizer * shrink + jnp.exp(sink - new_maximum)
        out = out * shrink[..., None]
    lse = jnp.where(normalizer == 0, -jnp.inf, maximum + jnp.log(normalizer))
    out = out / jnp.where(normalizer == 0, 1, normalizer)[..., None]
    out = out if v_scale is None else jnp.where(saw_nothing, 0, out * v_scale)  # even where the scale is NaN

    def by_token(rows: jax.Array) -> jax.Array:
        rows = rows.reshape(tiles, heads, width, q_per_kv, -1).swapaxes(1, 2)
        return rows.reshape(tiles * width, q_heads, -1)

    out, lse = by_token(out), by_token(lse)[..., 0]
    if operands.query_start_loc is not None:
        in_sequence, place = _places(operands.query_start_loc, num_tokens, width)
        out = jnp.where(in_sequence[:, None, None], out[place], 0)
        lse = jnp.where(in_sequence[:, None], lse[place], sinks[None])
    return out.astype(call.query.dtype), lse


# ---- tiles of queries


def _tile_queries(operands: ReadOperands) -> _Queries:
    query, start, seq_lens = jnp.asarray(operands.query), operands.query_start_loc, operands.seq_lens
    if start is None:
        return _Queries(query[:, None], seq_lens[:, None] - 1, seq_lens, operands.block_tables)
    num_tokens, num_seqs = query.shape[0], seq_lens.shape[0]
    average = _known(-(-num_tokens // num_seqs), 16)
    width = min(1 << (average - 1).bit_length(), _MOST_QUERIES)
    begin = _begins(start, num_tokens)
    first_tile = _first_tiles(begin, width)
    tile = jnp.arange(num_tokens // width + num_seqs, dtype=start.dtype)
    seq = jnp.maximum(jnp.sum(first_tile[None] <= tile[:, None], axis=1) - 1, 0)
    token = (begin[seq] + (tile - first_tile[seq]) * width)[:, None] + jnp.arange(width, dtype=start.dtype)[None]
    seq_len = seq_lens[seq]
    position = (seq_len - start[seq + 1])[:, None] + token
    return _Queries(query.at[token].get(mode="clip"), position, seq_len, operands.block_tables[seq])


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
    in_sequence = (begun > 0) & (begun < begin.shape[0])
    seq = jnp.where(in_sequence, begun - 1, 0)
    return in_sequence, jnp.where(in_sequence, _first_tiles(begin, width)[seq] * width + token - begin[seq], 0)


# ---- tiles of positions


def _online_softmax(call: Attention, source: Source, layer: jax.Array, queries: _Queries) -> _Softmax:
    """Attention of query rows `[tiles, num_heads, rows, head_size]`, a tile of positions at a time."""
    cache, extents, options = call.cache, call.cache.extents, call.options
    (tiles, heads, rows, _), width = queries.query.shape, queries.position.shape[1]
    blocks = _blocks_of_a_tile(call, queries)
    positions = blocks * extents.block_size

    table = queries.block_tables
    exists = (table >= 0) & (table < extents.num_blocks) & (layer >= 0) & (layer < (extents.num_layers or 1))
    limit = jnp.minimum(queries.seq_len, table.shape[1] * extents.block_size)
    if options.causal:
        limit = jnp.minimum(limit, queries.position[:, -1] + 1)
    # Not `-width % blocks`: of a symbolic width, jax.export would not know that the sum holds a tile.
    padding = -(-table.shape[1] // blocks) * blocks - table.shape[1]
    table = jnp.pad(jnp.where(exists, table, -1), ((0, 0), (0, padding)), constant_values=-1)
    end = -(-jnp.max(limit) // positions)
    first = 0
    if options.sliding_window is not None:  # sequences of length 0 must not make the loop begin early
        lowest = jnp.maximum(queries.position[:, 0], -1) - (options.sliding_window - 1)
        first = jnp.maximum(jnp.min(jnp.where(limit > 0, lowest, jnp.max(limit))), 0) // positions

    def step(tile: jax.Array, state: _Softmax) -> _Softmax:
        maximum, normalizer, out = state
        position = tile * positions + jnp.arange(positions, dtype=jnp.int32)[None]
        block = lax.dynamic_slice_in_dim(table, tile * blocks, blocks, axis=1)
        exists = jnp.repeat(block >= 0, extents.block_size, axis=1) & (position < limit[:, None])
        exists, seen = _seen(call, queries, position, exists)
        key, value = _tile(source, layer, jnp.maximum(block, 0))

        logit = jnp.einsum("thrd,thnd->thrn", queries.query, key, precision=lax.Precision.HIGHEST)
        if options.soft_cap is not None:
            logit = options.soft_cap * jnp.tanh(logit / options.soft_cap)
        logit = logit.reshape(tiles, heads, width, -1, positions)
        logit = jnp.where(seen[:, None, :, None], logit, -jnp.inf).reshape(tiles, heads, rows, positions)
        new_maximum = jnp.maximum(maximum, jnp.max(logit, axis=-1))
        weight = jnp.exp(logit - new_maximum[..., None])
        shrink = jnp.exp(maximum - new_maximum)
        value = jnp.where(exists[:, None, :, None], value, 0)
        weighted = jnp.einsum("thrn,thnd->thrd", weight, value, precision=lax.Precision.HIGHEST)
        out = jnp.where(jnp.isfinite(out), out * shrink[..., None], out)
        if width > 1 and options.causal:
            # A value that only some rows see spoils others if it is not finite: 0 · NaN.
            rows_see = jnp.repeat(seen, rows // width, axis=1)[:, None]
            is_finite = jnp.isfinite(weighted).all()
            sum_of_seen = functools.partial(_sum_of_seen, cache.layout.latent)
            weighted = lax.cond(is_finite, lambda *_: weighted, sum_of_seen, weight, rows_see, value)
        return new_maximum, normalizer * shrink + jnp.sum(weight, axis=-1), out + weighted

    front = (tiles, heads, rows)
    # The lowest number, not -inf: a row that has seen nothing yet has weights exp(-inf), not exp(-inf + inf).
    maximum = jnp.full(front, jnp.finfo(jnp.float32).min)
    state = (maximum, jnp.zeros(front, jnp.float32), jnp.zeros((*front, cache.head_size_v), jnp.float32))
    state = vary(state, varying_axes(queries.query))  # within shard_map
    if table.shape[1] == blocks:  # without a loop, XLA makes one program of it: twice as fast for small models on a CPU
        return step(jnp.int32(0), state)
    return lax.fori_loop(jnp.int32(first), end.astype(jnp.int32), step, state)


def _blocks_of_a_tile(call: Attention, queries: _Queries) -> int:
    """Blocks of the positions that are handled at a time."""
    (tiles, heads, rows, _), max_blocks = queries.query.shape, queries.block_tables.shape[1]
    per_position = tiles * heads * (call.cache.head_size + call.cache.head_size_v + rows)
    positions = min(_TILE, _known(_TILE_ELEMENTS // per_position, _TILE))
    blocks = max(1, positions // call.cache.extents.block_size)
    return min(_known(max_blocks, blocks), blocks)


def _seen(call: Attention, queries: _Queries, position: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which positions `[1, positions]` of those that exist any query of a tile may see, and which ones each query sees.

    Returns:
        `[tiles, positions]` and `[tiles, queries or 1, positions]`.
    """
    causal, window = call.options.causal, call.options.sliding_window
    if window is not None:  # what no query of the tile sees may have been freed, and hold anything
        exists = exists & (queries.position[:, :1] - position < window)
    seen = exists[:, None]
    if queries.position.shape[1] > 1 and causal:
        seen = seen & (position[None] <= queries.position[..., None])
        if window is not None:
            seen = seen & (queries.position[..., None] - position[None] < window)
    return exists, seen


def _sum_of_seen(latent: bool, weight: jax.Array, seen: jax.Array, value: jax.Array) -> jax.Array:
    """Sums of values by weights, where infinities and NaN reach only the rows that see them."""

    def product(weight: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.einsum("thrn,thnd->thrd", weight, value, precision=lax.Precision.HIGHEST)

    sees = jnp.broadcast_to(seen, weight.shape).astype(value.dtype)
    total = product(weight, jnp.where(jnp.isfinite(value), value, 0))
    for infinity in (jnp.inf, -jnp.inf):  # NaN is both
        meets = product(sees, (jnp.isnan(value) | (value == infinity)).astype(value.dtype)) > 0
        total = jnp.where(meets, total + infinity, total)
    if latent:  # the value is a part of the key: it may have made its own weight 0, and 0 times infinity is NaN
        meets = product(jnp.where(weight == 0, sees, 0), (~jnp.isfinite(value)).astype(value.dtype)) > 0
        total = jnp.where(meets, jnp.nan, total)
    return total


def _tile(source: Source, layer: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of blocks `[tiles, blocks]` as `[tiles, num_heads, positions, dim]` float32."""
    cache = source.cache
    # With heads among the indices, the gather leaves elements in the order in which the products want them.
    head = jnp.arange(cache.extents.num_heads, dtype=jnp.int32)
    indices = {"layer": layer, "block": block[:, None, :], "head": head[:, None]}

    def rows(kv: int) -> jax.Array:
        by_block = source.decode(kv, indices, "slot")
        return by_block.reshape(*by_block.shape[:2], -1, by_block.shape[-1])

    key = rows(0)
    return key, key[..., : cache.head_size_v] if cache.layout.latent else rows(1)


# ---- operands


def with_int32(operands: ReadOperands) -> ReadOperands:
    """Indices and lengths as int32. What does not fit is far outside, and stays so."""

    def narrow(array: jax.Array | None) -> jax.Array | None:
        if array is None or array.dtype == jnp.int32:
            return array
        return jnp.clip(array, -(2**31), 2**31 - 1).astype(jnp.int32)

    return operands._replace(
        block_tables=narrow(operands.block_tables),
        seq_lens=narrow(operands.seq_lens),
        query_start_loc=narrow(operands.query_start_loc),
        cache=operands.cache._replace(layer=narrow(operands.cache.layer)),
    )


def layer_index(options: CacheOptions, operands: CacheOperands) -> jax.Array:
    """The index of the layer; 0 where the layout has no such axis."""
    return jnp.int32(options.layer or 0) if operands.layer is None else operands.layer[0]


def _known(number: int, otherwise: int) -> int:
    """A number that depends on shapes; `otherwise` where jax.export leaves these open."""
    return number if isinstance(number, int) else otherwise
