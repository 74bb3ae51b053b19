"""Copy blocks of a cache to other blocks of it, or fill blocks with zeros.

A program moves one slice of one pair's block: some words of one array, layers and heads and all else among them. The
words are integers, the widest that the arrays' shapes and addresses allow.

All blocks are to be read before one is written, and programs do not wait for each other. So pairs that depend on each
other are one program's, for each slice. What a pair writes others may read, its *children*; what it reads another may
write, its *parent*:

    pairs      1 → 2,  2 → 3,  2 → 4,  7 → 8                   5 → 6,  6 → 5
    parents    1 → 2  is that of  2 → 3  and of  2 → 4         each is the other's

Only the last of several pairs with one destination counts; the others are *dead*. Then a pair has one parent at most,
and pairs that depend on each other are a tree below a pair without a parent, or hang below a circle. That pair, or one
of the circle, owns them all: its program reads its own source, then walks what is below and copies, children first,
and at last stores what it had read. Most pairs have neither parent nor children: their programs read and store.

R is kvcore.plan.blocks.BlockRows of one array.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .block_words import as_words, word_offsets
from .reduce import maximum, minimum


class Pairs(NamedTuple):
    """All pairs of a call, or of one item of a batch."""

    pairs_ptr: tl.tensor
    nodes_ptr: tl.tensor
    n: tl.tensor
    num_blocks: tl.tensor


class Node(NamedTuple):
    """A pair among all. Of a program with ROWS pairs at once, each `[ROWS]`; else scalars."""

    source: tl.tensor
    target: tl.tensor
    live: tl.tensor  # whether it is neither skipped nor dead
    parent: tl.tensor  # the live pair that writes source, or -1
    child: tl.tensor  # the first pair that reads target, or -1
    sibling: tl.tensor  # the next pair that reads source, or -1


@triton.jit
def _load_pair(pairs, i, S: tl.constexpr):
    """Source, destination, and whether there is something to copy."""
    at, mask = i.to(tl.int64) * S.pair, i < pairs.n
    source = tl.load(pairs.pairs_ptr + at, mask=mask, other=-1).to(tl.int64)
    target = tl.load(pairs.pairs_ptr + at + S.column, mask=mask, other=-1).to(tl.int64)
    exists = (source >= 0) & (source < pairs.num_blocks) & (target >= 0) & (target < pairs.num_blocks)
    return source, target, exists & (source != target)


@triton.jit
def _find_nodes(pairs, i, S: tl.constexpr, SCAN: tl.constexpr):
    """The nodes of pairs i, `[ROWS]`: each is compared with all pairs, SCAN at a time."""
    source, target, exists = _load_pair(pairs, i, S)
    none = tl.full([i.shape[0], SCAN], -1, tl.int32)
    last, parent = none, none  # which writes target, and which source
    child, sibling = none + 1 + pairs.n, none + 1 + pairs.n
    for first in range(0, pairs.n, SCAN):
        j = first + tl.arange(0, SCAN)
        from_, to, other_exists = _load_pair(pairs, j, S)
        j, from_, to, other_exists = j[None, :], from_[None, :], to[None, :], other_exists[None, :]
        last = tl.maximum(last, tl.where(other_exists & (to == target[:, None]), j, -1))
        parent = tl.maximum(parent, tl.where(other_exists & (to == source[:, None]), j, -1))
        child = tl.minimum(child, tl.where(other_exists & (from_ == target[:, None]), j, pairs.n))
        later = other_exists & (from_ == source[:, None]) & (j > i[:, None])
        sibling = tl.minimum(sibling, tl.where(later, j, pairs.n))
    child, sibling = minimum(child, 1), minimum(sibling, 1)
    return Node(
        source, target, exists & (maximum(last, 1) == i), maximum(parent, 1),
        tl.where(child < pairs.n, child, -1), tl.where(sibling < pairs.n, sibling, -1),
    )  # fmt: skip


@triton.jit
def _is_alone(pairs, i, S: tl.constexpr, SCAN: tl.constexpr):
    """Whether pair i, which exists, has nothing to do with any other, SCAN of which are looked at at a time."""
    source, target, _ = _load_pair(pairs, i, S)
    met = tl.full([SCAN], 0, tl.int32)
    for first in range(0, pairs.n, SCAN):
        j = first + tl.arange(0, SCAN)
        from_, to, exists = _load_pair(pairs, j, S)
        meets = (from_ == target) | (to == source) | ((to == target) & (j != i))
        met = met | (exists & meets).to(tl.int32)
    return maximum(met, 0) == 0


@triton.jit
def _node(pairs, i, S: tl.constexpr, SCAN: tl.constexpr):
    """The node of pair i: as it was stored, or found now."""
    if pairs.nodes_ptr is None:
        # Of the pairs that depend on each other there are few: registers count more.
        found = _find_nodes(pairs, i + tl.full([1], 0, tl.int32), S, SCAN if SCAN < 128 else 128)
        node = Node(
            maximum(found.source, 0), maximum(found.target, 0), maximum(found.live.to(tl.int32), 0) != 0,
            maximum(found.parent, 0), maximum(found.child, 0), maximum(found.sibling, 0),
        )  # fmt: skip
    else:
        source, target, exists = _load_pair(pairs, i, S)
        at = pairs.nodes_ptr + i.to(tl.int64) * 4
        node = Node(source, target, exists & (tl.load(at) != 0), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    return node


@triton.jit
def _rank(i):
    """A number that is another for each pair, in an order that has nothing to do with that of the pairs."""
    return i * -1640531527  # modulo 2³²: an odd factor maps no two to one


@triton.jit
def _closes_circle(pairs, i, parent, S: tl.constexpr, SCAN: tl.constexpr):
    """Whether pair i is the one of a circle that owns what hangs on it: that with the highest rank.

    Up the parents until one has a higher rank, which takes few steps on average, however long the way is.
    """
    at, mark, steps = parent, parent * 0 - 1, parent * 0
    while (at >= 0) & (at != i) & (at != mark) & (_rank(at) < _rank(i)):
        if (steps & (steps - 1)) == 0:
            mark = at  # met again, the way is in a circle without i
        at = _node(pairs, at, S, SCAN).parent
        steps += 1
    return at == i


@triton.jit
def _copy_below(words, offset, mask, pairs, i, child, R: tl.constexpr, S: tl.constexpr, SCAN: tl.constexpr):
    """Copies words for all pairs below pair i, each after its children.

    Barriers, because threads may store words that others have loaded before.
    """
    at, down = child, child >= 0
    while down | (at != i):
        node = _node(pairs, at, S, SCAN)
        own = node.live & (at != i)  # in a circle, i is below itself
        if down & own & (node.child >= 0):
            at = node.child
        else:
            if own:
                tl.debug_barrier()
                x = tl.load(words + node.source * R.block_stride + offset, mask=mask)
                tl.debug_barrier()
                tl.store(words + node.target * R.block_stride + offset, x, mask=mask)
            down = node.sibling >= 0
            at = tl.where(down, node.sibling, node.parent)
    tl.debug_barrier()


@triton.jit
def _copy_slice(
    array_ptr, part, batch, pairs, i, node, R: tl.constexpr, S: tl.constexpr, SCAN: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Copies a slice for pair i, and for all below it, if the slice is of this array."""
    if (part >= R.first_slice) & (part < R.first_slice + R.slices):
        words = as_words(array_ptr, batch, R)
        begin = (part - R.first_slice).to(tl.int64 if R.wide else tl.int32) * (TILES * TILE)
        for tile in range(TILES):
            index = begin + tile * TILE + tl.arange(0, TILE)
            mask, offset = index < R.words, word_offsets(index, R)
            x = tl.load(words + node.source * R.block_stride + offset, mask=mask)
            if node.child >= 0:
                _copy_below(words, offset, mask, pairs, i, node.child, R, S, SCAN)
            tl.store(words + node.target * R.block_stride + offset, x, mask=mask)


@triton.jit
def find_nodes_kernel(
    pairs_ptr,   # [batch, n, 2] int32 or int64
    n,           # pairs of one item of the batch
    num_blocks,  # of the cache
    nodes_ptr,   # [batch, n, 4] int32, written: live, parent, child, sibling
    S: tl.constexpr,     # kvcore.plan.blocks.IndexSteps of pairs
    SCAN: tl.constexpr,  # pairs to compare with at a time
    ROWS: tl.constexpr,  # pairs of a program
):  # fmt: skip
    """Store the nodes of many pairs, which every slice would find anew otherwise."""
    batch, i = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    nodes_ptr = nodes_ptr + batch.to(tl.int64) * n * 4
    pairs = Pairs(pairs_ptr + batch.to(tl.int64) * S.batch, nodes_ptr, n, num_blocks)
    node = _find_nodes(pairs, i, S, SCAN)
    at, mask = pairs.nodes_ptr + i.to(tl.int64) * 4, i < n
    tl.store(at, node.live.to(tl.int32), mask=mask)
    tl.store(at + 1, node.parent, mask=mask)
    tl.store(at + 2, node.child, mask=mask)
    tl.store(at + 3, node.sibling, mask=mask)


@triton.jit
def copy_blocks_kernel(
    first_ptr,   # an array of the cache
    second_ptr,  # another one, or None, like the next
    third_ptr,
    fourth_ptr,
    pairs_ptr,   # [batch, n, 2] int32 or int64: source and destination
    nodes_ptr,   # [batch, n, 4] int32, from find_nodes_kernel; None: they are found here
    n,           # pairs of one item of the batch
    num_blocks,  # of the cache
    FIRST: tl.constexpr,   # kvcore.plan.blocks.BlockRows of the first array
    SECOND: tl.constexpr,  # … of the second, or None, like the next
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    S: tl.constexpr,       # kvcore.plan.blocks.IndexSteps of pairs
    SLICES: tl.constexpr,  # of all arrays
    SCAN: tl.constexpr,    # pairs to compare with at a time
    TILES: tl.constexpr,   # tiles of a slice
    TILE: tl.constexpr,    # words of a tile
):  # fmt: skip
    """Copy blocks to blocks."""
    program = tl.program_id(0)
    part, i, batch = program % SLICES, program // SLICES % n, program // SLICES // n
    if nodes_ptr is not None:
        nodes_ptr = nodes_ptr + batch.to(tl.int64) * n * 4
    pairs = Pairs(pairs_ptr + batch.to(tl.int64) * S.batch, nodes_ptr, n, num_blocks)
    source, target, exists = _load_pair(pairs, i, S)
    if exists:
        none = i * 0 - 1
        node = Node(source, target, exists, none, none, none)
        if nodes_ptr is None:
            if not _is_alone(pairs, i, S, SCAN):
                node = _node(pairs, i, S, SCAN)
        else:
            node = _node(pairs, i, S, SCAN)
        if node.live:
            owns = node.parent < 0
            if node.parent >= 0:
                owns = _closes_circle(pairs, i, node.parent, S, SCAN)
            if owns:
                _copy_slice(first_ptr, part, batch, pairs, i, node, FIRST, S, SCAN, TILES, TILE)
                if SECOND is not None:
                    _copy_slice(second_ptr, part, batch, pairs, i, node, SECOND, S, SCAN, TILES, TILE)
                if THIRD is not None:
                    _copy_slice(third_ptr, part, batch, pairs, i, node, THIRD, S, SCAN, TILES, TILE)
                if FOURTH is not None:
                    _copy_slice(fourth_ptr, part, batch, pairs, i, node, FOURTH, S, SCAN, TILES, TILE)


@triton.jit
def _zero_slice(array_ptr, part, batch, block, R: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """Fills a slice of a block with zeros, if it is of this array."""
    if (part >= R.first_slice) & (part < R.first_slice + R.slices):
        words = as_words(array_ptr, batch, R)
        begin = (part - R.first_slice).to(tl.int64 if R.wide else tl.int32) * (TILES * TILE)
        for tile in range(TILES):
            index = begin + tile * TILE + tl.arange(0, TILE)
            zeros = tl.full([TILE], 0, words.dtype.element_ty)
            tl.store(words + block * R.block_stride + word_offsets(index, R), zeros, mask=index < R.words)


@triton.jit
def zero_blocks_kernel(
    first_ptr,   # an array of the cache
    second_ptr,  # another one, or None, like the next
    third_ptr,
    fourth_ptr,
    blocks_ptr,  # [batch, n] int32 or int64
    n,           # blocks of one item of the batch
    num_blocks,  # of the cache
    FIRST: tl.constexpr,   # kvcore.plan.blocks.BlockRows of the first array
    SECOND: tl.constexpr,  # … of the second, or None, like the next
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    S: tl.constexpr,       # kvcore.plan.blocks.IndexSteps of blocks
    SLICES: tl.constexpr,  # of all arrays
    TILES: tl.constexpr,   # tiles of a slice
    TILE: tl.constexpr,    # words of a tile
):  # fmt: skip
    """Fill blocks with zeros."""
    program = tl.program_id(0)
    part, i, batch = program % SLICES, program // SLICES % n, program // SLICES // n
    block = tl.load(blocks_ptr + batch.to(tl.int64) * S.batch + i.to(tl.int64) * S.pair).to(tl.int64)
    if (block >= 0) & (block < num_blocks):
        _zero_slice(first_ptr, part, batch, block, FIRST, TILES, TILE)
        if SECOND is not None:
            _zero_slice(second_ptr, part, batch, block, SECOND, TILES, TILE)
        if THIRD is not None:
            _zero_slice(third_ptr, part, batch, block, THIRD, TILES, TILE)
        if FOURTH is not None:
            _zero_slice(fourth_ptr, part, batch, block, FOURTH, TILES, TILE)
