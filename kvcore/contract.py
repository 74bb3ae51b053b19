"""The contract of the cache ops: every check, every error message, once for both frameworks.

A framework describes its arrays with `ArraySpec` and gets back a `Write`: everything static about a call. Shapes
and choices raise ValueError, dtypes and types TypeError, before anything is launched.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvcore.layout import CacheLayout, Placement
from kvcore.quantization import FLOATS, FP8, KV_CACHE_DTYPES, FloatFormat


class ArraySpec(NamedTuple):
    """What the contract asks of an array.

    Attributes:
        shape: Sizes of its axes.
        dtype: The name that NumPy, JAX and torch share: "bfloat16", "float8_e4m3fn", "int32", …
        strides: In elements; None means C order.
        device: Name of the device; None where the framework takes care of devices itself.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    device: str | None = None


class Write(NamedTuple):
    """A cache write that fulfils the contract; hashable, and all that a plan or an implementation needs.

    Attributes:
        layout: The caches' layout, never None.
        placement: Extents and addresses of K and V.
        key: The spec of key.
        value: The spec of value.
        slot_mapping: The spec of slot_mapping.
        cache_dtype: dtype of the caches.
        format: What is stored.
        copies: Whether inputs are stored as they are, bit for bit.
        scaled: Whether inputs are divided by a scale.
    """

    layout: CacheLayout
    placement: Placement
    key: ArraySpec
    value: ArraySpec
    slot_mapping: ArraySpec
    cache_dtype: str
    format: FloatFormat
    copies: bool
    scaled: bool


def check_write(
    key: ArraySpec,
    value: ArraySpec,
    caches: Sequence[ArraySpec],
    slot_mapping: ArraySpec,
    kv_cache_dtype: str,
    k_scale: ArraySpec | None,
    v_scale: ArraySpec | None,
    layout: str | CacheLayout | None,
    layer: int | ArraySpec | None,
) -> Write:
    """Checks the arguments of `reshape_and_cache_flash` (two caches) or `…_diffkv` (one).

    Args:
        key: `(num_tokens, num_heads, head_size)`.
        value: `(num_tokens, num_heads, head_size_v)`.
        caches: The key and the value cache, or the one array with both.
        slot_mapping: `(n,)`, n ≤ num_tokens.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`.
        k_scale: One float32 element, or None.
        v_scale: Likewise.
        layout: Pattern, layout, or None for the default.
        layer: A static index, the spec of a traced one, or None.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    names = ("key_cache", "value_cache") if len(caches) == 2 else ("kv_cache",)
    layout = _layout(layout, caches, layer)
    _rank("key", key, 3, "(num_tokens, num_heads, head_size)")
    _rank("value", value, 3, "(num_tokens, num_heads, head_size_v)")
    placement = layout.place(
        [c.shape for c in caches], [c.strides for c in caches], head_size=key.shape[2], names=names
    )
    extents = placement.extents

    tokens, heads = key.shape[0], extents.num_heads
    if tuple(key.shape[1:]) != (heads, extents.head_size):
        raise ValueError(f"key must have shape (num_tokens, {heads}, {extents.head_size}), got {_shape(key)}")
    if tuple(value.shape) != (tokens, heads, extents.head_size_v):
        raise ValueError(f"value must have shape ({tokens}, {heads}, {extents.head_size_v}), got {_shape(value)}")
    _rank("slot_mapping", slot_mapping, 1, "(n,)")
    if slot_mapping.shape[0] > tokens:
        raise ValueError(f"slot_mapping must have at most num_tokens = {tokens} entries, got {slot_mapping.shape[0]}")
    if slot_mapping.dtype not in ("int32", "int64"):
        raise TypeError(f"slot_mapping must have dtype int32 or int64, got {slot_mapping.dtype}")

    _same_dtype("value", value, "key", key)
    if len(caches) == 2:
        _same_dtype("value_cache", caches[1], "key_cache", caches[0])
    stored = _format(kv_cache_dtype, key.dtype, caches[0].dtype, names[0])
    scaled = stored.name in FP8 and key.dtype not in FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _scale(name, scale)
    _layer(layer, layout, extents.num_layers)
    named = [("key", key), ("value", value), *zip(names, caches, strict=True), ("slot_mapping", slot_mapping)]
    named += [
        (n, s) for n, s in (("k_scale", k_scale), ("v_scale", v_scale), ("layer", layer)) if isinstance(s, ArraySpec)
    ]
    for name, spec in named:
        if spec.device != caches[0].device:
            raise ValueError(f"{name} must be on device {caches[0].device}, as {names[0]}, got {spec.device}")
    return Write(
        layout=layout,
        placement=placement,
        key=key,
        value=value,
        slot_mapping=slot_mapping,
        cache_dtype=caches[0].dtype,
        format=stored,
        copies=stored.name == key.dtype,
        scaled=scaled and (k_scale is not None or v_scale is not None),
    )


def check_options(
    kv_cache_dtype: Any, k_scale: Any, v_scale: Any, layer: Any, backend: Any, backends: Sequence[str]
) -> None:
    """Checks what arguments are, before anything is made of them.

    Raises:
        ValueError: kv_cache_dtype or backend is none of the choices.
        TypeError: a scale or layer is neither a number nor an array.
    """
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype must be {_either(map(repr, KV_CACHE_DTYPES))}, got {kv_cache_dtype!r}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and not hasattr(scale, "shape") and not isinstance(scale, (int, float)):
            raise TypeError(f"{name} must be a number or an array of one float32, got {scale!r}")
    number = isinstance(layer, int) or hasattr(layer, "__index__")  # in this order for torch.compile's integers
    if isinstance(layer, bool) or not (layer is None or number or hasattr(layer, "shape")):
        raise TypeError(f"layer must be an int or an integer scalar, got {layer!r}")
    if backend is not None and backend not in backends:
        raise ValueError(f"backend must be None, {_either(map(repr, backends))}, got {backend!r}")


def no_triton_error(platform: str) -> ValueError:
    """The error for the backend "triton" where it cannot run."""
    return ValueError(f"backend 'triton' needs a CUDA or ROCm device, got {platform}")


def overlap_error() -> ValueError:
    """The error for caches that share memory."""
    return ValueError("key_cache and value_cache must not overlap in memory")


def _layout(
    layout: str | CacheLayout | None, caches: Sequence[ArraySpec], layer: int | ArraySpec | None
) -> CacheLayout:
    if layout is None:
        if len(caches) == 1:
            chosen = CacheLayout.PACKED_NHD
        else:
            rank = len(caches[0].shape) - (layer is not None)
            if rank == len(caches[1].shape) == 5:
                raise ValueError("layer must be given where key_cache and value_cache have 5 axes each, got None")
            chosen = CacheLayout.HEAD_MAJOR if rank == 5 else CacheLayout.NHD
        return chosen if layer is None else chosen.with_layer()
    if not isinstance(layout, (str, CacheLayout)):
        raise TypeError(f"layout must be a pattern string or a CacheLayout, got {layout!r}")
    chosen = CacheLayout.of(layout)
    if chosen.single_array and len(caches) == 2:
        raise ValueError(
            "layout must describe two arrays, a key and a value cache, "
            f"got '{chosen}', which is for reshape_and_cache_flash_diffkv"
        )
    if not chosen.single_array and len(caches) == 1:
        raise ValueError(
            f"layout must describe one array for K and V, got '{chosen}', which is for reshape_and_cache_flash"
        )
    return chosen


def _format(kv_cache_dtype: str, given: str, cache: str, cache_name: str) -> FloatFormat:
    quantised = KV_CACHE_DTYPES[kv_cache_dtype]
    if given not in FLOATS and given not in FP8:
        raise TypeError(f"key must have dtype {_either([*FLOATS, *FP8])}, got {given}")
    if quantised is not None:
        if cache not in (quantised.name, "uint8"):
            raise TypeError(
                f"{cache_name} must have dtype {quantised.name} or uint8 "
                f"for kv_cache_dtype {kv_cache_dtype!r}, got {cache}"
            )
        if given in FP8 and given != quantised.name:
            raise TypeError(
                f"key must have dtype {_either([*FLOATS, quantised.name])} "
                f"for kv_cache_dtype {kv_cache_dtype!r}, got {given}"
            )
        return quantised
    allowed = FLOATS if given in FLOATS else {given: FP8[given]}
    if cache not in allowed:
        raise TypeError(
            f"{cache_name} must have dtype {_either(allowed)} for kv_cache_dtype 'auto' and key of dtype {given}, "
            f"got {cache}"
        )
    return allowed[cache]


def _scale(name: str, scale: ArraySpec) -> None:
    if tuple(scale.shape) not in ((), (1,)):
        raise ValueError(f"{name} must have shape () or (1,), got {_shape(scale)}")
    if scale.dtype != "float32":
        raise TypeError(f"{name} must have dtype float32, got {scale.dtype}")


def _layer(layer: int | ArraySpec | None, layout: CacheLayout, num_layers: int | None) -> None:
    if num_layers is None:
        if layer is not None:
            raise ValueError(f"layer must be None for layout '{layout}', which has no axis layer, got {_say(layer)}")
        return
    if layer is None:
        raise ValueError(f"layer must be given for layout '{layout}', got None")
    if isinstance(layer, ArraySpec):
        if tuple(layer.shape) not in ((), (1,)):
            raise ValueError(f"layer must have shape () or (1,), got {_shape(layer)}")
        if layer.dtype not in ("int32", "int64"):
            raise TypeError(f"layer must have dtype int32 or int64, got {layer.dtype}")
    elif not 0 <= layer < num_layers:
        raise ValueError(f"layer must be at least 0 and below {num_layers}, got {layer}")


def _rank(name: str, spec: ArraySpec, rank: int, wanted: str) -> None:
    if len(spec.shape) != rank:
        raise ValueError(f"{name} must have shape {wanted}, got {_shape(spec)}")


def _same_dtype(name: str, spec: ArraySpec, other_name: str, other: ArraySpec) -> None:
    if spec.dtype != other.dtype:
        raise TypeError(f"{name} must have dtype {other.dtype}, as {other_name}, got {spec.dtype}")


def _shape(spec: ArraySpec) -> str:
    return str(tuple(spec.shape))


def _say(layer: int | ArraySpec) -> str:
    return f"an array of shape {_shape(layer)}" if isinstance(layer, ArraySpec) else repr(layer)


def _either(words: Any) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
