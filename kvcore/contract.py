"""The contract of the cache ops: every check, every error message, once for both frameworks.

A framework describes its arrays with `ArraySpec` and gets back a `Write`: everything static about a call. Shapes
and choices raise ValueError, dtypes and types TypeError, before anything is launched.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvcore.checks import (
    ArraySpec,
    check_devices,
    check_layer,
    check_rank,
    check_same_dtype,
    check_scale,
    either,
    layout_of,
    shape_of,
)
from kvcore.layout import CacheLayout, Placement
from kvcore.quantization import FLOATS, FP8, KV_CACHE_DTYPES, FloatFormat


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
    check_rank("key", key, 3, "(num_tokens, num_heads, head_size)")
    check_rank("value", value, 3, "(num_tokens, num_heads, head_size_v)")
    placement = layout.place(
        [c.shape for c in caches], [c.strides for c in caches], head_size=key.shape[2], names=names
    )
    extents = placement.extents

    tokens, heads = key.shape[0], extents.num_heads
    if tuple(key.shape[1:]) != (heads, extents.head_size):
        raise ValueError(f"key must have shape (num_tokens, {heads}, {extents.head_size}), got {shape_of(key)}")
    if tuple(value.shape) != (tokens, heads, extents.head_size_v):
        raise ValueError(f"value must have shape ({tokens}, {heads}, {extents.head_size_v}), got {shape_of(value)}")
    check_rank("slot_mapping", slot_mapping, 1, "(n,)")
    if slot_mapping.shape[0] > tokens:
        raise ValueError(f"slot_mapping must have at most num_tokens = {tokens} entries, got {slot_mapping.shape[0]}")
    if slot_mapping.dtype not in ("int32", "int64"):
        raise TypeError(f"slot_mapping must have dtype int32 or int64, got {slot_mapping.dtype}")

    check_same_dtype("value", value, "key", key)
    if len(caches) == 2:
        check_same_dtype("value_cache", caches[1], "key_cache", caches[0])
    stored = _format(kv_cache_dtype, key.dtype, caches[0].dtype, names[0])
    scaled = stored.name in FP8 and key.dtype not in FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_scale(name, scale)
    check_layer(layer, layout, extents.num_layers)
    named = [("key", key), ("value", value), *zip(names, caches, strict=True), ("slot_mapping", slot_mapping)]
    named += [("k_scale", k_scale), ("v_scale", v_scale)]
    if isinstance(layer, ArraySpec):
        named.append(("layer", layer))
    check_devices(named, names[0], caches[0])
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


def _layout(
    layout: str | CacheLayout | None, caches: Sequence[ArraySpec], layer: int | ArraySpec | None
) -> CacheLayout:
    if layout is None and len(caches) == 1:  # whatever its rank: no other single array is written by default
        layout = CacheLayout.PACKED_NHD if layer is None else CacheLayout.PACKED_NHD.with_layer()
    chosen = layout_of(layout, caches, layer)
    if chosen.latent:
        raise ValueError(
            f"layout must have a place for K and for V, got '{chosen}', where V is a part of K; "
            "'block slot head k+v' is the same memory to write to, in two parts"
        )
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
        raise TypeError(f"key must have dtype {either([*FLOATS, *FP8])}, got {given}")
    if quantised is not None:
        if cache not in (quantised.name, "uint8"):
            raise TypeError(
                f"{cache_name} must have dtype {quantised.name} or uint8 "
                f"for kv_cache_dtype {kv_cache_dtype!r}, got {cache}"
            )
        if given in FP8 and given != quantised.name:
            raise TypeError(
                f"key must have dtype {either([*FLOATS, quantised.name])} "
                f"for kv_cache_dtype {kv_cache_dtype!r}, got {given}"
            )
        return quantised
    allowed = FLOATS if given in FLOATS else {given: FP8[given]}
    if cache not in allowed:
        raise TypeError(
            f"{cache_name} must have dtype {either(allowed)} for kv_cache_dtype 'auto' and key of dtype {given}, "
            f"got {cache}"
        )
    return allowed[cache]
