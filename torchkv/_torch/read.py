"""The reading ops as vectorised torch: for devices without Triton, and to compare with.

Attention takes tiles of queries, each of one sequence, all at once, and tiles of positions one at a time: it needs
memory for what a tile of positions holds, however long the sequences are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from kvcore.contract.cache import Cache
from kvcore.contract.read import Attention, Gather
from kvcore.formats import BFLOAT16, DS_MLA_ROPE, FloatFormat
from kvcore.placement import Placement
from torchkv._torch.write import BITS, decode, encode, view_of

_TILE = 1024
"""Positions of a tile, or a block where that is more."""

_TILE_ELEMENTS = 2**24
"""About as many numbers as keys, values and logits of a tile of positions may have; else it has fewer positions."""

_MOST_QUERIES = 64
"""Queries of a tile."""

_Softmax = tuple[Tensor, Tensor, Tensor]
"""Each row's largest logit, the sum of its weights relative to that, and the sum of values by these weights."""


class AttentionTensors(NamedTuple):
    """Tensors of a call of `paged_attention`. A traced `layer` has one element."""

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
        position: Of each query, `[tiles, queries]`. Those after a sequence's last are no one's.
        length: Positions of the tile's sequence, `[tiles]`.
        block_tables: `[tiles, max_blocks]`.
    """

    query: Tensor
    position: Tensor
    length: Tensor
    block_tables: Tensor


def attention(call: Attention, x: AttentionTensors) -> tuple[Tensor, Tensor]:
    """The result, in query's dtype, and the log-sum-exp of each row: online softmax in float32."""
    extents = call.cache.extents
    num_tokens, q_heads, _ = call.query.shape
    nothing = x.query.new_full((q_heads,), -torch.inf, dtype=torch.float32) if x.sinks is None else x.sinks.float()
    if 0 in (num_tokens, q_heads, extents.num_blocks, *call.block_tables.shape):
        return x.query.new_zeros(call.out_shape), nothing.repeat(num_tokens, 1)
    heads, group = extents.num_heads, q_heads // extents.num_heads
    queries = _tile_queries(x)
    count, width = queries.position.shape

    assert call.options.scale is not None  # the contract has put the usual one
    query = queries.query.float() * call.options.scale
    query = query.unflatten(2, (heads, group)).transpose(1, 2).reshape(count, heads, width * group, -1)
    if _is_static(x.k_scale, call.cache):
        query = query * x.k_scale.reshape(-1, 1, 1)  # one, or one a head
    top, total, out = _online_softmax(call, x, queries._replace(query=query))
    saw_nothing = (total == 0).unsqueeze(-1)

    if x.sinks is not None:
        sink = nothing.reshape(heads, group).repeat(1, width)
        new_top = torch.maximum(top, sink)
        shrink = (top - new_top).exp_()
        top, total, out = new_top, total * shrink + (sink - new_top).exp_(), out * shrink.unsqueeze(-1)
    lse = top + total.log()  # -inf where total is 0, since top is finite
    out = out / total.masked_fill(total == 0, 1).unsqueeze(-1)
    if _is_static(x.v_scale, call.cache):
        out = (out * x.v_scale.reshape(-1, 1, 1)).masked_fill(saw_nothing, 0)  # even where the scale is NaN

    def by_token(a: Tensor) -> Tensor:
        return a.reshape(count, heads, width, group, -1).transpose(1, 2).reshape(count * width, q_heads, -1)

    out, lse = by_token(out), by_token(lse).squeeze(-1)
    if x.query_start_loc is not None:
        inside, place = _places(x.query_start_loc, num_tokens, width)
        out = out[place].masked_fill_(~inside[:, None, None], 0)
        lse = lse[place].where(inside[:, None], nothing)
    return out.to(x.query.dtype), lse


# ---- tiles of queries


def _tile_queries(x: AttentionTensors) -> _Queries:
    lengths = x.seq_lens.long()
    if x.query_start_loc is None:
        return _Queries(x.query.unsqueeze(1), lengths.unsqueeze(1) - 1, lengths, x.block_tables)
    device, num_tokens, num_seqs = x.query.device, x.query.shape[0], x.seq_lens.shape[0]
    average = -(-num_tokens // num_seqs)
    width = min(1 << (average - 1).bit_length(), _MOST_QUERIES)
    begin = _begins(x.query_start_loc, num_tokens)
    first_tile = _first_tiles(begin, width)
    tile = torch.arange(num_tokens // width + num_seqs, device=device)
    seq = (torch.searchsorted(first_tile, tile, right=True) - 1).clamp_(min=0)
    token = (begin[seq] + (tile - first_tile[seq]) * width).unsqueeze(1) + torch.arange(width, device=device)
    position = (lengths - x.query_start_loc[1:])[seq].unsqueeze(1) + token
    return _Queries(x.query[token.clamp(0, num_tokens - 1)], position, lengths[seq], x.block_tables[seq])


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


def _online_softmax(call: Attention, x: AttentionTensors, queries: _Queries) -> _Softmax:
    extents, options = call.cache.extents, call.options
    query, position, length, table = queries
    count, heads, rows, _ = query.shape
    window, width = options.sliding_window, position.shape[1]
    max_blocks, block_size = table.shape[1], extents.block_size
    per_position = count * heads * (call.cache.head_size + call.cache.head_size_v + rows)
    blocks = max(1, min(_TILE, _TILE_ELEMENTS // per_position) // block_size)

    limit = length.clamp(max=max_blocks * block_size)
    if options.causal:
        limit = torch.minimum(limit, position[:, -1] + 1)
    first, end = 0, -(-int(limit.max()) // block_size)
    if window is not None:  # sequences of length 0 must not make the loop begin early
        lowest = (position[:, 0] - window + 1).where(limit > 0, end * block_size)
        first = max(int(lowest.min()), 0) // block_size
    layer = _layer(x.layer)
    if 0 <= layer < (extents.num_layers or 1):
        sides = _sides(call.cache, x.caches, (x.k_scale, x.v_scale), layer)
    else:
        sides, end = (), 0

    # The lowest number, not -inf: a row that has seen nothing yet has weights exp(-inf), not exp(-inf + inf).
    top = query.new_full((count, heads, rows), torch.finfo(torch.float32).min)
    total, out = torch.zeros_like(top), query.new_zeros((count, heads, rows, call.cache.head_size_v))
    for at in range(first, end, blocks):
        block = table[:, at : min(at + blocks, end)]
        there = (block >= 0) & (block < extents.num_blocks)
        n = torch.arange(at * block_size, (at + block.shape[1]) * block_size, device=query.device)
        exists = there.repeat_interleave(block_size, 1) & (n < limit.unsqueeze(1))
        if window is not None:  # what no query of the tile sees may have been freed, and hold anything
            exists &= n > position[:, :1] - window
        seen = exists.unsqueeze(1)
        if width > 1 and options.causal:
            seen = seen & (n <= position.unsqueeze(-1))
            if window is not None:
                seen &= n > position.unsqueeze(-1) - window
        key, value = _tile(call.cache, sides, block.where(there, 0).long())

        logit = query @ key.mT
        if options.soft_cap is not None:
            logit = logit.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
        logit.view(count, heads, width, -1, n.shape[0]).masked_fill_(~seen[:, None, :, None], -torch.inf)
        new_top = torch.maximum(top, logit.amax(-1))
        weight = logit.sub_(new_top.unsqueeze(-1)).exp_()
        shrink = top.sub_(new_top).exp_()
        value.transpose(1, 2)[(~exists).nonzero(as_tuple=True)] = 0  # mostly few: faster than a mask over all
        top, total = new_top, total.mul_(shrink).add_(weight.sum(-1))
        shrink, more = shrink.unsqueeze(-1), weight @ value
        if width > 1 and options.causal and not more.isfinite().all():
            # A value that only some rows see spoils others if it is not finite: 0 · NaN.
            rows_see = seen.repeat_interleave(rows // width, 1).unsqueeze(1)
            out = (out * shrink).where(out.isfinite(), out).add_(_sum_of_seen(weight, rows_see, value))
        else:
            out = out.mul_(shrink).add_(more)
    return top, total, out


def _sum_of_seen(weight: Tensor, seen: Tensor, value: Tensor) -> Tensor:
    """`weight @ value`, where infinities and NaN reach only the rows that see them."""
    saw, nan = seen.expand_as(weight).to(value.dtype), value.isnan()
    total = weight @ value.masked_fill(~value.isfinite(), 0)
    for infinity in (torch.inf, -torch.inf):  # NaN is both
        meets = saw @ (nan | (value == infinity)).to(value.dtype) > 0
        total = (total + infinity).where(meets, total)
    return total


def _tile(cache: Cache, sides: Sequence["_Side"], block: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of blocks `[tiles, blocks]` as `[tiles, num_heads, positions, dim]`, but for static scales."""
    # With heads among the indices, elements come in the order in which the products want them.
    head = torch.arange(cache.extents.num_heads, device=block.device)
    index = (block.unsqueeze(1), head.unsqueeze(1))

    def pick(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[index].flatten(2, 3)

    key = _read(sides[0], pick)
    if cache.layout.latent:
        return key, key[..., : cache.head_size_v]
    return key, _read(sides[1], pick)


# ---- access to a cache


class _Side(NamedTuple):
    """K or V of a layer: views `[block, slot, head, dim // x, x]` of integers, whatever their order in memory.

    Attributes:
        units: Stored elements, those of 4 bits two in a byte.
        format: Of these.
        scales: By which elements are multiplied, as many after each other for one; None: by none.
        scale_format: Of these.
        rope: More elements, of bfloat16 and without scales; None: none.
    """

    units: Tensor
    format: FloatFormat
    scales: Tensor | None
    scale_format: FloatFormat
    rope: Tensor | None


def _sides(
    cache: Cache, arrays: Sequence[Tensor], scale_arrays: Sequence[Tensor | None], layer: int
) -> tuple[_Side, _Side]:
    def view(array: Tensor | None, stored: FloatFormat, placement: Placement, kv: int) -> Tensor:
        assert array is not None  # the contract has seen to it
        extents, key, value = placement
        at, size = (value, extents.head_units_v) if kv else (key, extents.head_units)
        return view_of(array, BITS[stored.bits], at, extents, size)[layer]

    def side(kv: int) -> _Side:
        units, scales = view(arrays[-kv], cache.format, cache.placement, kv), cache.scales
        rope = None
        if cache.rope is not None and kv == 0:
            extents = cache.extents
            rope = view_of(arrays[0], BITS[BFLOAT16.bits], cache.rope, extents, DS_MLA_ROPE)[layer]
        if scales is None:
            return _Side(units, cache.format, None, cache.format, rope)
        array = arrays[-kv] if scales.inside else scale_arrays[kv]
        return _Side(units, cache.format, view(array, scales.format, scales.placement, kv), scales.format, rope)

    return side(0), side(1)


def _read(side: _Side, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Elements as float32 `[…, dim]`, but for static scales. `pick` gives `[…, dim // x, x]` of a side's views."""
    x = decode(pick(side.units).flatten(-2), side.format)
    if side.scales is not None:
        scales = decode(pick(side.scales).flatten(-2), side.scale_format)
        x.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1))
    if side.rope is not None:
        x = torch.cat([x, decode(pick(side.rope).flatten(-2), BFLOAT16)], dim=-1)
    return x


def _is_static(scale: Tensor | None, cache: Cache) -> TypeGuard[Tensor]:
    """Whether elements are multiplied by a scale that is one for all, or one a head."""
    return scale is not None and cache.scaled and (cache.scales is None or cache.scales.inside)


def _layer(layer: int | Tensor | None) -> int:
    return 0 if layer is None else int(layer)


# ---- gather


def gather(
    call: Gather,
    caches: tuple[Tensor, ...],
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layer: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values, `[num_seqs, max_len, num_heads, dim]`. Bits as the oracle's."""
    extents = call.cache.extents
    max_blocks, block_size, dtype = block_tables.shape[1], extents.block_size, getattr(torch, call.format.name)
    at_layer = _layer(layer)
    if 0 in (*call.shapes[0], max_blocks, extents.num_blocks) or not 0 <= at_layer < (extents.num_layers or 1):
        key, value = (caches[0].new_zeros(shape, dtype=dtype) for shape in call.shapes)
        return key, value
    n = torch.arange(call.max_len, device=block_tables.device)
    block = block_tables[:, (n // block_size).clamp_(max=max_blocks - 1)]
    there = (block >= 0) & (block < extents.num_blocks) & (n < seq_lens.clamp(max=max_blocks * block_size).unsqueeze(1))
    block = block.where(there, 0).long()

    sides = _sides(call.cache, caches, (k_scale, v_scale), at_layer)

    def read(kv: int, scale: Tensor | None) -> Tensor:
        def pick(x: Tensor) -> Tensor:
            return x[block, n % block_size]

        if call.cache.format == call.format:  # bits as they are
            x = pick(sides[kv].units).flatten(-2)
        else:
            x = _read(sides[kv], pick)
            x = encode(x * scale.reshape(-1, 1) if _is_static(scale, call.cache) else x, call.format)
        return x.masked_fill_(~there[..., None, None], 0).view(dtype)

    return read(0, k_scale), read(1, v_scale)
