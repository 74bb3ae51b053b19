"""How a cache is moved into another one: what is asked of both, and whether bits move or numbers."""

from typing import Any

from kvcore.cache_spec import CacheSpec
from kvcore.contract import relayout as contract
from kvcore.contract.relayout import check_room
from kvcore.formats import FLOATS, KV_CACHE_DTYPES, FloatFormat


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


def in_one_launch(source: CacheSpec, destination: CacheSpec) -> bool:
    """Whether one kernel reads and writes, where numbers move. Of latent rows, K and V are written by another op."""
    return not source.layout.latent and not destination.layout.latent


def between(source: CacheSpec, destination: CacheSpec) -> str:
    """The dtype of keys and values on their way, where numbers move: the narrowest that loses none."""
    return contract.between(_format(source), _format(destination))


def _format(spec: CacheSpec) -> FloatFormat:
    return KV_CACHE_DTYPES[spec.kv_cache_dtype] or FLOATS[spec.dtype]


def _kind(spec: CacheSpec) -> tuple[Any, ...]:
    dtype = spec.dtype if spec.kv_cache_dtype == "auto" else None
    return KV_CACHE_DTYPES[spec.kv_cache_dtype], dtype, spec.scale_layout is not None, spec.layout.latent
