"""Patterns of layouts: what they may say, the ones that have a name, and how they are written as JSON."""

import json
import re
from collections.abc import Sequence
from typing import Any

AXES = ("layer", "block", "slot", "head", "kv", "dim", "dim/x", "x", "k+v", "latent")
"""Names of axes."""

JSON_VERSION = 1
"""Of the JSON of layouts. What version 1 says stays as it is; what it cannot say takes a new one."""

_AXIS = re.compile(r"\(\s*([^()]*?)\s*\)|(\S+)")
_WORD = re.compile(r"[^\s(),]+")  # what may stand for an axis's name in a pattern

Axis = tuple[str, ...]
"""One axis of an array: a single name, or `kv` and another name in the order in which they vary."""

MeshAxes = str | tuple[str, ...] | None
"""What an axis of an array is split over: an axis of a device mesh, by its name, or several, or nothing."""

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

VLLM = {
    "LBHNC": "layer block head slot k+v",
    "LBNHC": "layer block slot head k+v",
    "LHBNC": "layer head block slot k+v",
    "BLHNC": "block layer head slot k+v",
    "BLNHC": "block layer slot head k+v",
    "BHLNC": "block head layer slot k+v",
}
"""vLLM's names of its layouts, and their patterns: layers, blocks, heads, slots (N), and K and V side by side (C)."""


def parse(pattern: str) -> tuple[Axis, ...]:
    """Axes of one array's pattern, slowest first."""
    return tuple(tuple((group or name).split()) for group, name in _AXIS.findall(pattern))


def spell(axes: Sequence[Axis]) -> str:
    """The pattern of these axes, with single spaces."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def to_json(arrays: Sequence[Sequence[Axis]]) -> str:
    """The JSON of a layout, which `CacheLayout.to_json` documents.

    Args:
        arrays: Axes of the one array, or of the key and of the value cache.
    """
    return json.dumps({"version": JSON_VERSION, "arrays": [[list(axis) for axis in axes] for axes in arrays]})


def from_json(text: Any) -> str:
    """The pattern that JSON of `to_json` stands for. Whether it describes a cache is for `validate` to say.

    Raises:
        ValueError: it is no such JSON, or of another version.
        TypeError: it is no text.
    """
    if not isinstance(text, (str, bytes, bytearray)):
        raise TypeError(f"text must be JSON as from CacheLayout.to_json, got {text!r}")
    try:
        layout = json.loads(text)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"text must be JSON as from CacheLayout.to_json, got {text!r}") from error
    if not isinstance(layout, dict) or set(layout) != {"version", "arrays"}:
        raise ValueError(f"text must be an object of version and arrays, got {text!r}")
    if type(layout["version"]) is not int or layout["version"] != JSON_VERSION:
        raise ValueError(f"version must be {JSON_VERSION}, got {layout['version']!r}")
    arrays = layout["arrays"]
    if not isinstance(arrays, list) or len(arrays) not in (1, 2) or not all(_are_axes(axes) for axes in arrays):
        raise ValueError(f"arrays must be one list or two, of axes, each a list of names, got {arrays!r}")
    return ", ".join(spell([tuple(axis) for axis in axes]) for axes in arrays)


def _are_axes(axes: Any) -> bool:
    """Whether these are lists of words, one or two in each."""
    return isinstance(axes, list) and all(
        isinstance(axis, list) and len(axis) in (1, 2) and all(isinstance(n, str) and _WORD.fullmatch(n) for n in axis)
        for axis in axes
    )


def constant(pattern: str) -> str | None:
    """The name in `CONSTANTS` that a pattern is, in any case; None: it is none.

    Raises:
        ValueError: it is neither a name nor a pattern.
    """
    name = pattern.strip().upper()
    if name in CONSTANTS:
        return name
    if name.isidentifier() and name.lower() not in AXES:
        raise ValueError(
            f"layout must be one of {', '.join(CONSTANTS)}, or a pattern of the axes {', '.join(AXES)}, got '{pattern}'"
        )
    return None


def from_vllm(name: Any) -> str:
    """The pattern of the layout that vLLM calls so, in any case.

    Raises:
        ValueError: vLLM has no layout of that name.
        TypeError: `name` is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name.strip().upper() not in VLLM:
        raise ValueError(f"name must be one of {', '.join(VLLM)}, got {name!r}")
    return VLLM[name.strip().upper()]


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


def mesh_axes(pattern: str, axes: Sequence[Axis], **split: MeshAxes) -> tuple[MeshAxes, ...]:
    """What each axis of an array is split over.

    Args:
        pattern: Of the layout, for errors.
        axes: Of the array.
        **split: Mesh axes of the axes head, block and layer.

    Raises:
        ValueError: the array has no such axis, unless that is `head` of an array of latents; or has it after `kv` in a
            joined axis, whose parts would be those of K and of V.
    """
    known = {axis[0]: index for index, axis in enumerate(axes)}
    spec: list[MeshAxes] = [None] * len(axes)
    for name, over in split.items():
        if over is None or (name == "head" and "latent" in known):
            continue
        if name not in known:
            raise ValueError(f"layout '{pattern}' must have an axis {name} to be split over {over!r}, got none")
        spec[known[name]] = over
    return tuple(spec)
