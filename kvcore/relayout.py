"""How a cache is moved into another one: what is asked of both, and whether bits move or numbers."""

from typing import Any

from kvcore.cache_spec import CacheSpec
from kvcore.contract.relayout import check_room
from kvcore.formats import KV_CACHE_DTYPES

_CHUNK_ELEMENTS = 2**23
"""About as many elements of keys and values are decoded at once: 32 MiB of float32."""


def moves_bits(source: CacheSpec, destination: CacheSpec, every: bool, requantise: Any) -> bool:
    """Whether what is stored moves as it is.

    Args:
        source: What is read.
        destination: What is written.
        every: Whether all slots of the source are meant.
        requantise: What the caller says: None, True or False.

    Raises:
        ValueError: an extent or a format does not fit.
        TypeError: requantise is neither.
    """
    for name in ("num_layers", "num_heads", "head_size", "head_size_v"):
        wanted, got = getattr(source, name), getattr(destination, name)
        if wanted != got:
            raise ValueError(f"destination must have {name} {wanted}, as source, got {got}")
    check_room(source.num_blocks * source.block_size, destination.num_blocks * destination.block_size, every)
    if requantise not in (None, True, False):
        raise TypeError(f"requantise must be None, True or False, got {requantise!r}")
    alike = _kind(source) == _kind(destination)
    if requantise is False and not alike:
        raise ValueError(
            f"requantise must be None or True where formats or kinds of scales differ, {source} and {destination}, "
            "got False"
        )
    return alike and not requantise


def chunk_of(spec: CacheSpec, num_pairs: int) -> int:
    """Slots of a layer that are decoded at once, where numbers move."""
    of_slot = spec.num_heads * (spec.head_size + spec.head_size_v)
    return max(1, min(num_pairs, _CHUNK_ELEMENTS // max(of_slot, 1)))


def between(source: CacheSpec, destination: CacheSpec) -> str:
    """The dtype of keys and values on their way, where numbers move: the narrowest that loses none.

    Args:
        source: What is read; its own dtype where it is not quantised, and the destination is.
        destination: What is written; its own dtype where it is not quantised, as writing takes no other.
    """
    if destination.kv_cache_dtype == "auto":
        return destination.dtype
    return source.dtype if source.kv_cache_dtype == "auto" else "float32"


def _kind(spec: CacheSpec) -> tuple[Any, ...]:
    dtype = spec.dtype if spec.kv_cache_dtype == "auto" else None
    return KV_CACHE_DTYPES[spec.kv_cache_dtype], dtype, spec.scale_layout is not None, spec.layout.latent
