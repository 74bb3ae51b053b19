"""Launch plans of `copy_blocks` and `zero_blocks`."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.blocks import BlockArray, Blocks
from kvcore.formats import FLOATS
from kvcore.plan.kernel import EXACT, KernelPlan, Target
from kvcore.plan.rows import plan_warps, power_of_two

FEW_PAIRS, MANY_PAIRS = 64, 1024
"""Up to FEW_PAIRS, programs compare all at once. From more than MANY_PAIRS on, a kernel of its own finds once what they
have to do with each other.

Fewer are compared anew by the program of every slice: these are 8 KiB, of 32 that a program moves, in the L2 cache and
while other programs copy. A launch more would take 2 µs.
"""

ARRAYS = ("first_ptr", "second_ptr", "third_ptr", "fourth_ptr")
"""Names of the kernels' pointers to the cache. All but the first may be None."""

SCALARS = {"n": "i32", "num_blocks": "i64"}
"""Run-time integers that follow the pointers, and their types. Of `nodes`, they come before nodes_ptr."""


class BlockRows(NamedTuple):
    """The blocks of one array, in words. A constexpr of the kernels.

    A block is rows of `run` words side by side. Axes without gaps between their elements are described as one.
    """

    word: int  # bytes of a word
    words: int  # of a block
    run: int
    sizes: tuple[int, ...]  # of the axes of rows, fastest first
    strides: tuple[int, ...]  # of these axes
    block_stride: int
    batch_stride: int  # from one item of a batch to the next
    first_slice: int  # the number of this array's first slice among those of all
    slices: int
    wide: bool  # whether offsets within a block need 64 bits


class IndexSteps(NamedTuple):
    """Strides of pairs, or of blocks. A constexpr of the kernels."""

    batch: int
    pair: int  # from one pair to the next, or from one block
    column: int  # from source to destination


class BlocksPlan(NamedTuple):
    """How to launch a call.

    Attributes:
        kernel: What copies, or fills with zeros.
        nodes: What finds out before how many pairs depend on each other; None where each program does it itself.
        slices: Programs that share a block.
        rows: Pairs of a program of `nodes`.
    """

    kernel: KernelPlan
    nodes: KernelPlan | None
    slices: int
    rows: int

    def grid(self, n: int, batch: int = 1) -> tuple[int, int, int]:
        """Programs along each axis, for n pairs or blocks of each item of a batch."""
        return self.slices * n * batch, 1, 1

    def nodes_grid(self, n: int, batch: int = 1) -> tuple[int, int, int]:
        """The same for `nodes`."""
        return -(-n // self.rows), batch, 1


def pairs_class(n: int) -> int:
    """0 for few pairs, 2 for many, else 1: calls of one class have one plan."""
    return 2 if n > MANY_PAIRS else int(n > FEW_PAIRS)


def index_name(call: Blocks) -> str:
    """Name of the pointer to pairs, or to blocks, which follows those to the arrays."""
    return "pairs_ptr" if call.copies else "blocks_ptr"


def pointers(call: Blocks) -> tuple[str, ...]:
    """Names of the kernel's pointers, in order."""
    return (*ARRAYS, index_name(call), *(("nodes_ptr",) if call.copies else ()))


def arguments(call: Blocks, arrays: Sequence[Any], indices: Any, nodes: Any, n: int) -> list[Any]:
    """All that the kernel is launched with, in its order.

    Args:
        call: What is done.
        arrays: Caches and scale caches.
        indices: Pairs or blocks.
        nodes: What the plan's kernel `nodes` has found; None without.
        n: How many pairs or blocks there are, of one item of a batch.
    """
    padded = [*arrays, *[None] * (len(ARRAYS) - len(arrays))]
    return [*padded, indices, *((nodes,) if call.copies else ()), n, call.num_blocks]


@lru_cache(maxsize=4096)
def plan_blocks(call: Blocks, target: Target, aligned: tuple[bool, ...] | None = None) -> BlocksPlan:
    """The plan for a call on a target.

    Args:
        call: From `kvcore.contract.blocks.check_blocks`. Of the number of pairs only the class counts.
        target: What to compile for.
        aligned: Of each array, whether it begins at a multiple of 16 bytes; None: all do.
    """
    interpreted = target.backend == "interpret"
    tile_bytes, tiles = (65536, 1) if interpreted else (8192, 2)  # a program costs milliseconds there
    arrays, slices = [], 0
    for array, has_words in zip(call.arrays, aligned or (True,) * len(call.arrays), strict=True):
        arrays += rows_of([array], has_words, call.batched)
    word = max(rows.word for rows in arrays)
    tile = power_of_two(min(tile_bytes // word, max(rows.words for rows in arrays)))
    for i, rows in enumerate(arrays):
        arrays[i] = rows._replace(first_slice=slices, slices=-(-rows.words // (tile * tiles)))
        slices += arrays[i].slices
    constexprs: dict[str, Any] = dict.fromkeys(name.removesuffix("_ptr").upper() for name in ARRAYS)
    constexprs |= zip(constexprs, arrays, strict=False)
    steps = steps_of(call.indices, call.batched)
    constexprs |= {"S": steps, "SLICES": slices}
    n, nodes, rows_of_nodes = call.indices.shape[call.batched], None, 8
    if call.copies:
        constexprs["SCAN"] = FEW_PAIRS if pairs_class(n) == 0 else MANY_PAIRS
        if pairs_class(n) == 2:
            nodes = KernelPlan(
                module="blocks",
                name="find_nodes_kernel",
                num_warps=4,
                scalars=SCALARS,
                constexprs={"S": steps, "SCAN": MANY_PAIRS if interpreted else 256, "ROWS": rows_of_nodes},
                options=EXACT,
            )
    kernel = KernelPlan(
        module="blocks",
        name="copy_blocks_kernel" if call.copies else "zero_blocks_kernel",
        num_warps=min(4, plan_warps(tile * word, target)),
        scalars=SCALARS,
        constexprs=constexprs | {"TILES": tiles, "TILE": tile},
        # What walks from pair to pair may spill: it is rare, and the more programs are there, the more copy.
        options=EXACT | ({"maxnreg": 64} if call.copies and target.backend == "cuda" else {}),
    )
    return BlocksPlan(kernel, nodes, slices, rows_of_nodes)


def rows_of(arrays: Sequence[BlockArray], aligned: bool, batched: bool) -> list[BlockRows]:
    """The blocks of arrays that have the same axes, in the same words, without slices.

    Args:
        arrays: One, or two between which blocks are copied.
        aligned: Whether all begin at a multiple of 16 bytes.
        batched: Whether they have a batch in front.
    """
    first = arrays[0]
    itemsize = FLOATS[first.dtype].bits // 8 if first.dtype in FLOATS else 1
    inside = [
        (tuple(array.steps[i] for array in arrays), size)
        for i, size in enumerate(first.shape)
        if size > 1 and i != first.axis and not (batched and i == 0)
    ]
    ones = (1,) * len(arrays)
    merged: list[tuple[tuple[int, ...], int]] = [(ones, 1)]  # strides and sizes, fastest first
    for steps, size in sorted(inside):
        last_steps, last_size = merged[-1]
        if steps == tuple(step * last_size for step in last_steps):
            merged[-1] = (last_steps, last_size * size)
        else:
            merged.append((steps, size))
    (_, run), *rows = merged
    outside = [(array.steps[array.axis], array.steps[0] if batched else 0) for array in arrays]
    word = itemsize
    if aligned:
        strides = [step for steps, _ in rows for step in steps]
        word = gcd(8, itemsize * gcd(run, *strides, *(step for steps in outside for step in steps)))
    per_word = word // itemsize
    run, words = run // per_word, prod(size for _, size in merged) // per_word
    reach = max(run + sum((size - 1) * steps[i] // per_word for steps, size in rows) for i in range(len(arrays)))
    return [
        BlockRows(
            word, words, run, tuple(size for _, size in rows), tuple(steps[i] // per_word for steps, _ in rows),
            block_stride // per_word, batch_stride // per_word, first_slice=0, slices=0,
            wide=max(reach, words) >= 2**31,
        )
        for i, (block_stride, batch_stride) in enumerate(outside)
    ]  # fmt: skip


def steps_of(indices: ArraySpec, batched: bool) -> IndexSteps:
    """The strides of pairs, or of blocks."""
    if 0 in indices.shape:  # nothing has steps, and Triton 3.6 cannot compile a kernel without any
        return IndexSteps(0, 2, 1)
    batch, (pair, *column) = (indices.steps[0], indices.steps[1:]) if batched else (0, indices.steps)
    return IndexSteps(batch, pair, *(column or (0,)))
