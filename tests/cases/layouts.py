"""The layouts in use, written down once more, and where NumPy finds their elements."""

import re

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
}


WITH_LAYER = [", ".join(f"layer {array.strip()}" for array in p.split(",")) for p in CONSTANTS.values()]


VLLM = {
    "LBHNC": "layer block head slot k+v",
    "LBNHC": "layer block slot head k+v",
    "LHBNC": "layer head block slot k+v",
    "BLHNC": "block layer head slot k+v",
    "BLNHC": "block layer slot head k+v",
    "BHLNC": "block head layer slot k+v",
}
"""vLLM's, all of one array for all layers."""


def axes_of(pattern):
    """Axes of each array, each axis a list of names, by means other than the implementation's."""
    arrays = [
        [axis.strip("()").split("&") for axis in re.sub(r"(\([^ ]+) ", r"\1&", array).split()]
        for array in pattern.split(",")
    ]
    single = {"kv", "k+v"} & {name for axis in arrays[0] for name in axis}
    return arrays if single or len(arrays) == 2 else arrays * 2


def numpy_view(array, axes):
    """The array with axes [kv, layer, block, slot, head, dim], by reshaping and transposing only."""
    names, shape = [], []
    for axis, size in zip(axes, array.shape, strict=True):
        rest = size if len(axis) == 1 else size // 2
        names += axis
        shape += [2 if name == "kv" and len(axis) == 2 else rest for name in axis]
    array = array.reshape(shape)
    for name in ("kv", "layer"):
        if name not in names:
            array, names = array[None], [name, *names]
    last = ["dim/x", "x"] if "x" in names else ["k+v" if "k+v" in names else "dim"]
    array = array.transpose([names.index(n) for n in ["kv", "layer", "block", "slot", "head", *last]])
    return array.reshape(*array.shape[:5], -1)


def numpy_places(arrays, axes, head_size):
    """Positions of K's and of V's elements from each array's first, `[layer, block, slot, head, dim]`."""
    views = [numpy_view(a - a[(0,) * a.ndim], x) for a, x in zip(arrays, axes, strict=True)]
    if len(views) == 2:
        return views[0][0], views[1][0]
    if len(views[0]) == 2:
        return views[0][0], views[0][1]
    return views[0][0, ..., :head_size], views[0][0, ..., head_size:]
