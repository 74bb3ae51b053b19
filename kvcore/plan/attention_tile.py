"""How much of attention a program computes at once. Measured on an H100: see docs/benchmarks.md."""

from typing import NamedTuple

from kvcore.contract.read import Attention
from kvcore.formats import FloatFormat
from kvcore.plan.attention_constants import Tile
from kvcore.plan.kernel import Target
from kvcore.plan.rows import power_of_two

_SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program may have, by compute capability."""

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of the usual GPU of a compute capability. They set how finely positions are split, never what is computed."""


_L2_BYTES = 24 * 2**20
"""Of K and V that programs read over and over: half of an H100's L2 cache, as a multiprocessor is near to one half."""


class TileChoice(NamedTuple):
    """A tile, and how programs share the work in such tiles."""

    tile: Tile
    warps: int  # of a program
    programs: int  # that a multiprocessor is given before positions are no longer split
    positions: int  # that a split takes at least: with fewer, it costs more to merge than it gains


def choose_tile(call: Attention, target: Target, compute: FloatFormat) -> TileChoice:
    """The tile, and how programs share the work."""
    _, q_heads, head_size = call.query.shape
    widest = max(head_size, call.cache.head_size_v)
    # Query rows of a sequence on average. Where they are few, memory is the limit; where many, the tensor cores.
    average = q_heads // call.cache.extents.num_heads * _tokens(call)
    most = 128 if widest <= 256 else 64
    rows = min(most, max(16, power_of_two(average)))
    if target.backend == "interpret":
        return TileChoice(Tile(rows, 64, 1), 1, 2, 256)  # a tile costs milliseconds, an element next to nothing
    if compute.bits == 32:  # no tensor cores, so that nothing is lost
        tile, warps = Tile(min(rows, 32), 32, 4), 4
    elif widest > 256:
        tile, warps = Tile(rows, 64, 2), 8
    elif rows >= 64:
        tile, warps = (Tile(128, 64, 3), 8) if widest <= 128 else (Tile(64, 32, 3), 4)
    elif widest <= 128 and rows == 16:
        return _choose_decode_tile(call, target, compute, 128 if average <= 8 else 256)
    else:
        tile, warps = Tile(rows, 64 if widest <= 128 else 32, 4), 4
    return TileChoice(_fit(tile, call, target, compute), warps, 2, 256)


def many_rows(call: Attention) -> bool:
    """Whether a sequence has so many query rows on average that the widest tiles are taken."""
    return _tokens(call) * call.query.shape[1] // call.cache.extents.num_heads > 32


def choose_heads(call: Attention) -> int:
    """KV heads whose programs are neighbours: those whose K and V may stay in the L2 cache, where rows are many.

    Where rows are few, K and V are read once: then all heads, which lie side by side.
    """
    extents = call.cache.extents
    if not many_rows(call):
        return extents.num_heads
    longest = call.block_tables.shape[1] * extents.block_size
    head_bytes = max(longest * (call.query.shape[2] + call.cache.head_size_v) * call.cache.format.bits // 8, 1)
    most = max(1, min(_L2_BYTES // head_bytes, extents.num_heads))
    return next(heads for heads in range(most, 0, -1) if extents.num_heads % heads == 0)


def _choose_decode_tile(call: Attention, target: Target, compute: FloatFormat, positions: int) -> TileChoice:
    """What `choose_tile` chooses where rows are few: as much of the cache is loaded at a time as there is room for."""
    bits, multiprocessors = call.cache.format.bits, _multiprocessors(target)
    if bits == 4:
        return TileChoice(_fit(Tile(16, 128, 2), call, target, compute), 4, 3, positions)
    # A pipeline of two stages leaves room for three programs on a multiprocessor; one of three, for two, or for one
    # where elements have 16 bits. Many programs with much to do each are better served by the deeper one: fewer at a
    # time leave less over for the last. Few programs are, too: positions are split until each has a multiprocessor.
    narrow = _position_bytes(call) <= 256
    programs = call.block_tables.shape[0] * call.cache.extents.num_heads
    long = call.block_tables.shape[1] * call.cache.extents.block_size >= 2048
    deep = long and programs > 3 * multiprocessors
    if narrow:
        tile, share = Tile(16, 128, 4 if deep else 3), 2
    else:
        tile, share = Tile(16, 128, 3 if deep or programs <= multiprocessors else 2), 1
    if _fit(tile._replace(stages=3), call, target, compute).stages < 3:  # a small GPU, and none that was measured
        tile, share = (Tile(16, 64, 4) if bits == 16 else Tile(16, 128, 4)), 2
    tile = _fit(tile, call, target, compute)
    # With more threads than positions, Triton would not load block tables ahead.
    return TileChoice(tile, 2 if bits == 16 and tile.positions < 128 else 4, share, positions)


def _tokens(call: Attention) -> int:
    """Tokens of a sequence in query, on average."""
    return -(-call.query.shape[0] // max(call.block_tables.shape[0], 1))


def count_programs(call: Attention, rows: int) -> int:
    """Programs that have something to do, without splits, if sequences have the same number of tokens in query."""
    num_seqs, heads = call.block_tables.shape[0], call.cache.extents.num_heads
    return num_seqs * -(-_tokens(call) * call.query.shape[1] // heads // rows) * heads


def _fit(tile: Tile, call: Attention, target: Target, compute: FloatFormat) -> Tile:
    """The tile, or what of it fits in shared memory: fewer stages, then fewer positions, then fewer rows."""
    cache, head_size = call.cache, call.query.shape[2]
    cuda = target.backend == "cuda" and isinstance(target.arch, int)
    budget = 1024 * (_SHARED_MEMORY.get(int(target.arch), 99) if cuda else 64)
    if not cuda or int(target.arch) < 90:
        budget -= budget // 8  # weights, too, go through it to the tensor cores
    row_bytes = sum(cover(head_size)) * compute.bits // 8
    position_bytes = _position_bytes(call)
    # Elements that are multiplied by their scales go back there, in the format of the products, for K and for V.
    scaled_bytes = 2 * row_bytes if cache.rope is not None else 0
    rows, positions, stages = tile
    while rows * row_bytes + positions * (stages * position_bytes + scaled_bytes) > budget:
        if stages > 2 or (stages == 2 and positions == 16):
            stages -= 1
        elif positions > 16:
            positions //= 2
        elif rows > 16:
            rows //= 2
        else:
            break  # none is smaller
    return Tile(rows, positions, stages)


def _position_bytes(call: Attention) -> int:
    """Shared memory of a position of K and V."""
    cache = call.cache
    columns = sum(cover(call.query.shape[2])) + (0 if cache.layout.latent else power_of_two(cache.head_size_v))
    return columns * cache.format.bits // 8


def _multiprocessors(target: Target) -> int:
    return _MULTIPROCESSORS.get(target.arch if isinstance(target.arch, int) else 0, 108)


def choose_splits(call: Attention, choice: TileChoice, target: Target) -> int:
    """Splits of the positions: enough to keep all multiprocessors busy."""
    longest = call.block_tables.shape[1] * call.cache.extents.block_size
    most = -(-longest // max(choice.positions, choice.tile.positions))
    if target.backend == "interpret":
        return min(2, most)
    wanted = choice.programs * _multiprocessors(target)
    return max(1, min(wanted // max(count_programs(call, choice.tile.rows), 1), most))


_START_TILES = 2
"""Tiles that a program of the MLA kernel for Hopper could take in the time that it needs to start and to end."""

_PART_TILES = 3
"""Tiles that it could take in the time that its partial result needs to be written, and to be merged."""


def balance_splits(call: Attention, choice: TileChoice, target: Target) -> int:
    """Splits of the positions that leave no multiprocessor idle for long, where each has one program at a time."""
    longest = call.block_tables.shape[1] * call.cache.extents.block_size
    tiles = -(-longest // choice.tile.positions)
    programs, multiprocessors = count_programs(call, choice.tile.rows), _multiprocessors(target)
    most = max(1, min(-(-longest // max(choice.positions, choice.tile.positions)), multiprocessors))

    def duration(splits: int) -> int:
        turns = -(-programs * splits // multiprocessors)
        return turns * (-(-tiles // splits) + _START_TILES + _PART_TILES * (splits > 1))

    return min(range(1, most + 1), key=duration)


def cover(words: int) -> tuple[int, int]:
    """The powers of two that cover a head of K: the main one, and the rest where a second one saves columns, or 0."""
    whole = max(16, power_of_two(words))
    main = whole // 2
    rest = max(16, power_of_two(words - main))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)
