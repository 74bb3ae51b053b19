"""The contract of the cache ops: every check, every error message, once for both frameworks.

A framework describes its arrays with `ArraySpec` and gets back a `Write`: everything static about a call. Shapes
and choices raise ValueError, dtypes and types TypeError, before anything is launched.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.checks import (
    check_devices,
    check_layer,
    check_rank,
    check_same_dtype,
    check_scale,
    either,
    hnd_hint,
    layout_of,
    shape_of,
)
from kvcore.formats import (
    BFLOAT16,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
    FLOATS,
    FP8,
    FP8_DS_MLA,
    KV_CACHE_DTYPES,
    PER_TOKEN_HEAD,
    FloatFormat,
    check_head_size,
    storage_of,
    stored_size,
)
from kvcore.layout import CacheLayout, Placement, array_names
from kvcore.scales import Scales, place_scale_caches, place_stored, scale_layout_of


class Write(NamedTuple):
    """A cache write that fulfils the contract; hashable, and all that a plan or an implementation needs.

    Attributes:
        layout: The caches' layout, never None.
        placement: Extents and addresses of K and V, counted in stored units: elements, or bytes of two.
        key: The spec of key.
        value: The spec of value.
        slot_mapping: The spec of slot_mapping.
        cache_dtype: dtype of the caches.
        format: What is stored.
        scaled: Whether inputs are divided by static scales.
        head_scales: Steps from one head's static scale to the next, of k_scale and v_scale; 0: one scale for all heads.
        scales: The scales that are computed, or None.
    """

    layout: CacheLayout
    placement: Placement
    key: ArraySpec
    value: ArraySpec
    slot_mapping: ArraySpec
    cache_dtype: str
    format: FloatFormat
    scaled: bool
    head_scales: tuple[int, int]
    scales: Scales | None

    @property
    def format_v(self) -> FloatFormat:
        """What is stored of value."""
        return BFLOAT16 if self.format == FP8_DS_MLA else self.format

    @property
    def by_head(self) -> bool:
        """Whether each head has a scale of its own, computed or static."""
        return self.scales is not None or (self.scaled and any(self.head_scales))

    @property
    def copies(self) -> bool:
        """Whether inputs are stored as they are, bit for bit."""
        return self.format.name == self.key.dtype


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
    scale_caches: Sequence[ArraySpec] = (),
    scale_layout: str | CacheLayout | None = None,
) -> Write:
    """Checks the arguments of a write into two caches, or (`…_diffkv`) into one.

    Args:
        key: `(num_tokens, num_heads, head_size)`.
        value: `(num_tokens, num_heads, head_size_v)`.
        caches: The key and the value cache, or the one array with both.
        slot_mapping: `(n,)`, n ≤ num_tokens.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`.
        k_scale: One float32 element, or one a head, or None.
        v_scale: Likewise.
        layout: Pattern, layout, or None for the default.
        layer: A static index, the spec of a traced one, or None.
        scale_caches: Those of key and value, where each token's head has a scale of its own.
        scale_layout: Their pattern, or None for the default.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    names = array_names(len(caches))
    quantised = KV_CACHE_DTYPES[kv_cache_dtype]
    if scale_caches and kv_cache_dtype not in PER_TOKEN_HEAD:
        raise ValueError(
            f"kv_cache_dtype must be {either(map(repr, PER_TOKEN_HEAD))} with scales for each token and head, "
            f"got {kv_cache_dtype!r}"
        )
    given, layout = layout, _layout(layout, caches, layer, quantised)
    check_rank("key", key, 3, "(num_tokens, num_heads, head_size)")
    check_rank("value", value, 3, "(num_tokens, num_heads, head_size_v)")
    mla = quantised == FP8_DS_MLA
    if quantised is not None and not mla:
        check_head_size("key's head_size", quantised, key.shape[2])
        check_head_size("value's head_size", quantised, value.shape[2])
    where = place_stored(layout, caches, quantised, key.shape[2], None, names)
    placement, per_byte = where.placement, 1 if quantised is None else quantised.per_byte
    if where.rope is not None:  # the second part of an MLA row
        placement = Placement(placement.extents._replace(head_size_v=DS_MLA_ROPE), placement.key, where.rope)
    extents = placement.extents

    tokens, heads = key.shape[0], extents.num_heads
    size, size_v = extents.head_size * per_byte, extents.head_size_v * per_byte
    if tuple(key.shape[1:]) != (heads, size):
        hint = hnd_hint(given, layout, key.shape[1], extents) if key.shape[2] == size else ""
        raise ValueError(f"key must have shape (num_tokens, {heads}, {size}), got {shape_of(key)}{hint}")
    if tuple(value.shape) != (tokens, heads, size_v):
        raise ValueError(f"value must have shape ({tokens}, {heads}, {size_v}), got {shape_of(value)}")
    check_rank("slot_mapping", slot_mapping, 1, "(n,)")
    if slot_mapping.shape[0] > tokens:
        raise ValueError(f"slot_mapping must have at most num_tokens = {tokens} entries, got {slot_mapping.shape[0]}")
    if slot_mapping.dtype not in ("int32", "int64"):
        raise TypeError(f"slot_mapping must have dtype int32 or int64, got {slot_mapping.dtype}")

    check_same_dtype("value", value, "key", key)
    if len(caches) == 2:
        check_same_dtype("value_cache", caches[1], "key_cache", caches[0])
    stored = _format(kv_cache_dtype, key.dtype, caches[0].dtype, names[0])
    scales = where.scales
    scale_names = array_names(len(caches), 2)[len(caches) :]
    if scale_caches:
        if key.dtype not in FLOATS:
            raise TypeError(f"key must have dtype {either(FLOATS)} to be given scales, got {key.dtype}")
        chosen = scale_layout_of(scale_layout, layout.has_layer)
        scales = place_scale_caches(chosen, scale_caches, extents, scale_names)
    scaled = stored.name not in FLOATS and key.dtype not in FP8 and not scale_caches and not mla
    steps = [
        0 if scale is None else check_scale(name, scale, heads)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
    ]
    check_layer(layer, layout, extents.num_layers)
    named = [("key", key), ("value", value), *zip(names, caches, strict=True), ("slot_mapping", slot_mapping)]
    named += [("k_scale", k_scale), ("v_scale", v_scale), *zip(scale_names, scale_caches, strict=False)]
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
        scaled=scaled and (k_scale is not None or v_scale is not None),
        head_scales=(steps[0], steps[1]),
        scales=scales,
    )


def check_mla(kv_c: ArraySpec, k_pe: ArraySpec, kv_cache: ArraySpec, kv_cache_dtype: str, layer: object) -> None:
    """Checks what `concat_and_cache_mla` asks beyond `check_write`, under the names of its own arguments.

    Raises:
        ValueError: a shape or a choice does not fit.
        TypeError: a dtype does not fit.
    """
    check_rank("kv_c", kv_c, 2, "(num_tokens, kv_lora_rank)")
    check_rank("k_pe", k_pe, 2, "(num_tokens, qk_rope_head_dim)")
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    rank, rope = kv_c.shape[1], k_pe.shape[1]
    if k_pe.shape[0] != kv_c.shape[0]:
        raise ValueError(f"k_pe must have shape ({kv_c.shape[0]}, {rope}), got {shape_of(k_pe)}")
    if stored == FP8_DS_MLA:
        if rank != DS_MLA_LATENT or rope not in (DS_MLA_ROPE, 0):
            raise ValueError(
                f"kv_c must have {DS_MLA_LATENT} columns, and k_pe {DS_MLA_ROPE} or none, for kv_cache_dtype "
                f"'fp8_ds_mla', got {rank} and {rope}"
            )
        rope = DS_MLA_ROPE
    elif stored is not None:
        check_head_size("kv_c's columns", stored, rank)
        check_head_size("k_pe's columns", stored, rope)
    check_same_dtype("k_pe", k_pe, "kv_c", kv_c)
    if kv_c.dtype not in FLOATS:
        raise TypeError(f"kv_c must have dtype {either(FLOATS)}, got {kv_c.dtype}")
    units = stored_size(stored, rank + rope)
    axes = "(num_blocks, block_size, " if layer is None else "(num_layers, num_blocks, block_size, "
    if len(kv_cache.shape) != (3 if layer is None else 4) or kv_cache.shape[-1] != units:
        raise ValueError(f"kv_cache must have shape {axes}{units}), got {shape_of(kv_cache)}")


def split_of_latent(rank: int) -> int:
    """Where a row without a rotary part is split, to be written as two parts: where every format lets it be."""
    return rank // 32 * 16


def _layout(
    layout: str | CacheLayout | None,
    caches: Sequence[ArraySpec],
    layer: int | ArraySpec | None,
    quantised: FloatFormat | None,
) -> CacheLayout:
    if layout is None and len(caches) == 1:  # whatever its rank: no other single array is written by default
        layout = CacheLayout.MLA if quantised == FP8_DS_MLA else CacheLayout.PACKED_NHD
        layout = layout if layer is None else layout.with_layer()
    chosen = layout_of(layout, caches, layer)
    if chosen.latent and quantised != FP8_DS_MLA:
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
        if cache not in storage_of(quantised):
            raise TypeError(
                f"{cache_name} must have dtype {either(storage_of(quantised))} "
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
