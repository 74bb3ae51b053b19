"""How many blocks of a cache fit into memory."""

from typing import Any

from kvcore.cache_spec import CacheSpec
from kvcore.choices import KVCacheDtype, Layout
from kvcore.nbytes import bytes_of


def blocks_that_fit(
    nbytes: int | str,
    *,
    block_size: int,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_size: int,
    num_layers: int | None = None,
    head_size_v: int | None = None,
    dtype: Any = "bfloat16",
    layout: Layout = "NHD",
    kv_cache_dtype: KVCacheDtype = "auto",
    per_token_head: bool = False,
    scale_layout: str | None = None,
) -> int:
    """How many blocks, per layer, a `PagedKVCache` of so many bytes has: all of its arrays count, scale caches too.

    The other arguments are those of `PagedKVCache.create`, which takes `memory` itself.

    Args:
        nbytes: Bytes for all layers together, or text such as `"2GiB"`.
        block_size: Slots per block.
        num_heads: KV heads.
        num_kv_heads: Another name of num_heads; one of the two is given.
        head_size: Elements of a key head.
        num_layers: Layers; None for a cache of one layer.
        head_size_v: Elements of a value head; None means `head_size`.
        dtype: float16, bfloat16 or float32, by name or as NumPy's, JAX's or torch's.
        layout: Pattern, constant's name or `CacheLayout`.
        kv_cache_dtype: What is stored: "auto" for elements of dtype, or a format.
        per_token_head: Whether each head of a token has a scale of its own.
        scale_layout: With these, the pattern of the scale caches; None means `block slot head`.

    Returns:
        The largest number of blocks whose bytes are at most nbytes; 0 where not even one fits.

    Raises:
        ValueError: nbytes is negative, or text that says no number of bytes; or an extent, layout or choice does not
            fit.
        TypeError: a dtype or type does not fit.

    Example:
        >>> blocks_that_fit("2GiB", num_layers=32, block_size=16, num_heads=8, head_size=128)
        1024
        >>> blocks_that_fit("2GiB", num_layers=32, block_size=16, num_heads=8, head_size=128, kv_cache_dtype="fp8")
        2048
    """
    room = bytes_of("nbytes", nbytes)
    spec = CacheSpec.create(
        num_layers, 1, block_size, num_heads, head_size, head_size_v, _dtype_name(dtype), layout, kv_cache_dtype,
        per_token_head, scale_layout, num_kv_heads,
    )  # fmt: skip
    return room // spec.nbytes


def _dtype_name(dtype: Any) -> str:
    """The name of a framework's dtype, which is a class with a name, an object with one, or printed as one."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "__name__" if isinstance(dtype, type) else "name", None)
    return name if isinstance(name, str) else str(dtype).removeprefix("torch.")
