"""Launch plans of `swap_blocks`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.contract.swap import Swap
from kvcore.plan.blocks import rows_of, steps_of
from kvcore.plan.kernel import EXACT, KernelPlan, Target
from kvcore.plan.rows import plan_warps, power_of_two

ARRAYS = ("first", "second", "third", "fourth")
"""The arrays of a cache, as the kernel's parameters are called after them. All but the first may be None."""

POINTERS = (*(f"{name}_source_ptr" for name in ARRAYS), *(f"{name}_ptr" for name in ARRAYS), "pairs_ptr")
"""The kernel's pointers, in order: to what is read, to what is written, and to pairs."""

SCALARS = {"n": "i32", "num_source": "i64", "num_blocks": "i64"}
"""Run-time integers that follow the pointers, and their types."""


class SwapPlan(NamedTuple):
    """How to launch a call.

    Attributes:
        kernel: What copies.
        slices: Programs that share a block.
    """

    kernel: KernelPlan
    slices: int

    def grid(self, n: int, batch: int = 1) -> tuple[int, int, int]:
        """Programs along each axis, for n pairs of each item of a batch."""
        return self.slices * n * batch, 1, 1


def arguments(call: Swap, source: Sequence[Any], destination: Sequence[Any], pairs: Any, n: int) -> list[Any]:
    """All that the kernel is launched with, in its order.

    Args:
        call: What is done.
        source: Caches and scale caches that are read.
        destination: Those that are written.
        pairs: Blocks of source and of destination.
        n: How many pairs there are, of one item of a batch.
    """
    none = [None] * (len(ARRAYS) - len(source))
    return [*source, *none, *destination, *none, pairs, n, call.num_source, call.num_destination]


@lru_cache(maxsize=4096)
def plan_swap(call: Swap, target: Target, aligned: tuple[bool, ...] | None = None) -> SwapPlan:
    """The plan for a call on a target. It does not depend on the number of pairs.

    A program has little to do, so that many are there at once: what crosses the bus takes a microsecond or two, and
    hundreds of kilobytes must be on their way all the time. Warps access 512 bytes side by side, as wide as can be: the
    bus carries 128 bytes in one piece.

    Args:
        call: From `kvcore.contract.swap.check_swap`.
        target: What to compile for.
        aligned: Of each array, whether source and destination begin at multiples of 16 bytes; None: all do.
    """
    interpreted = target.backend == "interpret"
    tile_bytes, tiles = (65536, 1) if interpreted else (8192, 2)  # a program costs milliseconds there
    both = [
        rows_of([old, new], has_words, call.batched)
        for old, new, has_words in zip(
            call.source, call.destination, aligned or (True,) * len(call.source), strict=True
        )
    ]
    word = max(new.word for _, new in both)
    tile = power_of_two(min(tile_bytes // word, max(new.words for _, new in both)))
    constexprs: dict[str, Any] = dict.fromkeys((*(f"{n}_SOURCE".upper() for n in ARRAYS), *map(str.upper, ARRAYS)))
    slices = 0
    for name, (old, new) in zip(ARRAYS, both, strict=False):
        count = -(-new.words // (tile * tiles))
        constexprs[f"{name}_SOURCE".upper()] = old._replace(first_slice=slices, slices=count)
        constexprs[name.upper()] = new._replace(first_slice=slices, slices=count)
        slices += count
    steps = {"S": steps_of(call.pairs, call.batched), "SLICES": slices, "TILES": tiles, "TILE": tile}
    kernel = KernelPlan(
        module="swap",
        name="swap_blocks_kernel",
        num_warps=min(4, plan_warps(tile * word, target)),
        scalars=SCALARS,
        constexprs=constexprs | steps,
        options=EXACT,
    )
    return SwapPlan(kernel, slices)
