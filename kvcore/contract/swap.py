"""The contract of `swap_blocks`: whole blocks of one cache, copied to blocks of another one of the same layout.

Mostly one of the two is in the host's memory. What lies in a block, and in which format, does not matter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.blocks import BlockArray, BlockArrays, check_arrays
from kvcore.contract.checks import check_devices, check_indices
from kvcore.layout import CacheLayout

HOST = "cpu"
"""The device whose memory is the host's."""

HINT = "; relayout copies between layouts, block sizes and formats"
"""How errors end where caches differ in what a swap cannot change."""


class Swap(NamedTuple):
    """A call that fulfils the contract; hashable, and all that a plan or an implementation needs.

    Attributes:
        source: Caches, then scale caches, that are read.
        destination: Those that are written, with the same axes.
        num_source: Blocks of source.
        num_destination: Blocks of destination.
        pairs: Their spec, `(n, 2)`; with a batch, it is in front.
        batched: Whether there is a batch of both caches, each with pairs of its own.
        layout: Of the caches.
        scale_layout: Of the scale caches; None where there are none.
    """

    source: tuple[BlockArray, ...]
    destination: tuple[BlockArray, ...]
    num_source: int
    num_destination: int
    pairs: ArraySpec
    batched: bool
    layout: CacheLayout
    scale_layout: CacheLayout | None


def check_swap(
    pairs: ArraySpec,
    source: tuple[Sequence[ArraySpec], Sequence[ArraySpec]],
    destination: tuple[Sequence[ArraySpec], Sequence[ArraySpec]],
    layout: str | CacheLayout | None,
    scale_layout: str | CacheLayout | None,
    batched: bool = False,
) -> Swap:
    """Checks the arguments of a call.

    Args:
        pairs: `(n, 2)`.
        source: Caches, and scale caches, that are read.
        destination: Those that are written.
        layout: Of the caches.
        scale_layout: Of the scale caches.
        batched: Whether all arrays have a batch in front.

    Raises:
        ValueError: a shape, a layout or a device does not fit, or elements of an array overlap.
        TypeError: a dtype or a type does not fit.
    """
    check_indices("pairs", pairs, (pairs.shape[0], "n", 2) if batched else ("n", 2))
    counts = [len(caches) + len(scales) for caches, scales in (source, destination)]
    if counts[0] != counts[1]:
        raise ValueError(f"destination must have as many arrays as source, {counts[0]}, got {counts[1]}{HINT}")
    ours = check_arrays("source's ", *source, layout, scale_layout, batched)
    theirs = check_arrays("destination's ", *destination, layout, scale_layout, batched)
    for i, name in enumerate(theirs.names):
        _check_alike(name, i, ours, theirs)
    _check_places(pairs, (*source[0], *source[1]), (*destination[0], *destination[1]), ours, theirs)
    return Swap(
        ours.arrays, theirs.arrays, ours.num_blocks, theirs.num_blocks, pairs, batched, ours.layout, ours.scale_layout
    )


def unpinned_error(name: str, device: Any) -> ValueError:
    """The error for memory of the host that a device cannot reach."""
    return ValueError(
        f"{name} must be in pinned memory, which {device} can reach: Tensor.pin_memory() and "
        "PagedKVCache.create_host() make such, got pageable memory"
    )


def _check_alike(name: str, i: int, source: BlockArrays, destination: BlockArrays) -> None:
    """Checks that array i of destination, which has this name, differs from source's in its blocks at most."""
    wanted, got = source.arrays[i].dtype, destination.arrays[i].dtype
    if wanted != got:
        raise TypeError(f"{name} must have dtype {wanted}, as {source.names[i]}, got {got}{HINT}")
    for axis, size in source.sizes[i].items():
        if axis != "block" and destination.sizes[i][axis] != size:
            raise ValueError(
                f"{name} axis {axis} must have size {size}, as in {source.names[i]}, got "
                f"{destination.sizes[i][axis]}{HINT}"
            )


def _check_places(
    pairs: ArraySpec,
    source: Sequence[ArraySpec],
    destination: Sequence[ArraySpec],
    ours: BlockArrays,
    theirs: BlockArrays,
) -> None:
    """Checks devices: arrays of a cache are on one; of two, one is the host, and pairs are on the other."""
    first, second = source[0], destination[0]
    check_devices([*zip(ours.names, source, strict=True)], ours.names[0], first)
    check_devices([*zip(theirs.names, destination, strict=True)], theirs.names[0], second)
    if first.device != second.device and HOST not in (first.device, second.device):
        raise ValueError(
            f"source and destination must be on one device, or one of them in the host's memory, got {first.device} "
            f"and {second.device}"
        )
    name, home = (ours.names[0], first) if second.device == HOST else (theirs.names[0], second)
    check_devices([("pairs", pairs)], name, home)
