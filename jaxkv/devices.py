"""What each device of a mesh has of a cache: blocks of its own, or every n-th position of all sequences.

Heads need none of this: XLA splits them. These functions run inside `jax.shard_map`, on the device's part of a cache.

A data axis: each device has blocks, and the sequences in them. Where it has a pool of its own, tables and slots count
its blocks as they are; those of one pool for all are counted again with `local_indices`.

Context parallelism: of n devices, device r has the positions p with `p % n == r` of all sequences, each as position
`p // n` of its own. So a block has room for n times as many positions, one table serves all devices, and a pool for it
is `BlockPool(num_blocks, n * block_size)`::

    positions of block 0     0  1  2  3  4  5  6  7        n = 2, blocks of 4 slots on each device
    device 0                 0     2     4     6
    device 1                    1     3     5     7
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxkv._arguments import ArrayLike, TokenRows, as_array, as_indices
from jaxkv.merge import merge_attention
from kvcore.contract.devices import check_window
from kvcore.pattern import MeshAxes

AxisName = str | tuple[str, ...]
"""An axis of the mesh, or several, in a shard_map over them."""


def local_indices(indices: ArrayLike, count: int, axis_name: AxisName) -> jax.Array:
    """Blocks, or slots, of a cache that is split over a mesh axis, as those of this device's part.

    Device r of the axis has `[r * count, (r + 1) * count)` of them. Within `jax.shard_map`.

    Args:
        indices: Integers of any shape, such as a slot mapping or block tables; below 0: none.
        count: How many of them a device has: blocks, or slots.
        axis_name: The mesh axis over which blocks are split.

    Returns:
        Integers of the same shape: indices into the device's own, and -1 for those of others, which no op reads or
        writes.

    Example:
        >>> own = lambda slots: jaxkv.local_indices(slots, 4, "dp")
        >>> on_two = jax.vmap(own, in_axes=None, axis_size=2, axis_name="dp")  # in place of two devices
        >>> on_two(jnp.array([3, 4, 9, -1])).tolist()
        [[3, -1, -1, -1], [-1, 0, -1, -1]]
    """
    own = jnp.asarray(as_indices(indices))
    own = own - lax.axis_index(axis_name).astype(own.dtype) * count
    return jnp.where((own >= 0) & (own < count), own, -1)


def context_slots(slot_mapping: ArrayLike, axis_name: AxisName) -> jax.Array:
    """The slots of this device's cache for new tokens, where positions are dealt out in turn to n devices.

    Args:
        slot_mapping: `[num_tokens]`: slots in blocks of `n * block_size`, from `jaxkv.slot_mapping(block_tables,
            query_start_loc, seq_lens, n * block_size)` or from a pool with such blocks; below 0: none.
        axis_name: The mesh axis of these devices, within `jax.shard_map`.

    Returns:
        `[num_tokens]`: the slot of each token that this device has, in blocks of `block_size`; -1 for all others.

    Example:
        >>> own = lambda slots: jaxkv.context_slots(slots, "cp")
        >>> on_two = jax.vmap(own, in_axes=None, axis_size=2, axis_name="cp")  # in place of two devices
        >>> on_two(jnp.array([8, 9, 10, -1])).tolist()  # positions 0 to 2 in block 1, of 2 · 4 slots
        [[4, -1, 5, -1], [-1, 4, -1, -1]]
    """
    slots = jnp.asarray(as_indices(slot_mapping))
    parts, rank = lax.axis_size(axis_name), lax.axis_index(axis_name).astype(slots.dtype)
    return jnp.where((slots >= 0) & (slots % parts == rank), slots // parts, -1)


def context_lens(seq_lens: ArrayLike, axis_name: AxisName) -> jax.Array:
    """How many tokens of each sequence this device has, where positions are dealt out in turn to n devices.

    Args:
        seq_lens: `[num_seqs]`: tokens of each sequence.
        axis_name: The mesh axis of these devices, within `jax.shard_map`.

    Returns:
        `[num_seqs]`: the numbers of positions p with `p % n` equal to the device's index.

    Example:
        >>> own = lambda lens: jaxkv.context_lens(lens, "cp")
        >>> on_two = jax.vmap(own, in_axes=None, axis_size=2, axis_name="cp")  # in place of two devices
        >>> on_two(jnp.array([5, 4, 1])).tolist()
        [[3, 2, 1], [2, 2, 0]]
    """
    return _seen(jnp.asarray(as_indices(seq_lens, lengths=True)) - 1, axis_name)


def context_attention(
    attend: Callable[..., Any],
    query: TokenRows,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    axis_name: AxisName,
    *,
    query_start_loc: ArrayLike | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    heads: MeshAxes = None,
    **options: Any,
) -> Any:
    """Attention where positions are dealt out in turn to the n devices of a mesh axis; within `jax.shard_map`.

    Each device attends over the positions that it has, and one all-gather brings it the others' partial results, which
    `merge_attention` merges. All devices are given the same arguments, and get the same result. Arguments are those of
    `paged_attention`, as if one device had all positions, and blocks of `n * block_size`.

    Args:
        attend: `cache.attend`, or what calls `paged_attention` with these arguments and the device's caches.
        query: `[num_tokens, num_q_heads, head_size]`.
        block_tables: `[num_seqs, max_blocks]`; each block has `n * block_size` positions.
        seq_lens: `[num_seqs]`: tokens of each sequence on all devices together.
        axis_name: The mesh axis of these devices.
        query_start_loc: `[num_seqs + 1]`: where each sequence's rows of query start; None: one row each.
        causal: Whether a query sees positions up to its own only.
        sliding_window: How many of the last positions a query sees: a multiple of n, or None.
        sinks: `[num_q_heads]`: one more logit of each head in the softmax's denominator.
        return_lse: Whether the log-sum-exp is returned, too.
        heads: The mesh axis over which XLA splits heads, where a shard_map leaves one to it: it would gather them for
            the collective. None: heads are not split, or by the shard_map.
        **options: More of attend's, such as `scale`, `soft_cap` and `layer`.

    Returns:
        What `paged_attention` returns.

    Raises:
        ValueError: sliding_window is no multiple of n, or anything that `paged_attention` refuses.

    With causal, a sequence's rows are n sequences to a device: from one row to the n-th after it, the device has one
    position more to see.

    Example:
        >>> cache = jaxkv.PagedKVCache.create(num_blocks=2, block_size=2, num_heads=1, head_size=2, dtype="float32")
        >>> values = jnp.arange(6.0).reshape(3, 1, 2)  # of 3 positions; all logits are 0
        >>> def step(slots):
        ...     own = cache.write(jnp.zeros((3, 1, 2)), values, jaxkv.context_slots(slots, "cp"))
        ...     tables, lens = jnp.array([[1]]), jnp.array([3])
        ...     return jaxkv.context_attention(own.attend, jnp.ones((1, 1, 2)), tables, lens, "cp")
        >>> on_two = jax.vmap(step, in_axes=None, axis_size=2, axis_name="cp")  # in place of two devices
        >>> on_two(jnp.array([4, 5, 6]))[:, 0, 0].tolist()
        [[2.0, 3.0], [2.0, 3.0]]
    """
    parts = lax.axis_size(axis_name)
    if sliding_window is not None:
        options["sliding_window"] = check_window(sliding_window, parts)
    tables, lens = jnp.asarray(as_indices(block_tables)), jnp.asarray(as_indices(seq_lens, lengths=True))
    starts = None if query_start_loc is None else jnp.asarray(as_indices(query_start_loc, lengths=True))
    if starts is None or not causal or parts == 1:
        lens, in_order = context_lens(lens, axis_name), None
    else:
        # A view of heads would have to be turned into rows for this, too.
        query = jnp.asarray(as_array(query))
        order, in_order, starts, last = _in_turns(starts, lens, query.shape[0], parts)
        query, tables, lens = query[order], jnp.repeat(tables, parts, axis=0), _seen(last, axis_name)
    out, lse = attend(query, tables, lens, query_start_loc=starts, causal=causal, return_lse=True, **options)
    if in_order is not None:
        out, lse = out[in_order], lse[in_order]
    outs, lses = _gathered(out, lse, axis_name, heads)
    if sinks is not None:
        sink = jnp.broadcast_to(jnp.asarray(as_array(sinks), jnp.float32), lse.shape)
        outs, lses = jnp.concatenate([outs, jnp.zeros_like(outs[:1])]), jnp.concatenate([lses, sink[None]])
    out, lse = merge_attention(outs, lses)
    return (out, lse) if return_lse else out


def _seen(last: jax.Array, axis_name: AxisName) -> jax.Array:
    """How many positions up to these ones this device has."""
    parts, rank = lax.axis_size(axis_name), lax.axis_index(axis_name).astype(last.dtype)
    return jnp.maximum((last - rank) // parts + 1, 0)


class _Turns(NamedTuple):
    """Rows of sequences, dealt out in turn to n sequences each.

    Attributes:
        order: `[num_tokens]`: the row at each new place.
        places: `[num_tokens]`: the new place of each row.
        starts: `[num_seqs * n + 1]`: where the new sequences start.
        last: `[num_seqs * n]`: the position of each one's last row; -1 or less where there is nothing to see.
    """

    order: jax.Array
    places: jax.Array
    starts: jax.Array
    last: jax.Array


def _in_turns(starts: jax.Array, lens: jax.Array, num_tokens: int, parts: int) -> _Turns:
    """Deals out the rows of each sequence: row i goes to the new sequence `i % parts`, as its row `i // parts`."""
    starts = lax.cummax(starts)
    inside = jnp.clip(starts, 0, num_tokens)
    begins, counts = inside[:-1], jnp.diff(inside)
    first = lens.astype(starts.dtype) - starts[1:] + begins  # positions of the first rows
    full, more = counts // parts, counts % parts  # `more` of the new sequences have a row more than `full`
    turn = jnp.arange(parts, dtype=starts.dtype)[None]
    rows = full[:, None] + (turn < more[:, None]).astype(starts.dtype)
    new_starts = begins[:, None] + turn * full[:, None] + jnp.minimum(turn, more[:, None])
    last = jnp.where(rows > 0, first[:, None] + turn + (rows - 1) * parts, -1)

    row = jnp.arange(num_tokens, dtype=starts.dtype)
    seq = jnp.searchsorted(inside, row, side="right") - 1
    of_none = (seq < 0) | (seq >= counts.shape[0])
    seq = jnp.clip(seq, 0, counts.shape[0] - 1)
    begin, full, more = begins[seq], full[seq], more[seq]
    i = row - begin
    places = new_starts[seq, i % parts] + i // parts
    longer = more * (full + 1)  # rows of the new sequences that have one more
    size = jnp.where(i < longer, full + 1, jnp.maximum(full, 1))
    j = jnp.where(i < longer, i, i - longer)
    order = begin + jnp.where(i < longer, 0, more) + j // size + j % size * parts
    ends = jnp.concatenate([new_starts.reshape(-1), inside[-1:]])
    return _Turns(jnp.where(of_none, row, order), jnp.where(of_none, row, places), ends, last.reshape(-1))


def _gathered(
    out: jax.Array, lse: jax.Array, axis_name: AxisName, heads: MeshAxes = None
) -> tuple[jax.Array, jax.Array]:
    """The partial results of all devices, by one collective: as integers, so that no bit of them changes on the way."""
    bits = jnp.uint32 if out.dtype.itemsize == 4 else jnp.uint16

    def gather(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_lse = lax.bitcast_convert_type(lse, bits)
        of_lse = of_lse[..., None] if of_lse.ndim == lse.ndim else of_lse
        sent = jnp.concatenate([lax.bitcast_convert_type(out, bits), of_lse], axis=-1)
        to = "invarying" if jax.typeof(sent).manual_axis_type.varying else "varying"
        parts = lax.all_gather(sent, axis_name, to=to)
        outs, of_lses = parts[..., : out.shape[-1]], parts[..., out.shape[-1] :]
        of_lses = of_lses if bits == jnp.uint16 else of_lses[..., 0]
        return lax.bitcast_convert_type(outs, out.dtype), lax.bitcast_convert_type(of_lses, jnp.float32)

    if heads is not None:
        names = {heads} if isinstance(heads, str) else set(heads)
        split, parts = P(None, heads), P(None, None, heads)
        gather = jax.shard_map(gather, in_specs=(split, split), out_specs=(parts, parts), axis_names=names)
    return gather(out, lse)
