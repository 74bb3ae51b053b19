"""The reading ops as XLA programs: for CPU, TPU, and wherever there is no Triton.

Attention takes tiles of queries, each of one sequence, all at once, and tiles of positions one at a time: it needs
memory for what a tile of positions holds, however long the sequences are.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._primitive import vary, varying_axes
from jaxkv._xla import bits_of
from kvcore.quantization import FP8, FloatFormat
from kvcore.read_contract import Attention, Cache, Gather

if TYPE_CHECKING:
    from jaxkv._read_primitive import Operands

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


def attention(call: Attention, operands: "Operands", layer: int | None) -> tuple[jax.Array, jax.Array]:
    """The result, in query's dtype, and the log-sum-exp of each row: online softmax in float32."""
    x, extents = operands, call.cache.placement.extents
    num_tokens, q_heads, _ = call.query.shape
    sinks = jnp.full(q_heads, -jnp.inf) if x.sinks is None else x.sinks.astype(jnp.float32)
    if 0 in (num_tokens, q_heads, extents.num_blocks, *call.block_tables.shape):
        return jnp.zeros(call.out_shape, call.query.dtype), jnp.broadcast_to(sinks, call.out_shape[:2])
    heads, group = extents.num_heads, q_heads // extents.num_heads
    queries = _tile_queries(x)
    count, width = queries.position.shape

    factor, factor_v = jnp.float32(call.options.scale), None
    if call.cache.scaled:
        factor = factor if x.k_scale is None else factor * x.k_scale[0]
        factor_v = None if x.v_scale is None else x.v_scale[0]
    query = queries.query.astype(jnp.float32) * factor
    query = query.reshape(count, width, heads, group, -1).swapaxes(1, 2).reshape(count, heads, width * group, -1)
    top, total, out = _online_softmax(call, x, layer, queries._replace(query=query))

    if x.sinks is not None:
        sink = jnp.tile(sinks.reshape(heads, group), (1, width))
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp(top - new_top)
        top, total, out = new_top, total * shrink + jnp.exp(sink - new_top), out * shrink[..., None]
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    out = out if factor_v is None else out * factor_v

    def by_token(a: jax.Array) -> jax.Array:
        a = a.reshape(count, heads, width, group, -1).swapaxes(1, 2)
        return a.reshape(count * width, q_heads, -1)

    out, lse = by_token(out), by_token(lse)[..., 0]
    if x.query_start_loc is not None:
        inside, place = _places(x.query_start_loc, num_tokens, width)
        out = jnp.where(inside[:, None, None], out[place], 0)
        lse = jnp.where(inside[:, None], lse[place], sinks)
    return out.astype(call.query.dtype), lse


# ---- tiles of queries


def _tile_queries(x: "Operands") -> _Queries:
    query, start = jnp.asarray(x.query), x.query_start_loc
    if start is None:
        return _Queries(query[:, None], x.seq_lens[:, None] - 1, x.seq_lens, x.block_tables)
    num_tokens, num_seqs = query.shape[0], x.seq_lens.shape[0]
    average = -(-num_tokens // num_seqs)
    width = min(1 << (average - 1).bit_length(), _MOST_QUERIES)
    first_tile = _first_tiles(start, width)
    tile = jnp.arange(num_tokens // width + num_seqs, dtype=start.dtype)
    seq = jnp.maximum(jnp.sum(first_tile <= tile[:, None], axis=1) - 1, 0)
    token = (start[seq] + (tile - first_tile[seq]) * width)[:, None] + jnp.arange(width, dtype=start.dtype)
    length = x.seq_lens[seq]
    position = (length - start[seq + 1])[:, None] + token
    return _Queries(query.at[token].get(mode="clip"), position, length, x.block_tables[seq])


def _first_tiles(start: jax.Array, width: int) -> jax.Array:
    """The first tile of each sequence: with one more for each, no two sequences share any."""
    return start[:-1] // width + jnp.arange(start.shape[0] - 1, dtype=start.dtype)


def _places(start: jax.Array, num_tokens: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Whether each token is one of a sequence, and its place among those of the tiles."""
    token = jnp.arange(num_tokens, dtype=start.dtype)
    begun = jnp.sum(start <= token[:, None], axis=1)
    inside = (begun > 0) & (begun < start.shape[0])
    seq = jnp.where(inside, begun - 1, 0)
    return inside, jnp.where(inside, _first_tiles(start, width)[seq] * width + token - start[seq], 0)


# ---- tiles of positions


def _online_softmax(call: Attention, x: "Operands", layer: int | None, queries: _Queries) -> _Softmax:
    extents, options = call.cache.placement.extents, call.options
    window = options.sliding_window
    position, table = queries.position, queries.block_tables
    (count, heads, rows, _), width = queries.query.shape, position.shape[1]
    per_position = count * heads * (extents.head_size + extents.head_size_v + rows)
    blocks = min(table.shape[1], max(1, min(_TILE, _TILE_ELEMENTS // per_position) // extents.block_size))
    positions = blocks * extents.block_size

    index = _layer(x, layer)
    there = (table >= 0) & (table < extents.num_blocks) & (index >= 0) & (index < (extents.num_layers or 1))
    limit = jnp.minimum(queries.length, table.shape[1] * extents.block_size)
    if options.causal:
        limit = jnp.minimum(limit, position[:, -1] + 1)
    table = jnp.pad(jnp.where(there, table, -1), ((0, 0), (0, -table.shape[1] % blocks)), constant_values=-1)
    end = -(-jnp.max(limit) // positions)
    first = 0
    if window is not None:  # sequences of length 0 must not make the loop begin early
        lowest = jnp.where(limit > 0, position[:, 0] - window + 1, jnp.max(limit))
        first = jnp.maximum(jnp.min(lowest), 0) // positions

    def step(t: jax.Array, state: _Softmax) -> _Softmax:
        top, total, out = state
        n = t * positions + jnp.arange(positions, dtype=jnp.int32)
        block = lax.dynamic_slice_in_dim(table, t * blocks, blocks, axis=1)
        exists = jnp.repeat(block >= 0, extents.block_size, axis=1) & (n < limit[:, None])
        if window is not None:  # what no query of the tile sees may have been freed, and hold anything
            exists = exists & (n > position[:, :1] - window)
        seen = exists[:, None]
        if width > 1 and options.causal:
            seen = seen & (n <= position[..., None])
            if window is not None:
                seen = seen & (n > position[..., None] - window)
        key, value = _tile(call.cache, x, index, jnp.maximum(block, 0))

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
        return new_top, total * shrink + jnp.sum(weight, axis=-1), out * shrink[..., None] + more

    front = (count, heads, rows)
    # The lowest number, not -inf: a row that has seen nothing yet has weights exp(-inf), not exp(-inf + inf).
    top = jnp.full(front, jnp.finfo(jnp.float32).min)
    state = (top, jnp.zeros(front, jnp.float32), jnp.zeros((*front, extents.head_size_v), jnp.float32))
    state = jax.tree.map(lambda s: vary(s, varying_axes(queries.query)), state)  # within shard_map
    if table.shape[1] == blocks:  # without a loop, XLA makes one program of it: twice as fast for small models on a CPU
        return step(jnp.int32(0), state)
    return lax.fori_loop(jnp.int32(first), end.astype(jnp.int32), step, state)


def _tile(cache: Cache, x: "Operands", layer: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of blocks `[tiles, blocks]` as `[tiles, num_heads, positions, dim]` float32, without scales."""
    extents = cache.placement.extents
    # With heads among the indices, the gather leaves elements in the order in which the products want them.
    head = jnp.arange(extents.num_heads, dtype=jnp.int32)
    at = {"layer": layer, "block": block[:, None, :], "head": head[:, None]}

    def read(kv: int) -> jax.Array:
        found = _take(cache, x, kv, at, "slot")
        found = found.reshape(*found.shape[:2], -1, (extents.head_size, extents.head_size_v)[kv])
        return _decode(found, cache.format)

    key = read(0)
    return key, key[..., : extents.head_size_v] if cache.layout.latent else read(1)


# ---- access to a cache


def _layer(x: "Operands", layer: int | None) -> jax.Array:
    return jnp.int32(layer or 0) if x.layer is None else x.layer[0]


def _take(cache: Cache, x: "Operands", kv: int, at: Mapping[str, jax.Array], window: str) -> jax.Array:
    """Stored elements of K (`kv` 0) or V (1) for any order of the cache's axes; zeros where `at` points outside.

    One gather from the whole array: a slice first, or a cast, would copy more than is asked for.

    Args:
        cache: Describes the arrays.
        x: Has the arrays.
        kv: Which.
        at: Indices into layer and block, and into slot or head; they broadcast.
        window: Of slot and head the other one, which is taken whole.

    Returns:
        Axes of the indices, then `window`, then dim, or dim // x and x.
    """
    i = kv if len(x.caches) == 2 else 0
    array = x.caches[i]
    if array.dtype.name in FP8:
        # XLA's CPU code would gather from wider floats, and make them of the whole cache. The barrier ties the array to
        # an index, else bytes of the whole cache would be made before the loop.
        array, block = lax.optimization_barrier((array, at["block"]))
        array, at = lax.bitcast_convert_type(array, jnp.uint8), {**at, "block": block}
    sizes: dict[str, int] = {}
    for axis, size in zip(cache.layout.arrays[i], array.shape, strict=True):
        for name in axis:  # joined axes are taken apart: a bitcast
            sizes[name] = size if len(axis) == 1 else 2 if name == "kv" else size // 2
    array = array.reshape(tuple(sizes.values()))
    names, extents = list(sizes), cache.placement.extents

    first_dim = extents.head_size if cache.layout.packed and kv else 0
    at = {**at, "kv": jnp.int32(kv), "k+v": jnp.int32(first_dim)}
    indexed = [name for name in names if name in at]
    index = jnp.stack(jnp.broadcast_arrays(*at.values()), axis=-1)
    index = index[..., [list(at).index(name) for name in indexed]]
    dim = (extents.head_size, extents.head_size_v)[kv]
    dims = {"k+v": dim, "latent": dim}
    taken = {window, "dim", "dim/x", "x", *dims}
    order = [name for name in (window, "dim", "k+v", "latent", "dim/x", "x") if name in sizes]
    kept = [name for name in names if name in taken]
    batch = index.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + len(kept))),
        collapsed_slice_dims=tuple(n for n, name in enumerate(names) if name not in taken),
        start_index_map=tuple(names.index(name) for name in indexed),
    )
    slices = tuple(dims.get(name, sizes[name]) if name in taken else 1 for name in names)
    found = lax.gather(array, index, numbers, slices, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0)
    return found.transpose(*range(batch), *(batch + kept.index(name) for name in order))


def _decode(x: jax.Array, stored: FloatFormat) -> jax.Array:
    """Stored elements as float32."""
    if x.dtype.name != stored.name:
        x = lax.bitcast_convert_type(x, jnp.dtype(stored.name))
    return x.astype(jnp.float32)


# ---- gather


def gather(call: Gather, operands: "Operands", layer: int | None) -> tuple[jax.Array, jax.Array]:
    """Keys and values, `[num_seqs, max_len, num_heads, dim]`. Bits as the oracle's.

    One exception: XLA's CPU code reads a subnormal scale, and gives a subnormal product with a scale, as zero.
    """
    x, extents = operands, call.cache.placement.extents
    if 0 in (*call.shapes[0], extents.num_blocks, call.block_tables.shape[1]):
        key, value = (jnp.zeros(shape, call.format.name) for shape in call.shapes)
        return key, value
    index, n = _layer(x, layer), jnp.arange(call.max_len, dtype=jnp.int32)
    block = x.block_tables.at[:, n // extents.block_size].get(mode="fill", fill_value=-1)
    there = (block >= 0) & (block < extents.num_blocks) & (n < x.seq_lens[:, None])
    there = there & (index >= 0) & (index < (extents.num_layers or 1))
    # A block that is not there becomes one outside, and gives zeros.
    at = {"layer": index, "block": jnp.where(there, block, extents.num_blocks), "slot": n % extents.block_size}
    found = (_take(call.cache, x, kv, at, "head").reshape(shape) for kv, shape in enumerate(call.shapes))
    both = (_convert(a, call, scale) for a, scale in zip(found, (x.k_scale, x.v_scale), strict=True))
    key, value = (jnp.where(there[..., None, None], a, 0) for a in both)  # the scale may be negative, or NaN
    return key, value


def _convert(x: jax.Array, call: Gather, scale: jax.Array | None) -> jax.Array:
    """Stored elements in the wanted format."""
    wanted = call.format
    if call.cache.format == wanted:
        return x
    x = _decode(x, call.cache.format)
    if call.cache.scaled and scale is not None:
        x = x * scale[0]
    return lax.bitcast_convert_type(bits_of(x, wanted), jnp.dtype(wanted.name))
