"""The contract of the ops that write a cache: every check, every error message, once for both frameworks.

A framework describes its arrays with `ArraySpec` and gets back a `Write`: everything static about a call. Shapes
and choices raise ValueError, dtypes and types TypeError, before anything is launched.
"""

from typing import NamedTuple

from kvcore.arrays import ArraySpec, shape_of, with_unit_axis
from kvcore.contract.cache import (
    Cache,
    CacheArguments,
    check_cache_devices,
    check_per_token_head,
    check_scale_caches,
    check_static_scales,
    check_stored_dtype,
)
from kvcore.contract.checks import check_layer, check_rank, check_same_dtype, check_scale, either, hnd_hint, layout_of
from kvcore.formats import (
    BFLOAT16,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
    FLOATS,
    FP8,
    FP8_DS_MLA,
    KV_CACHE_DTYPES,
    FloatFormat,
    check_head_size,
    stored_size,
)
from kvcore.layout import CacheLayout
from kvcore.placement import Placement
from kvcore.scales import Stored, place_stored


class Write(NamedTuple):
    """A write that fulfils the contract; hashable, and all that a plan or an implementation needs.

    Attributes:
        cache: What is written.
        key: The spec of key.
        value: The spec of value.
        slot_mapping: The spec of slot_mapping.
        scaled: Whether inputs are divided by static scales.
    """

    cache: Cache
    key: ArraySpec
    value: ArraySpec
    slot_mapping: ArraySpec
    scaled: bool

    @property
    def placement(self) -> Placement:
        """Where the rows of key and of value go. Of fp8_ds_mla, value is the rotary part."""
        extents, key, _ = self.cache.placement
        if self.cache.rope is None:
            return self.cache.placement
        return Placement(extents._replace(head_units_v=DS_MLA_ROPE), key, self.cache.rope)

    @property
    def format_v(self) -> FloatFormat:
        """What is stored of value."""
        return BFLOAT16 if self.cache.format == FP8_DS_MLA else self.cache.format

    @property
    def by_head(self) -> bool:
        """Whether each head has a scale of its own, computed or static."""
        return self.cache.scales is not None or (self.scaled and any(self.cache.head_scales))

    @property
    def scale_strides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of the cache, of the scales that inputs are divided by."""
        return self.cache.scale_strides if self.scaled else ((0, 0), (0, 0))

    @property
    def copies(self) -> bool:
        """Whether inputs are stored as they are, bit for bit."""
        return self.cache.format.name == self.key.dtype


def check_write(key: ArraySpec, value: ArraySpec, slot_mapping: ArraySpec, arguments: CacheArguments) -> Write:
    """Checks the arguments of a write into two caches, or (`…_diffkv`) into one.

    Args:
        key: `(num_tokens, num_heads, head_size)`.
        value: `(num_tokens, num_heads, head_size_v)`.
        slot_mapping: `(n,)`, n ≤ num_tokens.
        arguments: The cache that is written.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    if arguments.scale_caches:
        check_per_token_head(arguments.kv_cache_dtype)
    layout, quantised = _layout(arguments), arguments.quantised
    check_rank("key", key, 3, "(num_tokens, num_heads, head_size)")
    check_rank("value", value, 3, "(num_tokens, num_heads, head_size_v)")
    if quantised is not None and quantised != FP8_DS_MLA:
        check_head_size("key's head_size", quantised, key.shape[2])
        check_head_size("value's head_size", quantised, value.shape[2])
    stored = place_stored(layout, arguments.caches, quantised, key.shape[2], None, arguments.names)
    extents = stored.placement.extents
    _check_rows(key, value, slot_mapping, arguments, layout, stored)
    if len(arguments.caches) == 2:
        check_same_dtype("value_cache", arguments.caches[1], "key_cache", arguments.caches[0])
    held = _check_dtypes(key, arguments)
    scales = stored.scales
    if arguments.scale_caches:
        if key.dtype not in FLOATS:
            raise TypeError(f"key must have dtype {either(FLOATS)} to be given scales, got {key.dtype}")
        scales = check_scale_caches(arguments, layout, extents)
    head_scales, layer_scales = check_static_scales(arguments, extents)
    check_layer(arguments.layer, layout, extents.num_layers)
    check_cache_devices(arguments, [("key", key), ("value", value), ("slot_mapping", slot_mapping)])
    dtype = arguments.caches[0].dtype
    cache = Cache(layout, stored.placement, dtype, held, head_scales, layer_scales, scales, stored.rope)
    divided = cache.scaled and key.dtype not in FP8 and not arguments.scale_caches
    has_scale = arguments.k_scale is not None or arguments.v_scale is not None
    return Write(cache, key, value, slot_mapping, scaled=divided and has_scale)


def _check_rows(
    key: ArraySpec,
    value: ArraySpec,
    slot_mapping: ArraySpec,
    arguments: CacheArguments,
    layout: CacheLayout,
    stored: Stored,
) -> None:
    """Checks that key, value and slot_mapping have the shapes that the cache asks for."""
    extents, per_unit = stored.placement.extents, 1
    if arguments.quantised is not None:
        per_unit = arguments.quantised.elements_per_unit
    tokens, heads, size = key.shape[0], extents.num_heads, extents.head_units * per_unit
    size_v = DS_MLA_ROPE if stored.rope is not None else extents.head_units_v * per_unit
    if tuple(key.shape[1:]) != (heads, size):
        hint = hnd_hint(arguments.layout, layout, key.shape[1], extents) if key.shape[2] == size else ""
        raise ValueError(f"key must have shape (num_tokens, {heads}, {size}), got {shape_of(key)}{hint}")
    if tuple(value.shape) != (tokens, heads, size_v):
        raise ValueError(f"value must have shape ({tokens}, {heads}, {size_v}), got {shape_of(value)}")
    check_rank("slot_mapping", slot_mapping, 1, "(n,)")
    if slot_mapping.shape[0] > tokens:
        raise ValueError(f"slot_mapping must have at most num_tokens = {tokens} entries, got {slot_mapping.shape[0]}")
    if slot_mapping.dtype not in ("int32", "int64"):
        raise TypeError(f"slot_mapping must have dtype int32 or int64, got {slot_mapping.dtype}")
    check_same_dtype("value", value, "key", key)


def check_mla(
    kv_c: ArraySpec,
    k_pe: ArraySpec,
    kv_cache: ArraySpec,
    kv_cache_dtype: str,
    layer: object,
    names: tuple[str, str] = ("kv_c", "k_pe"),
    scale: ArraySpec | None = None,
) -> None:
    """Checks what MLA asks beyond `check_write`: of an op that calls kv_c and k_pe by these names.

    Args:
        kv_c: `(num_tokens, kv_lora_rank)`.
        k_pe: `(num_tokens, qk_rope_head_dim)`.
        kv_cache: With its axes in this order: layer, block, slot, latent.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`.
        layer: None where the cache has no axis for it.
        names: What errors call kv_c and k_pe.
        scale: Of an op that calls it so, where it is given.

    Raises:
        ValueError: a shape or a choice does not fit.
        TypeError: a dtype does not fit.
    """
    name, rope_name = names
    check_rank(name, kv_c, 2, "(num_tokens, kv_lora_rank)")
    check_rank(rope_name, k_pe, 2, "(num_tokens, qk_rope_head_dim)")
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    rank, rope = kv_c.shape[1], k_pe.shape[1]
    if k_pe.shape[0] != kv_c.shape[0]:
        raise ValueError(f"{rope_name} must have shape ({kv_c.shape[0]}, {rope}), got {shape_of(k_pe)}")
    if stored == FP8_DS_MLA:
        if rank != DS_MLA_LATENT or rope not in (DS_MLA_ROPE, 0):
            raise ValueError(
                f"{name} must have {DS_MLA_LATENT} columns, and {rope_name} {DS_MLA_ROPE} or none, for kv_cache_dtype "
                f"'fp8_ds_mla', got {rank} and {rope}"
            )
        rope = DS_MLA_ROPE
    elif stored is not None:
        check_head_size(f"{name}'s columns", stored, rank)
        check_head_size(f"{rope_name}'s columns", stored, rope)
    check_same_dtype(rope_name, k_pe, name, kv_c)
    if kv_c.dtype not in FLOATS:
        raise TypeError(f"{name} must have dtype {either(FLOATS)}, got {kv_c.dtype}")
    units = stored_size(stored, rank + rope)
    axes = "(num_blocks, block_size, " if layer is None else "(num_layers, num_blocks, block_size, "
    if len(kv_cache.shape) != (3 if layer is None else 4) or kv_cache.shape[-1] != units:
        raise ValueError(f"kv_cache must have shape {axes}{units}), got {shape_of(kv_cache)}")
    if scale is not None:
        check_scale("scale", scale, 1, None if layer is None else kv_cache.shape[0])


def latent_order(layout: CacheLayout) -> list[int]:
    """Where the axes layer, block, slot and latent are in caches of a latent layout; layer only where they have it."""
    (axes,) = layout.arrays
    return [axes.index((name,)) for name in ("layer", "block", "slot", "latent") if (name,) in axes]


def in_latent_order(layout: CacheLayout, cache: ArraySpec) -> ArraySpec:
    """The spec of a cache with its axes in the order that `check_mla` asks for; of another rank, as it is."""
    order = latent_order(layout)
    return cache._replace(shape=tuple(cache.shape[i] for i in order)) if len(cache.shape) == len(order) else cache


def with_latent_head(layout: CacheLayout, cache: ArraySpec, kv_cache_dtype: str) -> tuple[CacheLayout, ArraySpec]:
    """Rows of MLA as a write sees them: one head, whose key is kv_c and whose value is k_pe; fp8_ds_mla stays.

    Returns:
        The layout, and the cache's spec with an axis for that head.
    """
    if kv_cache_dtype == FP8_DS_MLA.name:
        return layout, cache
    layout_with_head = CacheLayout(layout.pattern.replace("latent", "head k+v"))
    return layout_with_head, with_unit_axis(cache, latent_order(layout)[-1])


def split_of_latent(rank: int) -> int:
    """Where an MLA row without a rotary part is split, to be written as key and value.

    A format that allows the whole row allows both parts.
    """
    return rank // 32 * 16


def _layout(arguments: CacheArguments) -> CacheLayout:
    """The layout to write in."""
    caches, layout = arguments.caches, arguments.layout
    if layout is None and len(caches) == 1:  # whatever its rank: no other single array is written by default
        layout = CacheLayout.MLA if arguments.quantised == FP8_DS_MLA else CacheLayout.PACKED_NHD
        layout = layout if arguments.layer is None else layout.with_layer()
    chosen = layout_of(layout, caches, arguments.layer)
    if chosen.latent and arguments.quantised != FP8_DS_MLA:
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


def _check_dtypes(key: ArraySpec, arguments: CacheArguments) -> FloatFormat:
    """Checks that key's dtype and the caches' fit each other. Returns what the caches hold."""
    if key.dtype not in FLOATS and key.dtype not in FP8:
        raise TypeError(f"key must have dtype {either([*FLOATS, *FP8])}, got {key.dtype}")
    allowed = FLOATS if key.dtype in FLOATS else {key.dtype: FP8[key.dtype]}
    held = check_stored_dtype(arguments, allowed, f" and key of dtype {key.dtype}")
    if arguments.quantised is not None and key.dtype in FP8 and key.dtype != held.name:
        raise TypeError(
            f"key must have dtype {either([*FLOATS, held.name])} "
            f"for kv_cache_dtype {arguments.kv_cache_dtype!r}, got {key.dtype}"
        )
    return held
