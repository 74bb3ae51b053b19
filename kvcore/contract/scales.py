"""The contract of `kv_scales`."""

from kvcore.arrays import ArraySpec, shape_of
from kvcore.contract.checks import check_rank, either
from kvcore.formats import E4M3, FLOATS, KV_CACHE_DTYPES, NVFP4, PER_TOKEN_HEAD


def check_kv_scales(key: ArraySpec, value: ArraySpec, kv_cache_dtype: str, granularity: str) -> float:
    """Checks the arguments of `kv_scales`.

    Returns:
        The largest magnitude that a cache holds with a scale of 1: the format's largest number; for nvfp4, that times
        the largest scale of a group.

    Raises:
        ValueError: a shape or a choice does not fit.
        TypeError: a dtype does not fit.
    """
    formats = (*PER_TOKEN_HEAD, NVFP4.name)
    if kv_cache_dtype not in formats:
        raise ValueError(f"kv_cache_dtype must be {either(map(repr, formats))}, got {kv_cache_dtype!r}")
    if granularity not in ("tensor", "head"):
        raise ValueError(f"granularity must be 'tensor' or 'head', got {granularity!r}")
    check_rank("key", key, 3, "(num_tokens, num_heads, head_size)")
    check_rank("value", value, 3, "(num_tokens, num_heads, head_size_v)")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value must have shape (num_tokens, {key.shape[1]}, head_size_v), got {shape_of(value)}")
    for name, spec in (("key", key), ("value", value)):
        if 0 in spec.shape:
            raise ValueError(f"{name} must have at least one element, got shape {shape_of(spec)}")
        if spec.dtype not in FLOATS:
            raise TypeError(f"{name} must have dtype {either(FLOATS)}, got {spec.dtype}")
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    assert stored is not None  # as the names in formats have it
    return stored.largest * (E4M3.largest if stored == NVFP4 else 1)
