"""Writing and reading the paged cache in torch."""

import torch
from torch import Tensor

import torchkv

from .cache import FP8_FORMATS, CacheSpec, Reading

Cache = tuple[Tensor, ...]
"""Key and value cache, or one tensor for both."""


def new_cache(spec: CacheSpec, device: torch.device) -> Cache:
    dtype = getattr(torch, spec.dtype)
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in spec.shapes)


def write(spec: CacheSpec, cache: Cache, key: Tensor, value: Tensor, slots: Tensor, layer: int) -> None:
    """Writes a layer's keys and values [num_tokens, heads, dim] to `slots` [num_tokens]; -1 is skipped."""
    kind, layout = spec.kv_cache_dtype, spec.layout
    if layout.single_array:
        (kv_cache,) = cache
        torchkv.reshape_and_cache_flash_diffkv(key, value, kv_cache, slots, kind, layout=layout, layer=layer)
    else:
        key_cache, value_cache = cache
        torchkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, kind, layout=layout, layer=layer)


def read(spec: CacheSpec, cache: Cache, tables: Tensor, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gathers one layer's keys and values of each sequence, [num_sequences, heads, context, dim] each."""
    key, value = spec.readings
    return (
        _gather(spec, cache[0], key, tables, layer, dtype),
        _gather(spec, cache[-1], value, tables, layer, dtype),
    )


def _gather(spec: CacheSpec, tensor: Tensor, how: Reading, tables: Tensor, layer: int, dtype: torch.dtype) -> Tensor:
    index: list[Tensor | int | slice] = [slice(None)] * len(how.shape)
    index[how.layer_axis] = layer
    if how.kv_axis is not None:
        index[how.kv_axis] = how.kv
    view = tensor.view(how.shape)[tuple(index)]  # a view without the two axes: nothing is copied yet
    block_axis = how.block_axis - sum(
        axis < how.block_axis for axis in (how.layer_axis, how.kv_axis) if axis is not None
    )
    found = view.movedim(block_axis, 0)[tables].permute(how.order)
    sequences, blocks, slots, heads = found.shape[:4]
    found = found.reshape(sequences, blocks * slots, heads, -1)[..., how.start : how.stop]
    if spec.kv_cache_dtype in FP8_FORMATS:
        found = found.contiguous().view(getattr(torch, FP8_FORMATS[spec.kv_cache_dtype]))
    return found.to(dtype).transpose(1, 2)
