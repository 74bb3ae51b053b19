"""The ops that read, as vectorised torch: for devices without Triton, and to compare with.

Attention takes tiles of queries, each of one sequence, all at once, and tiles of positions one at a time: it needs
memory for what a tile of positions holds, however long the sequences are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.contract.cache import Cache
from kvcore.contract.read import Attention, Gather
from torchkv._call import AttentionCall, GatherCall
from torchkv._torch.access import Side, elements_of, layer_number, sides_of, static_scale
from torchkv._torch.formats import encode

_TILE = 1024
"""Positions of a tile, or a block where that is more."""

_TILE_ELEMENTS = 2**24
"""About as many numbers as keys, values and logits of a tile of positions may have; else it has fewer positions."""

_MOST_QUERIES = 64
"""Queries of a tile."""


class _Queries(NamedTuple):
    """Queries in tiles, each of one sequence.

    Attributes:
        query: `[tiles, queries, num_q_heads, head_size]`.
        position: Of each query, `[tiles, queries]`. Those after a sequence's last are no one's.
        length: Positions of the tile's sequence, `[tiles]`.
        block_tables: `[tiles, max_blocks]`.
    """

    query: Tensor
    position: Tensor
    length: Tensor
    block_tables: Tensor


class _Softmax(NamedTuple):
    """An online softmax over the positions so far. A query row is a query of a tile and one of a KV head's query heads.

    Attributes:
        maximum: Each query row's largest logit, `[tiles, num_heads, query_rows]`.
        normalizer: The sum of its weights `exp(logit - maximum)`.
        weighted: The sum of values by these weights, `[tiles, num_heads, query_rows, head_size_v]`.
    """

    maximum: Tensor
    normalizer: Tensor
    weighted: Tensor


def attention(described: Attention, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The result, in query's dtype, and the log-sum-exp of each row: online softmax in float32."""
    cache, sinks, scale = described.cache, call.sinks, described.options.scale
    num_tokens, num_q_heads, _ = described.query.shape
    lse_of_none = call.query.new_full((num_q_heads,), -torch.inf, dtype=torch.float32)  # of rows that see nothing
    if sinks is not None:
        lse_of_none = sinks.float()
    if 0 in (num_tokens, num_q_heads, cache.extents.num_blocks, *described.block_tables.shape):
        return call.query.new_zeros(described.out_shape), lse_of_none.repeat(num_tokens, 1)
    num_heads = cache.extents.num_heads
    q_per_kv = num_q_heads // num_heads
    queries = _tile_queries(call)
    tiles, width = queries.position.shape

    assert scale is not None  # the contract has put the usual one
    query = (queries.query.float() * scale).unflatten(2, (num_heads, q_per_kv))
    query = query.transpose(1, 2).reshape(tiles, num_heads, width * q_per_kv, -1)
    layer = layer_number(call)
    k_scale, v_scale = (static_scale(scale, cache, layer) for scale in (call.k_scale, call.v_scale))
    if k_scale is not None:
        query = query * k_scale[:, None, None]
    maximum, normalizer, out = _online_softmax(described, call, queries._replace(query=query))
    saw_nothing = (normalizer == 0).unsqueeze(-1)

    if sinks is not None:
        sink = lse_of_none.reshape(num_heads, q_per_kv).repeat(1, width)
        new_maximum = torch.maximum(maximum, sink)
        shrink = (maximum - new_maximum).exp_()
        normalizer, out = normalizer * shrink + (sink - new_maximum).exp_(), out * shrink.unsqueeze(-1)
        maximum = new_maximum
    lse = maximum + normalizer.log()  # -inf where the normalizer is 0, since the maximum is finite
    out = out / normalizer.masked_fill(normalizer == 0, 1).unsqueeze(-1)
    if v_scale is not None:
        out = (out * v_scale[:, None, None]).masked_fill(saw_nothing, 0)  # even where the scale is NaN

    def by_query(rows: Tensor) -> Tensor:
        """`[tiles, num_heads, query_rows, …]` as `[tiles * queries, num_q_heads, …]`."""
        rows = rows.reshape(tiles, num_heads, width, q_per_kv, -1).transpose(1, 2)
        return rows.reshape(tiles * width, num_q_heads, -1)

    out, lse = by_query(out), by_query(lse).squeeze(-1)
    if call.query_start_loc is not None:
        inside, place = _places(call.query_start_loc, num_tokens, width)
        out = out[place].masked_fill_(~inside[:, None, None], 0)
        lse = lse[place].where(inside[:, None], lse_of_none)
    return out.to(call.query.dtype), lse


# ---- tiles of queries


def _tile_queries(call: AttentionCall) -> _Queries:
    lengths = call.seq_lens.long()
    if call.query_start_loc is None:
        return _Queries(call.query.unsqueeze(1), lengths.unsqueeze(1) - 1, lengths, call.block_tables)
    device, num_tokens, num_seqs = call.query.device, call.query.shape[0], call.seq_lens.shape[0]
    average = -(-num_tokens // num_seqs)
    width = min(1 << (average - 1).bit_length(), _MOST_QUERIES)
    begin = _begins(call.query_start_loc, num_tokens)
    first_tile = _first_tiles(begin, width)
    tile = torch.arange(num_tokens // width + num_seqs, device=device)
    seq = (torch.searchsorted(first_tile, tile, right=True) - 1).clamp_(min=0)
    token = (begin[seq] + (tile - first_tile[seq]) * width).unsqueeze(1) + torch.arange(width, device=device)
    position = (lengths - call.query_start_loc[1:])[seq].unsqueeze(1) + token
    return _Queries(call.query[token.clamp(0, num_tokens - 1)], position, lengths[seq], call.block_tables[seq])


def _begins(start: Tensor, num_tokens: int) -> Tensor:
    """Where each sequence begins in query, and where the last one ends: nowhere before any earlier start."""
    return start.long().cummax(0).values.clamp_(0, num_tokens)


def _first_tiles(begin: Tensor, width: int) -> Tensor:
    """The first tile of each sequence: with one more for each, no two sequences share any."""
    return begin[:-1] // width + torch.arange(begin.shape[0] - 1, device=begin.device)


def _places(start: Tensor, num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each token is one of a sequence, and its place among those of the tiles."""
    begin = _begins(start, num_tokens)
    token = torch.arange(num_tokens, device=start.device)
    begun = torch.searchsorted(begin, token, right=True)
    inside = (begun > 0) & (begun < begin.shape[0])
    seq = (begun - 1).where(inside, 0)
    return inside, (_first_tiles(begin, width)[seq] * width + token - begin[seq]).where(inside, 0)


# ---- tiles of positions


class _Positions(NamedTuple):
    """A tile of positions, for each tile of queries.

    Attributes:
        block: Blocks of the cache, `[tiles, blocks]`; 0 where the table has none.
        exists: Whether there is a key that any query of the tile sees, `[tiles, positions]`.
        seen: Whether a query sees a position, `[tiles, queries or 1, positions]`.
    """

    block: Tensor
    exists: Tensor
    seen: Tensor


def _tile_positions(described: Attention, queries: _Queries) -> Iterator[_Positions]:
    extents, options = described.cache.extents, described.options
    query, position, length, table = queries
    tiles, num_heads, query_rows, _ = query.shape
    window, block_size = options.sliding_window, extents.block_size
    per_position = tiles * num_heads * (described.cache.head_size + described.cache.head_size_v + query_rows)
    blocks = max(1, min(_TILE, _TILE_ELEMENTS // per_position) // block_size)

    limit = length.clamp(max=table.shape[1] * block_size)
    if options.causal:
        limit = torch.minimum(limit, position[:, -1] + 1)
    first, end = 0, -(-int(limit.max()) // block_size)
    if window is not None:  # sequences of length 0 must not make the loop begin early
        lowest = (position[:, 0] - window + 1).where(limit > 0, end * block_size)
        first = max(int(lowest.min()), 0) // block_size
    for first_block in range(first, end, blocks):
        block = table[:, first_block : min(first_block + blocks, end)]
        in_cache = (block >= 0) & (block < extents.num_blocks)
        n = torch.arange(first_block * block_size, (first_block + block.shape[1]) * block_size, device=query.device)
        exists = in_cache.repeat_interleave(block_size, 1) & (n < limit.unsqueeze(1))
        if window is not None:  # what no query of the tile sees may have been freed, and hold anything
            exists &= n > position[:, :1] - window
        seen = exists.unsqueeze(1)
        if position.shape[1] > 1 and options.causal:
            seen = seen & (n <= position.unsqueeze(-1))
            if window is not None:
                seen &= n > position.unsqueeze(-1) - window
        yield _Positions(block.where(in_cache, 0).long(), exists, seen)


def _online_softmax(described: Attention, call: AttentionCall, queries: _Queries) -> _Softmax:
    cache, soft_cap, query = described.cache, described.options.soft_cap, queries.query
    tiles, num_heads, query_rows, _ = query.shape
    width = queries.position.shape[1]
    # The lowest number, not -inf: a row that has seen nothing yet has weights exp(-inf), not exp(-inf + inf).
    maximum = query.new_full((tiles, num_heads, query_rows), torch.finfo(torch.float32).min)
    normalizer = torch.zeros_like(maximum)
    weighted = query.new_zeros((tiles, num_heads, query_rows, cache.head_size_v))
    layer = layer_number(call)
    if not 0 <= layer < (cache.extents.num_layers or 1):
        return _Softmax(maximum, normalizer, weighted)
    sides = sides_of(cache, call.caches, call.k_scale, call.v_scale, layer)
    for block, exists, seen in _tile_positions(described, queries):
        key, value = _keys_and_values(cache, sides, block)
        logit = query @ key.mT
        if soft_cap is not None:
            logit = logit.div_(soft_cap).tanh_().mul_(soft_cap)
        by_query = logit.view(tiles, num_heads, width, -1, exists.shape[1])
        by_query.masked_fill_(~seen[:, None, :, None], -torch.inf)
        new_maximum = torch.maximum(maximum, logit.amax(-1))
        weight = logit.sub_(new_maximum.unsqueeze(-1)).exp_()
        shrink = maximum.sub_(new_maximum).exp_()
        value.transpose(1, 2)[(~exists).nonzero(as_tuple=True)] = 0  # mostly few: faster than a mask over all
        maximum, normalizer = new_maximum, normalizer.mul_(shrink).add_(weight.sum(-1))
        shrink, added = shrink.unsqueeze(-1), weight @ value
        if seen.shape[1] > 1 and not added.isfinite().all():
            # A value that only some rows see spoils others if it is not finite: 0 · NaN.
            rows_see = seen.repeat_interleave(query_rows // width, 1).unsqueeze(1)
            weighted = (weighted * shrink).where(weighted.isfinite(), weighted)
            weighted.add_(_sum_of_seen(weight, rows_see, value, cache.layout.latent))
        else:
            weighted.mul_(shrink).add_(added)
    return _Softmax(maximum, normalizer, weighted)


def _sum_of_seen(weight: Tensor, seen: Tensor, value: Tensor, latent: bool) -> Tensor:
    """`weight @ value`, where infinities and NaN reach only the rows that see them."""
    saw, nan = seen.expand_as(weight).to(value.dtype), value.isnan()
    total = weight @ value.masked_fill(~value.isfinite(), 0)
    for infinity in (torch.inf, -torch.inf):  # NaN is both
        meets = saw @ (nan | (value == infinity)).to(value.dtype) > 0
        total = (total + infinity).where(meets, total)
    if latent:  # the value is a part of the key: it may have made its own weight 0, and 0 times infinity is NaN
        meets = saw.where(weight == 0, 0) @ (~value.isfinite()).to(value.dtype) > 0
        total = total.masked_fill(meets, torch.nan)
    return total


def _keys_and_values(cache: Cache, sides: Sequence[Side], block: Tensor) -> tuple[Tensor, Tensor]:
    """Those of blocks `[tiles, blocks]`, as `[tiles, num_heads, positions, dim]`, not multiplied by static scales."""
    # With heads among the indices, elements come in the order in which the products want them.
    head = torch.arange(cache.extents.num_heads, device=block.device)
    index = (block.unsqueeze(1), head.unsqueeze(1))

    def pick(view: Tensor) -> Tensor:
        return view.transpose(1, 2)[index].flatten(2, 3)

    key = elements_of(sides[0], pick)
    if cache.layout.latent:
        return key, key[..., : cache.head_size_v]
    return key, elements_of(sides[1], pick)


# ---- gather


def gather(described: Gather, call: GatherCall) -> tuple[Tensor, Tensor]:
    """Keys and values, `[num_seqs, max_len, num_heads, dim]`, or `[n, num_heads, dim]`. Bits as the oracle's."""
    cache, block_tables = described.cache, call.block_tables
    extents, block_size, max_blocks = cache.extents, cache.extents.block_size, described.block_tables.shape[1]
    dtype, layer = getattr(torch, described.format.name), layer_number(call)
    if 0 in (*described.shapes[0], max_blocks, extents.num_blocks) or not 0 <= layer < (extents.num_layers or 1):
        key, value = (call.caches[0].new_zeros(shape, dtype=dtype) for shape in described.shapes)
        return key, value
    if call.seq_lens is None:
        block, n = block_tables.div(block_size, rounding_mode="floor"), block_tables.long()
        exists = (block >= 0) & (block < extents.num_blocks)
    else:
        n = torch.arange(described.max_len, device=block_tables.device)
        block = block_tables[:, (n // block_size).clamp_(max=max_blocks - 1)]
        exists = (block >= 0) & (block < extents.num_blocks)
        exists &= n < call.seq_lens.clamp(max=max_blocks * block_size).unsqueeze(1)
    block = block.where(exists, 0).long()

    def read(side: Side, scale: Tensor | None) -> Tensor:
        def pick(view: Tensor) -> Tensor:
            return view[block, n % block_size]

        if cache.format == described.format:  # bits as they are
            bits = pick(side.units).flatten(-2)
        else:
            elements = elements_of(side, pick)
            scale = static_scale(scale, cache, layer)
            if scale is not None:
                elements = elements * scale[:, None]
            bits = encode(elements, described.format)
        return bits.masked_fill_(~exists[..., None, None], 0).view(dtype)

    key, value = sides_of(cache, call.caches, call.k_scale, call.v_scale, layer)
    return read(key, call.k_scale), read(value, call.v_scale)
