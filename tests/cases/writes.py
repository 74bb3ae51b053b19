"""Descriptions of writes, for tests that launch nothing."""

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.write import Write, check_write
from kvcore.layout import CacheLayout


def describe(
    layout,
    *,
    num_tokens=67,
    num_heads=8,
    head_size=128,
    head_size_v=None,
    num_blocks=1024,
    block_size=16,
    dtype="bfloat16",
    cache_dtype=None,
    kv_cache_dtype="auto",
    num_layers=None,
    layer=None,
    scaled=True,
) -> Write:
    """What the contract says of such a write."""
    layout = CacheLayout.of(layout)
    if num_layers is not None:
        layout = layout.with_layer()
    head_size_v = head_size_v or head_size
    shapes = layout.shapes(
        num_blocks=num_blocks,
        block_size=block_size,
        num_heads=num_heads,
        head_size=head_size,
        head_size_v=head_size_v,
        num_layers=num_layers,
        x=8 if "dim/x" in layout.pattern else None,
    )
    scale = ArraySpec((), "float32") if kv_cache_dtype != "auto" and scaled else None
    return check_write(
        ArraySpec((num_tokens, num_heads, head_size), dtype),
        ArraySpec((num_tokens, num_heads, head_size_v), dtype),
        ArraySpec((num_tokens,), "int32"),
        CacheArguments(
            [ArraySpec(shape, cache_dtype or dtype) for shape in shapes], kv_cache_dtype, scale, scale, layout, layer
        ),
    )
