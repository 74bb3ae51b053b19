"""The contract of a cache: the part that all ops have in common which write or read one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kvcore.arrays import ArraySpec, array_names, check_integers
from kvcore.contract.checks import check_devices, check_layer, check_same_dtype, check_scale, either, layout_of
from kvcore.formats import (
    DS_MLA_ROPE,
    FLOATS,
    FP8,
    FP8_DS_MLA,
    KV_CACHE_DTYPES,
    PER_TOKEN_HEAD,
    FloatFormat,
    check_head_size,
    storage_of,
)
from kvcore.layout import CacheLayout
from kvcore.placement import Address, Extents, Placement
from kvcore.scales import Scales, place_scale_caches, place_stored, scale_layout_of


class CacheArguments(NamedTuple):
    """What an op is told of a cache; nothing of it is checked yet.

    Attributes:
        caches: The key and the value cache, or the one array with both.
        kv_cache_dtype: A name of `KV_CACHE_DTYPES`.
        k_scale: The static scale of K: one float32 element, or one a head, or a row of either for each layer; None for
            1.
        v_scale: The static scale of V, of the same shapes.
        layout: Pattern, layout, or None for the default.
        layer: A static index, the spec of one in memory, or None.
        scale_caches: Those of K and of V, where each token's head has a scale of its own; else empty.
        scale_layout: Their pattern, or None for the default.
        scale_names: What errors call the scale caches.
    """

    caches: Sequence[ArraySpec]
    kv_cache_dtype: str = "auto"
    k_scale: ArraySpec | None = None
    v_scale: ArraySpec | None = None
    layout: str | CacheLayout | None = None
    layer: int | ArraySpec | None = None
    scale_caches: Sequence[ArraySpec] = ()
    scale_layout: str | CacheLayout | None = None
    scale_names: tuple[str, str] = ("k_scale_cache", "v_scale_cache")

    @property
    def names(self) -> tuple[str, ...]:
        """What errors call the caches."""
        return array_names(len(self.caches))

    @property
    def quantised(self) -> FloatFormat | None:
        """The format that kv_cache_dtype names; None where the caches' own dtype decides."""
        return KV_CACHE_DTYPES[self.kv_cache_dtype]

    @property
    def static_scales(self) -> tuple[tuple[str, ArraySpec | None], ...]:
        """The static scales, with their names."""
        return ("k_scale", self.k_scale), ("v_scale", self.v_scale)


class Cache(NamedTuple):
    """A cache that fulfils the contract; hashable, and all that a plan or an implementation needs of it.

    Attributes:
        layout: Never None.
        placement: Extents and addresses of K and V, counted in stored units: elements, or bytes of two. Of fp8_ds_mla,
            those of the part in fp8.
        dtype: dtype of the array or arrays.
        format: What they hold.
        head_scales: Steps from one head's static scale to the next, of k_scale and v_scale; 0: one scale for all heads.
        layer_scales: Steps from one layer's static scales to the next, of both; 0: the same scales for all layers.
        scales: The scales that are computed in writing, or None. Unless they lie inside the caches, scale caches hold
            them.
        rope: The rotary part of fp8_ds_mla, which is in bfloat16, counted in elements of that; else None.
    """

    layout: CacheLayout
    placement: Placement
    dtype: str
    format: FloatFormat
    head_scales: tuple[int, int]
    layer_scales: tuple[int, int]
    scales: Scales | None
    rope: Address | None

    @property
    def extents(self) -> Extents:
        """Sizes of the cache."""
        return self.placement.extents

    @property
    def scale_strides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Steps from one head's static scale to the next, and from one layer's: of K, and of V."""
        k_strides, v_strides = zip(self.head_scales, self.layer_scales, strict=True)
        return k_strides, v_strides

    @property
    def scaled(self) -> bool:
        """Whether k_scale and v_scale mean anything."""
        return self.format.name not in FLOATS and self.rope is None

    @property
    def head_size(self) -> int:
        """Elements of a key head."""
        rope = 0 if self.rope is None else DS_MLA_ROPE
        return self.extents.head_units * self.format.elements_per_unit + rope

    @property
    def head_size_v(self) -> int:
        """Elements of a value head."""
        return self.extents.head_units_v * self.format.elements_per_unit


def check_cache_count(num_caches: int) -> None:
    """Checks that there is a key and a value cache, or one array with both.

    Raises:
        ValueError: there are more, or none.
    """
    if num_caches not in (1, 2):
        raise ValueError(f"caches must be (key_cache, value_cache) or one array, got {num_caches} arrays")


def check_cache_address(stored: FloatFormat, address: int) -> None:
    """Checks that a cache begins at an address from which the scales inside it can be read.

    Raises:
        ValueError: its rows hold float32 scales, and it begins at no multiple of 4 bytes.
    """
    if stored == FP8_DS_MLA and address % 4:
        raise ValueError(
            f"kv_cache must begin at a multiple of 4 bytes for kv_cache_dtype 'fp8_ds_mla', got address {address:#x}"
        )


def check_per_token_head(kv_cache_dtype: str) -> None:
    """Checks that a format can have a scale for each token and head.

    Raises:
        ValueError: it cannot.
    """
    if kv_cache_dtype not in PER_TOKEN_HEAD:
        raise ValueError(
            f"kv_cache_dtype must be {either(map(repr, PER_TOKEN_HEAD))} with scales for each token and head, "
            f"got {kv_cache_dtype!r}"
        )


def check_stored_dtype(arguments: CacheArguments, allowed: Mapping[str, FloatFormat], condition: str) -> FloatFormat:
    """Checks the caches' dtype.

    Args:
        arguments: The cache.
        allowed: The dtypes that it may have for kv_cache_dtype "auto", with the format of each.
        condition: What else the allowed dtypes depend on, in the error's words: " and key of dtype float32".

    Returns:
        What the cache holds.

    Raises:
        TypeError: the dtype does not fit kv_cache_dtype.
    """
    quantised, name, dtype = arguments.quantised, arguments.names[0], arguments.caches[0].dtype
    if quantised is None:
        if dtype not in allowed:
            raise stored_dtype_error(name, allowed, "auto", dtype, condition)
        return allowed[dtype]
    if dtype not in storage_of(quantised):
        raise stored_dtype_error(name, storage_of(quantised), arguments.kv_cache_dtype, dtype)
    return quantised


def stored_dtype_error(
    name: str, allowed: Iterable[str], kv_cache_dtype: str, dtype: str, condition: str = ""
) -> TypeError:
    """The error for a cache whose dtype is none of those that go with kv_cache_dtype, and with the condition."""
    return TypeError(
        f"{name} must have dtype {either(allowed)} for kv_cache_dtype {kv_cache_dtype!r}{condition}, got {dtype}"
    )


def check_scale_caches(arguments: CacheArguments, layout: CacheLayout, extents: Extents) -> Scales:
    """Finds the scales of tokens and heads in the scale caches.

    Raises:
        ValueError: a shape or the pattern does not fit.
        TypeError: a dtype is not float32.
    """
    scale_layout = scale_layout_of(arguments.scale_layout, layout.has_layer)
    return place_scale_caches(scale_layout, arguments.scale_caches, extents, arguments.scale_names)


def check_static_scales(arguments: CacheArguments, extents: Extents) -> tuple[tuple[int, int], tuple[int, int]]:
    """Checks k_scale and v_scale.

    Returns:
        `Cache.head_scales` and `Cache.layer_scales`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not float32.
    """
    (k_layer, k_head), (v_layer, v_head) = (
        (0, 0) if scale is None else check_scale(name, scale, extents.num_heads, extents.num_layers)
        for name, scale in arguments.static_scales
    )
    return (k_head, v_head), (k_layer, v_layer)


def check_cache_devices(arguments: CacheArguments, operands: Iterable[tuple[str, ArraySpec | None]]) -> None:
    """Checks that the arrays of a cache, and the other operands of an op, are on one device.

    Raises:
        ValueError: one is elsewhere.
    """
    named = [*operands, *zip(arguments.names, arguments.caches, strict=True), *arguments.static_scales]
    named += zip(arguments.scale_names, arguments.scale_caches, strict=False)
    if isinstance(arguments.layer, ArraySpec):
        named.append(("layer", arguments.layer))
    check_devices(named, arguments.names[0], arguments.caches[0])


def check_cache(arguments: CacheArguments, head_size: int | None, head_size_v: int | None) -> Cache:
    """Checks the cache that an op reads.

    Args:
        arguments: The cache; where its k_scale and v_scale have more than two axes, they are scale caches.
        head_size: Elements of a key head, where the layout does not tell.
        head_size_v: Elements of a value head, where the layout does not tell.

    Raises:
        ValueError: a shape, an extent or a choice does not fit.
        TypeError: a dtype or a type does not fit.
    """
    caches, quantised = arguments.caches, arguments.quantised
    layout = _layout(arguments)
    check_integers(head_size=head_size, head_size_v=head_size_v)
    for name, size in (("head_size", head_size), ("head_size_v", head_size_v)):
        if quantised is not None and size is not None and quantised != FP8_DS_MLA:
            check_head_size(name, quantised, size)
    stored = place_stored(layout, caches, quantised, head_size, head_size_v, arguments.names)
    extents = stored.placement.extents
    if len(caches) == 2:
        check_same_dtype("value_cache", caches[1], "key_cache", caches[0])
    check_layer(arguments.layer, layout, extents.num_layers)
    held = check_stored_dtype(arguments, FLOATS | FP8, "")
    scales, head_scales, layer_scales = stored.scales, (0, 0), (0, 0)
    if stored.rope is not None:
        for name, scale in arguments.static_scales:
            if scale is not None:
                raise ValueError(f"{name} must be None for kv_cache_dtype 'fp8_ds_mla', whose rows have their own")
    elif any(scale is not None and len(scale.shape) > 2 for _, scale in arguments.static_scales):
        scales = check_scale_caches(_with_scale_caches(arguments, layout), layout, extents)
    else:
        head_scales, layer_scales = check_static_scales(arguments, extents)
    cache = Cache(layout, stored.placement, caches[0].dtype, held, head_scales, layer_scales, scales, stored.rope)
    if head_size_v is not None and head_size_v != cache.head_size_v:
        raise ValueError(f"head_size_v must be {cache.head_size_v}, as in the cache, got {head_size_v}")
    return cache


def _layout(arguments: CacheArguments) -> CacheLayout:
    """The layout to read in."""
    caches = arguments.caches
    check_cache_count(len(caches))
    layout = layout_of(arguments.layout, caches, arguments.layer)
    if len(layout.arrays) != len(caches):
        wanted = "one array" if layout.single_array else "(key_cache, value_cache)"
        raise ValueError(f"caches must be {wanted} for layout '{layout}', got {len(caches)} arrays")
    return layout


def _with_scale_caches(arguments: CacheArguments, layout: CacheLayout) -> CacheArguments:
    """The arguments with k_scale and v_scale, of which at least one has the axes of a scale cache, as scale caches."""
    check_per_token_head(arguments.kv_cache_dtype)
    if layout.latent:  # its writer gives the two parts of a row a scale each
        raise ValueError(f"layout must not be '{layout}' with scales for each token and head")
    scale_caches = []
    for name, scale in arguments.static_scales:
        if scale is None:
            raise ValueError(f"{name} must be given where the other one has scales for each token and head")
        scale_caches.append(scale)
    return arguments._replace(scale_caches=scale_caches, scale_names=("k_scale", "v_scale"))
