"""Reading as vectorised torch: for devices without Triton, and to compare with. Memory is bounded by tiles."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.layout import Address
from kvcore.read_contract import Attention, Cache, Gather
from torchkv._torch import encode

_TILE = 256
"""Positions of a tile, or a block where that is more."""

_TILE_ELEMENTS = 2**24
"""About as many numbers as keys, values and logits of all tiles may have at a time; fewer positions keep to it."""

_MOST_QUERIES = 64
"""Queries of a tile."""


class AttentionTensors(NamedTuple):
    """Tensors of a call; `layer` is a number, or a tensor of one."""

    query: Tensor
    caches: tuple[Tensor, ...]
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    layer: int | Tensor | None


class _Queries(NamedTuple):
    """Queries in tiles, each of one sequence.

    Attributes:
        query: `[tiles, queries, num_q_heads, head_size]`.
        position: Of each query, `[tiles, queries]`. Those after a sequence's last are no-one's.
        length: Of the sequence, `[tiles]`.
        block_tables: `[tiles, max_blocks]`.
    """

    query: Tensor
    position: Tensor
    length: Tensor
    block_tables: Tensor


def attention(call: Attention, x: AttentionTensors) -> tuple[Tensor, Tensor]:
    """The result, in query's dtype, and the log-sum-exp of each row: online softmax in float32, tile by tile."""
    extents, options = call.cache.placement.extents, call.options
    num_tokens, q_heads, head_size_v = call.out_shape
    group = q_heads // extents.num_heads
    sinks = x.query.new_full((q_heads,), -torch.inf, dtype=torch.float32) if x.sinks is None else x.sinks.float()
    if 0 in (num_tokens, x.seq_lens.shape[0]):
        return x.query.new_zeros(call.out_shape), sinks.expand(num_tokens, q_heads).clone()
    queries = _tile_queries(x)
    count, width = queries.position.shape

    scaled = call.cache.scaled
    query = queries.query.float() * options.scale
    if scaled and x.k_scale is not None:
        query = query * x.k_scale.reshape(())
    # [tiles, num_heads, rows, head_size]; row = query · group + query head of the group
    query = query.unflatten(2, (extents.num_heads, group)).transpose(1, 2).flatten(2, 3)
    top, total, out = _online_softmax(call, x, queries._replace(query=query))

    sink = sinks.view(extents.num_heads, group).repeat(1, width)
    new_top = torch.maximum(top, sink)
    shrink = torch.exp(top - new_top)
    total, out = total * shrink + torch.exp(sink - new_top), out * shrink[..., None]
    nothing = total == 0
    lse = torch.where(nothing, -torch.inf, new_top + torch.log(total))
    out = out / torch.where(nothing, 1, total)[..., None]
    if scaled and x.v_scale is not None:
        out = out * x.v_scale.reshape(())
    out = out.unflatten(2, (width, group)).transpose(1, 2).reshape(count * width, q_heads, head_size_v)
    lse = lse.unflatten(2, (width, group)).transpose(1, 2).reshape(count * width, q_heads)
    if x.query_start_loc is not None:
        inside, place = _places(x.query_start_loc.long(), num_tokens, width)
        out = torch.where(inside[:, None, None], out[place], 0)
        lse = torch.where(inside[:, None], lse[place], sinks)
    return out.to(x.query.dtype), lse


# ---- tiles of queries


def _tile_queries(x: AttentionTensors) -> _Queries:
    length = x.seq_lens.long()
    if x.query_start_loc is None:
        return _Queries(x.query[:, None], length[:, None] - 1, length, x.block_tables)
    start, num_tokens, num_seqs = x.query_start_loc.long(), x.query.shape[0], len(length)
    average = -(-num_tokens // num_seqs)
    width = min(1 << (average - 1).bit_length(), _MOST_QUERIES)
    first_tile = _first_tiles(start, width)
    tile = torch.arange(num_tokens // width + num_seqs, device=start.device)
    seq = ((first_tile <= tile[:, None]).sum(1) - 1).clamp(min=0)
    token = (start[seq] + (tile - first_tile[seq]) * width)[:, None] + torch.arange(width, device=start.device)
    position = (length[seq] - start[seq + 1])[:, None] + token
    query = x.query[token.clamp(0, num_tokens - 1)]
    return _Queries(query, position, length[seq], x.block_tables[seq])


def _first_tiles(start: Tensor, width: int) -> Tensor:
    """The first tile of each sequence: with one more for each, no two sequences share any."""
    return start[:-1] // width + torch.arange(len(start) - 1, device=start.device)


def _places(start: Tensor, num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each token is one of a sequence, and its place among those of the tiles."""
    token = torch.arange(num_tokens, device=start.device)
    begun = (start <= token[:, None]).sum(1)
    inside = (begun > 0) & (begun < len(start))
    seq = torch.where(inside, begun - 1, 0)
    return inside, torch.where(inside, _first_tiles(start, width)[seq] * width + token - start[seq], 0)


# ---- tiles of positions


def _online_softmax(call: Attention, x: AttentionTensors, queries: _Queries) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, denominator and sum of each row, `[tiles, num_heads, rows, …]`; `query` has that order, too."""
    extents, options = call.cache.placement.extents, call.options
    (count, heads, rows, _), width = queries.query.shape, queries.position.shape[1]
    device, position, table = queries.query.device, queries.position, queries.block_tables
    per_position = count * heads * (extents.head_size + extents.head_size_v + rows)
    blocks = max(1, min(_TILE, _TILE_ELEMENTS // per_position) // extents.block_size)
    tile = blocks * extents.block_size
    layer = 0 if x.layer is None else int(x.layer)
    there = (table >= 0) & (table < extents.num_blocks)
    limit = queries.length.clamp(max=table.shape[1] * extents.block_size)
    if options.causal:
        limit = torch.minimum(limit, position[:, -1] + 1)
    end = int(limit.max()) if 0 <= layer < (extents.num_layers or 1) else 0
    first = 0
    if options.sliding_window is not None and end > 0:  # sequences of length 0 must not make the loop begin early
        lowest = torch.where(limit > 0, position[:, 0] - options.sliding_window + 1, end)
        first = max(int(lowest.min()), 0) // tile * tile

    # The lowest number, not -inf: a row that has seen nothing yet has weights exp(-inf), not exp(-inf + inf).
    top = torch.full((count, heads, rows), torch.finfo(torch.float32).min, device=device)
    total = torch.zeros_like(top)
    out = torch.zeros((count, heads, rows, extents.head_size_v), device=device)
    for start in range(first, max(end, first), tile):
        span = slice(start // extents.block_size, start // extents.block_size + blocks)
        exists = there[:, span].repeat_interleave(extents.block_size, 1)
        n = torch.arange(start, start + exists.shape[1], device=device)
        exists = exists & (n < limit[:, None])
        if options.sliding_window is not None:  # what no query of the tile sees may have been freed, and hold anything
            exists = exists & (n > position[:, :1] - options.sliding_window)
        seen = exists[:, None]
        if options.causal and width > 1:
            seen = seen & (n <= position[..., None])
            if options.sliding_window is not None:
                seen = seen & (n > position[..., None] - options.sliding_window)
        seen = seen.repeat_interleave(rows // seen.shape[1], 1)[:, None]  # [tiles, 1, rows, positions]
        block = torch.where(there[:, span], table[:, span], 0).long()
        key, value = _tile(call.cache, x.caches, layer, block)

        logit = queries.query @ key.transpose(-1, -2)
        if options.soft_cap is not None:
            logit = options.soft_cap * torch.tanh(logit / options.soft_cap)
        logit = torch.where(seen, logit, -torch.inf)
        new_top = torch.maximum(top, logit.amax(-1))
        weight = torch.exp(logit - new_top[..., None])
        shrink = torch.exp(top - new_top)
        value = torch.where(exists[:, None, :, None], value, 0)
        top, total = new_top, total * shrink + weight.sum(-1)
        out = out * shrink[..., None] + weight @ value
    return top, total, out


def _tile(cache: Cache, caches: Sequence[Tensor], layer: int, block: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of blocks `[tiles, blocks]` as `[tiles, num_heads, positions, dim]` float32, without scales."""
    key, value = (
        _decode(view[layer][block], cache).permute(0, 3, 1, 2, 4, 5).flatten(4, 5).flatten(2, 3)
        for view in _views(cache, caches)
    )
    return key, value


# ---- access to a cache


def _views(cache: Cache, caches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """K and V as `[layer, block, slot, head, dim // x, x]`, whatever their order in memory."""
    extents = cache.placement.extents

    def view(tensor: Tensor, at: Address, head_size: int) -> Tensor:
        return tensor.as_strided(
            (
                extents.num_layers or 1, extents.num_blocks, extents.block_size, extents.num_heads,
                head_size // at.x, at.x,
            ),
            (at.layer, at.block, at.slot, at.head, at.dim, at.x_stride),
            tensor.storage_offset() + at.offset,
        )  # fmt: skip

    return (
        view(caches[0], cache.placement.key, extents.head_size),
        view(caches[-1], cache.placement.value, extents.head_size_v),
    )


def _decode(x: Tensor, cache: Cache) -> Tensor:
    """Stored elements as float32."""
    return x.view(getattr(torch, cache.format.name)).float()


# ---- gather


def gather(
    call: Gather,
    caches: Sequence[Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layer: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values, `[num_seqs, max_len, num_heads, dim]`. Bits as the oracle's."""
    extents = call.cache.placement.extents
    layer = 0 if layer is None else int(layer)
    capacity = block_tables.shape[1] * extents.block_size
    n = torch.arange(min(call.max_len, capacity), device=block_tables.device)
    block = block_tables[:, n // extents.block_size].long()
    there = (block >= 0) & (block < extents.num_blocks) & (n < seq_lens[:, None])
    there &= 0 <= layer < (extents.num_layers or 1)
    seq, position = there.nonzero(as_tuple=True)
    at = block[seq, position], position % extents.block_size
    results = []
    for view, shape, scale in zip(_views(call.cache, caches), call.shapes, (k_scale, v_scale), strict=True):
        result = view.new_zeros(shape, dtype=getattr(torch, call.format.name))
        if len(seq):
            rows = _convert(view[layer][at].flatten(2, 3), call, scale)
            result.view(rows.dtype)[seq, position] = rows
        results.append(result)
    return results[0], results[1]


def _convert(x: Tensor, call: Gather, scale: Tensor | None) -> Tensor:
    """Stored elements in the wanted format, as integers: floats may lose the payload of a NaN."""
    if call.cache.format == call.format:
        return x.view({16: torch.int16, 32: torch.int32}[call.format.bits])
    x = _decode(x, call.cache)
    return encode(x * scale.reshape(()) if call.cache.scaled and scale is not None else x, call.format)
