"""Patterns of layouts: what they may say, and the ones that have a name."""

import re
from collections.abc import Sequence

AXES = ("layer", "block", "slot", "head", "kv", "dim", "dim/x", "x", "k+v", "latent")
"""Names of axes."""

_AXIS = re.compile(r"\(\s*([^()]*?)\s*\)|(\S+)")

Axis = tuple[str, ...]
"""One axis of an array: a single name, or `kv` and another name in the order in which they vary."""

CONSTANTS = {
    "NHD": "block slot head dim",
    "HND": "block head slot dim",
    "HEAD_MAJOR": "block head dim/x slot x, block head dim slot",
    "PALLAS": "head block slot dim",
    "KV_NHD": "kv block slot head dim",
    "BLOCK_KV_NHD": "block kv slot head dim",
    "BLOCK_KV_HND": "block kv head slot dim",
    "PACKED_NHD": "block slot head k+v",
    "PACKED_HND": "block head slot k+v",
    "INTERLEAVED": "block slot (head kv) dim",
    "MLA": "block slot latent",
}
"""Names and patterns of the layouts in use."""


def parse(pattern: str) -> tuple[Axis, ...]:
    """Axes of one array's pattern, slowest first."""
    return tuple(tuple((group or name).split()) for group, name in _AXIS.findall(pattern))


def spell(axes: Sequence[Axis]) -> str:
    """The pattern of these axes, with single spaces."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def validate(pattern: str, arrays: tuple[tuple[Axis, ...], ...]) -> None:
    """Raises unless a pattern, split into the axes of its arrays, describes a cache.

    Raises:
        ValueError: an axis is unknown, missing, or named twice; the message names it.
    """
    if len(pattern.split(",")) > 2:
        raise ValueError(f"layout must have one pattern or two, got {len(pattern.split(','))}: '{pattern}'")
    for axes in arrays:
        flat = [name for axis in axes for name in axis]
        for name in flat:
            if name not in AXES:
                raise ValueError(f"layout '{pattern}' has an unknown axis '{name}'; known are {', '.join(AXES)}")
            if flat.count(name) > 1:
                raise ValueError(f"layout '{pattern}' must name axis {name} once, got it {flat.count(name)} times")
        for name in ("block", "slot") if "latent" in flat else ("block", "slot", "head"):
            if name not in flat:
                raise ValueError(f"layout '{pattern}' must name axis {name}")
        if "latent" in flat and not {"head", "kv", "k+v", "dim", "dim/x", "x"}.isdisjoint(flat):
            raise ValueError(f"layout '{pattern}' may name only axes layer, block and slot beside latent")
        if sum(name in flat for name in ("dim", "dim/x", "k+v", "latent")) != 1:
            raise ValueError(f"layout '{pattern}' must name exactly one of the axes dim, dim/x, k+v and latent")
        if ("dim/x" in flat) != ("x" in flat):
            raise ValueError(f"layout '{pattern}' must name axes dim/x and x together")
        for name in ("kv", "k+v", "latent"):
            if len(arrays) == 2 and name in flat:
                raise ValueError(f"layout '{pattern}' has two arrays, so neither may have axis {name}")
        if "kv" in flat and "k+v" in flat:
            raise ValueError(f"layout '{pattern}' must name only one of the axes kv and k+v")
        for axis in axes:
            if len(axis) != 1 and (len(axis) != 2 or "kv" not in axis):
                raise ValueError(f"layout '{pattern}' may join only kv with one other axis, got ({' '.join(axis)})")
    if len({"layer" in [name for axis in axes for name in axis] for axes in arrays}) > 1:
        raise ValueError(f"layout '{pattern}' must name axis layer for both arrays or for none")
