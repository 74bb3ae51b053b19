"""How much of attention a program computes at once. Measured on an H100: see docs/benchmarks.md."""

from kvcore.contract.read import Attention
from kvcore.formats import FloatFormat
from kvcore.plan.attention_constants import Tile
from kvcore.plan.kernel import Target
from kvcore.plan.rows import power_of_two

_SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program may have, by compute capability."""

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of the usual GPU of a compute capability. They set how finely positions are split, never what is computed."""


def choose_tile(call: Attention, target: Target, compute: FloatFormat) -> tuple[Tile, int]:
    """The tile, and the warps of a program."""
    tokens, q_heads, head_size = call.query.shape
    widest = max(head_size, call.cache.head_size_v)
    # Query rows of a sequence on average. Where they are few, memory is the limit; where many, the tensor cores.
    average = q_heads // call.cache.extents.num_heads * -(-tokens // max(call.block_tables.shape[0], 1))
    most = 128 if widest <= 256 else 64
    rows = min(most, max(16, power_of_two(average)))
    if target.backend == "interpret":
        return Tile(rows, 64, 1), 1  # a tile costs milliseconds, an element next to nothing
    if compute.bits == 32:  # no tensor cores, so that nothing is lost
        tile, warps = Tile(min(rows, 32), 32, 4), 4
    elif widest > 256:
        tile, warps = Tile(rows, 64, 2), 8
    elif rows >= 64:
        tile, warps = (Tile(128, 64, 3), 8) if widest <= 128 else (Tile(64, 32, 3), 4)
    elif widest <= 128 and rows == 16:
        positions, stages, warps = {16: (64, 4, 2), 8: (128, 4, 4), 4: (128, 2, 4)}[call.cache.format.bits]
        tile = Tile(rows, positions, stages)
    else:
        tile, warps = Tile(rows, 64 if widest <= 128 else 32, 4), 4
    return _fit(tile, call, target, compute), warps


def _fit(tile: Tile, call: Attention, target: Target, compute: FloatFormat) -> Tile:
    """The tile, or what of it fits in shared memory: fewer stages, then fewer positions, then fewer rows."""
    cache, head_size = call.cache, call.query.shape[2]
    cuda = target.backend == "cuda" and isinstance(target.arch, int)
    budget = 1024 * (_SHARED_MEMORY.get(int(target.arch), 99) if cuda else 64)
    if not cuda or int(target.arch) < 90:
        budget -= budget // 8  # weights, too, go through it to the tensor cores
    columns = sum(cover(head_size)) + (0 if cache.layout.latent else power_of_two(cache.head_size_v))
    row_bytes = sum(cover(head_size)) * compute.bits // 8
    position_bytes = columns * cache.format.bits // 8
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


def choose_splits(programs: int, tiles: int, min_tiles: int, target: Target) -> int:
    """Splits of the positions: enough to keep all multiprocessors busy.

    Args:
        programs: Programs without splits.
        tiles: Tiles of positions of the longest sequence that there may be.
        min_tiles: Fewest tiles of a split.
        target: What runs them.
    """
    most = -(-tiles // min_tiles)
    if target.backend == "interpret":
        return min(2, most)
    wanted = 2 * _MULTIPROCESSORS.get(target.arch if isinstance(target.arch, int) else 0, 108)
    return max(1, min(wanted // max(programs, 1), most))


def cover(words: int) -> tuple[int, int]:
    """The powers of two that cover a head of K: the main one, and the rest where a second one saves columns, or 0."""
    whole = max(16, power_of_two(words))
    main = whole // 2
    rest = max(16, power_of_two(words - main))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)
