"""Checks of calls whose positions, heads or blocks are on several devices."""

from collections.abc import Sequence
from typing import Any

from kvcore.contract.read import LONGEST
from kvcore.integers import integer
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis


def check_window(sliding_window: int, parts: int) -> int | None:
    """The part of a sliding window that each of `parts` devices has, which take positions in turn; None: all.

    Raises:
        ValueError: they would not have the same number.
        TypeError: it is no integer.
    """
    window = integer("sliding_window", sliding_window, least=1)
    if window >= LONGEST:
        return None
    if window % parts:
        raise ValueError(f"sliding_window must be a multiple of the {parts} devices that share positions, got {window}")
    return window // parts


# ---- what a call's tensors have of a cache that is split


def check_divided(name: str, number: int, ranks: int) -> None:
    """Raises a ValueError unless ranks can divide a number, of heads."""
    if number % ranks:
        raise ValueError(f"{name} must be a multiple of the {ranks} devices over which heads are split, got {number}")


def split_axis_error(axis: Axis, over: Any) -> ValueError:
    """The error for a cache that is split along another axis than heads."""
    return ValueError(
        f"a cache may be split over heads only, got axis {' '.join(axis)} split over {over}; a rank's own blocks are "
        "plain tensors"
    )


def split_alike_error(*got: Any) -> ValueError:
    """The error for key and value caches that are not split alike."""
    return ValueError(f"key_cache and value_cache must be split alike over heads, got {' and '.join(map(str, got))}")


def source_split_error(wanted: Any, got: Any) -> ValueError:
    """The error for a cache that moves into one whose heads are split in another way, where it is split itself."""
    return ValueError(f"source must be split over heads as destination, over {wanted}, got {got}")


def region_error(layout: CacheLayout, over: Any) -> ValueError:
    """The error for a cache of nvfp4 whose heads cannot be split, as blocks have all elements before all scales."""
    return ValueError(
        f"a cache of nvfp4 may be split over heads only where its layout has them before block, as in "
        f"'head block slot dim', got '{layout}' split over {over}"
    )


def split_interpreter_error() -> ValueError:
    """The error for the interpreter in a program that XLA splits over devices."""
    return ValueError(
        "backend 'interpret' must have one device, or be within a shard_map over all axes of the mesh, got a program "
        "that XLA splits over several"
    )


def no_dtensor_error(name: str) -> TypeError:
    """The error for a plain tensor that is written, or is a cache, where others are DTensors."""
    return TypeError(f"{name} must be a DTensor, as other arguments are, got a plain tensor")


def placement_error(name: str, placement: Any) -> ValueError:
    """The error for a cache that is neither split nor whole."""
    return ValueError(f"{name} must be split over heads or replicated, got {placement}")


def written_error(name: str, wanted: Any, got: Any) -> ValueError:
    """The error for a tensor that is written, and split in another way than the rest of the call."""
    return ValueError(f"{name} must have placements {wanted}, or what is written would be lost, got {got}")


def meshes_error(got: Sequence[str]) -> ValueError:
    """The error for tensors on several meshes."""
    return ValueError(f"all DTensors must be on one mesh, got {' and '.join(dict.fromkeys(got))}")
