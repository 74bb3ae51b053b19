"""Caches between which blocks are swapped: alike but for how many blocks they have."""

from kvcore.cache_spec import CacheSpec
from kvcore.contract.swap import HINT


def with_blocks(spec: CacheSpec, num_blocks: int | None, memory: int | str | None) -> CacheSpec:
    """A spec with another number of blocks, or with as many as fit into memory.

    Raises:
        ValueError: num_blocks is negative, or memory has no room for a block.
        TypeError: one is of another type, or both or neither are given.
    """
    scale_layout = None if spec.scale_layout is None else spec.scale_layout.pattern.replace(" dim", "")
    return CacheSpec.create(
        spec.num_layers, num_blocks, spec.block_size, spec.num_heads, spec.head_size, spec.head_size_v,
        spec.dtype if spec.kv_cache_dtype == "auto" else "bfloat16",  # of a quantised cache it is none of elements
        spec.layout, spec.kv_cache_dtype, scale_layout is not None, scale_layout, memory=memory,
    )  # fmt: skip


def check_alike(source: CacheSpec, destination: CacheSpec) -> None:
    """Raises unless blocks of a cache fit into another one: only their numbers of blocks may differ.

    Raises:
        ValueError: something else differs; the message names it.
    """
    theirs = destination.plain()
    for name, value in source.plain().items():
        if name != "num_blocks" and theirs[name] != value:
            raise ValueError(f"destination must have {name} {value!r}, as source, got {theirs[name]!r}{HINT}")
