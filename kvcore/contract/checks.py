"""What the contracts of writing and of reading have in common: checks of single arguments, and their messages."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcore.arrays import ArraySpec, contiguous_strides, shape_of
from kvcore.formats import KV_CACHE_DTYPES
from kvcore.layout import CacheLayout
from kvcore.placement import Extents


def check_options(
    kv_cache_dtype: Any, k_scale: Any, v_scale: Any, layer: Any, backend: Any, backends: Sequence[str]
) -> None:
    """Checks what arguments are, before anything is made of them.

    Raises:
        ValueError: kv_cache_dtype or backend is none of the choices.
        TypeError: a scale or layer is neither a number nor an array.
    """
    check_kv_cache_dtype(kv_cache_dtype)
    if k_scale is not None:
        check_scale_type("k_scale", k_scale)
    if v_scale is not None:
        check_scale_type("v_scale", v_scale)
    if layer is not None:
        number = isinstance(layer, int) or hasattr(layer, "__index__")  # in this order for torch.compile's integers
        if is_bool(layer) or not (number or hasattr(layer, "shape")):
            raise TypeError(f"layer must be an int or an integer scalar, got {layer!r}")
    check_backend(backend, backends)


def check_backend(backend: Any, backends: Sequence[str]) -> None:
    """Checks that a backend is one of these, or None."""
    if backend is not None and backend not in backends:
        raise ValueError(f"backend must be None, {either(map(repr, backends))}, got {backend!r}")


def check_callable(name: str, function: Any) -> None:
    """Raises a TypeError unless an argument is callable."""
    if not callable(function):
        raise TypeError(f"{name} must be callable, got {type(function).__name__}")


def check_scale_type(name: str, scale: Any) -> None:
    """Checks that a scale is a number, an array or None, before anything is made of it."""
    if scale is not None and not is_number(scale) and (is_bool(scale) or not hasattr(scale, "shape")):
        raise TypeError(f"{name} must be a number or an array of float32, got {scale!r}")


def is_number(x: Any) -> bool:
    """Whether it is a real number of Python or NumPy; truth values are none."""
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def is_integer(x: Any) -> bool:
    """Whether it is an integer of Python or NumPy; truth values are none."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def is_bool(x: Any) -> bool:
    """Whether it is a truth value of Python or NumPy."""
    return isinstance(x, (bool, np.bool_))


def check_kv_cache_dtype(kv_cache_dtype: Any) -> None:
    """Checks that it is the name of a format."""
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype must be {either(map(repr, KV_CACHE_DTYPES))}, got {kv_cache_dtype!r}")


def no_triton_error(platform: str) -> ValueError:
    """The error for the backend "triton" where it cannot run."""
    return ValueError(f"backend 'triton' needs a CUDA or ROCm device, got {platform}")


def no_interpreter_error(device: str) -> ValueError:
    """The error for the backend "interpret" where memory is not the host's."""
    return ValueError(f"backend 'interpret' needs CPU tensors, got device {device}")


def overlap_error(name: str, other: str) -> ValueError:
    """The error for arrays that share memory and must not."""
    return ValueError(f"{name} and {other} must not overlap in memory")


def self_overlap_error(name: str, strides: Sequence[int]) -> ValueError:
    """The error for an array that is written to, and has two elements in one place."""
    return ValueError(f"{name} must not overlap itself in memory, got strides {tuple(strides)}")


def layout_of(
    layout: str | CacheLayout | None, caches: Sequence[ArraySpec], layer: int | ArraySpec | None
) -> CacheLayout:
    """The layout that is meant: None stands for the usual one of caches with as many axes."""
    if layout is not None:
        return CacheLayout.of(layout)
    rank = len(caches[0].shape) - (layer is not None)
    if len(caches) == 1:
        chosen = CacheLayout.MLA if rank == 3 else CacheLayout.PACKED_NHD
    else:
        if layer is None and rank == len(caches[1].shape) == 5:
            raise ValueError("layer must be given where key_cache and value_cache have 5 axes each, got None")
        chosen = CacheLayout.HEAD_MAJOR if rank == 5 else CacheLayout.NHD
    return chosen if layer is None else chosen.with_layer()


def hnd_hint(layout: str | CacheLayout | None, chosen: CacheLayout, num_heads: int, extents: Extents) -> str:
    """How an error about heads ends where caches would have the wanted heads if they were read as HND; else empty.

    A hint is only given to calls without a layout.

    Args:
        layout: As it was given.
        chosen: What it stands for.
        num_heads: That the other arrays have.
        extents: Of the caches, read in the chosen layout.
    """
    name = {CacheLayout.NHD.with_layer(): "HND", CacheLayout.PACKED_NHD.with_layer(): "PACKED_HND"}
    if layout is not None or chosen.with_layer() not in name or num_heads != extents.block_size:
        return ""
    stands_for = name[chosen.with_layer()]
    size = "head_size" if stands_for == "HND" else "head_size + head_size_v"
    if chosen.has_layer:
        stands_for = CacheLayout.of(stands_for).with_layer().pattern
    axes = f"{'num_layers, ' if chosen.has_layer else ''}num_blocks, num_heads, block_size, {size}"
    return f"; for caches [{axes}] pass layout='{stands_for}'"


def check_scale(name: str, scale: ArraySpec, num_heads: int, num_layers: int | None = None) -> tuple[int, int]:
    """Checks that a static scale is one float32 element, or one a head; with layers, also a row of such for each.

    Returns:
        The steps from one layer's scale to the next, and from one head's; 0 where they share one.
    """
    rows = [(1,)] if num_heads == 1 else [(1,), (num_heads,)]
    shapes = [(), *rows]
    if num_layers is not None and num_layers != 0:
        shapes += [(num_layers, *row) for row in rows]
    shape = tuple(scale.shape)
    if shape not in shapes:
        raise ValueError(f"{name} must have shape {either(map(str, shapes))}, got {shape_of(scale)}")
    if scale.dtype != "float32":
        raise TypeError(f"{name} must have dtype float32, got {scale.dtype}")
    by_head = num_heads > 1 and shape[-1:] == (num_heads,)
    return scale.steps[0] if len(shape) == 2 else 0, scale.steps[-1] if by_head else 0


def check_layer(layer: int | ArraySpec | None, layout: CacheLayout, num_layers: int | None) -> None:
    """Checks that layer is given exactly where the layout has an axis layer, and is an index into it."""
    if num_layers is None:
        if layer is not None:
            raise ValueError(f"layer must be None for layout '{layout}', which has no axis layer, got {_say(layer)}")
        return
    if layer is None:
        raise ValueError(f"layer must be given for layout '{layout}', got None")
    if isinstance(layer, ArraySpec):
        if tuple(layer.shape) not in ((), (1,)):
            raise ValueError(f"layer must have shape () or (1,), got {shape_of(layer)}")
        if layer.dtype not in ("int32", "int64"):
            raise TypeError(f"layer must have dtype int32 or int64, got {layer.dtype}")
    elif not 0 <= layer < num_layers:
        raise ValueError(f"layer must be at least 0 and below {num_layers}, got {layer}")


def check_rank(name: str, spec: ArraySpec, rank: int, wanted: str) -> None:
    """Checks that an array has `rank` axes; `wanted` names them in the error."""
    if len(spec.shape) != rank:
        raise ValueError(f"{name} must have shape {wanted}, got {shape_of(spec)}")


def check_same_dtype(name: str, spec: ArraySpec, other_name: str, other: ArraySpec) -> None:
    """Checks that an array has the other one's dtype."""
    if spec.dtype != other.dtype:
        raise TypeError(f"{name} must have dtype {other.dtype}, as {other_name}, got {spec.dtype}")


def _say(layer: int | ArraySpec) -> str:
    return f"an array of shape {shape_of(layer)}" if isinstance(layer, ArraySpec) else repr(layer)


def either(words: Any) -> str:
    """`a, b or c`."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def check_devices(named: Sequence[tuple[str, ArraySpec | None]], home_name: str, home: ArraySpec) -> None:
    """Checks that all arrays are on the device of `home`."""
    for name, spec in named:
        if isinstance(spec, ArraySpec) and spec.device != home.device:
            raise ValueError(f"{name} must be on device {home.device}, as {home_name}, got {spec.device}")


def check_result(name: str, spec: ArraySpec, shape: Sequence[int], dtype: str, strided: bool = False) -> None:
    """Checks that an array for a result has the result's shape and dtype, and no gaps unless it may be strided."""
    if tuple(spec.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {shape_of(spec)}")
    if spec.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {spec.dtype}")
    steps = zip(spec.shape, spec.steps, contiguous_strides(spec.shape), strict=True)
    if not strided and 0 not in spec.shape and any(n > 1 and step != wanted for n, step, wanted in steps):
        raise ValueError(f"{name} must be contiguous, got strides {tuple(spec.steps)}")


def check_indices(name: str, spec: ArraySpec, shape: tuple[int | str, ...]) -> None:
    """Checks that an array is int32 or int64, and of this shape, in which a string stands for any size."""
    fits = len(spec.shape) == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({wanted}), got {shape_of(spec)}")
    if spec.dtype not in ("int32", "int64"):
        raise TypeError(f"{name} must have dtype int32 or int64, got {spec.dtype}")
