"""The public function that moves a cache into another one."""

from typing import Any

import torch
from torch import Tensor

from kvcore.cache_spec import check_any_cache
from kvcore.choices import TorchBackend
from kvcore.contract.checks import check_backend, check_indices, check_scale_type
from kvcore.contract.relayout import chunk_of
from kvcore.relayout import between, in_one_launch, moves_bits
from torchkv._arguments import (
    BACKENDS,
    as_memory,
    as_pattern,
    as_scale,
    as_scale_pattern,
    check_tensors,
    refuse_gradients,
    spec_of,
)
from torchkv._library import relayout as _library
from torchkv._library.base import call, call_again


def relayout(
    source: Any,
    destination: Any,
    pairs: Tensor | None = None,
    *,
    requantise: bool | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Moves what slots of a cache hold into slots of another one, of another layout, block size or format, in place.

    Where formats are the same, the stored bits move, scales of each token and head among them; static scales stay each
    cache's own. Else, or with requantise, keys and values are read, and written as `write` does; on their way they are
    float32 if both are quantised. All layers move. Either is one launch, but latent rows of other formats are read and
    written a chunk of slots at a time.

    DTensors, with `torchkv.distributed`, must have heads split alike; of a source that is replicated, each rank takes
    its own.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it. Tensors may be strided, and no byte of the one cache may be one of the other.

    Args:
        source: A `PagedKVCache`, which stays as it is.
        destination: Another one, with as many layers, heads and elements of a head.
        pairs: `[n, 2]` of int32 or int64: a slot of source and one of destination. Pairs with a slot that does not
            exist are skipped: -1 is for padding. If two pairs have one destination, each element is that of one of the
            two. None: every slot of source, to the slot of the same number.
        requantise: Whether keys and values are read and written although formats are the same: for other static
            scales. None: where formats differ.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernels in their
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: an extent, a shape, a choice or a device does not fit, or source and destination overlap.
        TypeError: a dtype or a type does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> extents = dict(num_heads=1, head_size=1, dtype="float32")
        >>> old = torchkv.PagedKVCache.create(num_blocks=4, block_size=2, **extents)
        >>> old.write(torch.arange(8.0).reshape(8, 1, 1), torch.zeros(8, 1, 1), torch.arange(8))
        >>> new = torchkv.PagedKVCache.create(num_blocks=2, block_size=4, layout="HND", **extents)
        >>> torchkv.relayout(old, new, torch.tensor([[6, 0], [7, 1], [-1, 5]]))
        >>> new.caches[0].ravel().tolist()
        [6.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        >>> old.relayout(new)
        >>> new.caches[0].ravel().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    check_any_cache(source)
    check_any_cache(destination)
    check_backend(backend, BACKENDS)
    if pairs is not None:
        check_tensors(pairs=pairs)
    spec, target = source.spec, destination.spec
    bits = moves_bits(spec, target, pairs is None, requantise)
    if not bits and not in_one_launch(spec, target):
        _rewrite(source, destination, pairs, backend)
        return
    numbers: tuple[Any, ...] = (None,) * 5
    if not bits:
        numbers = (spec.kv_cache_dtype, *_static_scales(source), *_static_scales(destination))
    arguments = (
        *as_memory(destination._memory), list(source._memory), pairs, target.kv_cache_dtype,
        as_pattern(target.layout), as_scale_pattern(target.scale_layout), as_pattern(spec.layout),
        as_scale_pattern(spec.scale_layout), spec.head_size, spec.reading["head_size_v"], backend, *numbers,
    )  # fmt: skip
    if call_again(_library.relayout, arguments) is None:
        refuse_gradients("relayout", *destination._memory, *source._memory)
        call(_library.relayout, arguments)


def _static_scales(cache: Any) -> tuple[Tensor | None, Tensor | None]:
    if cache.spec.scale_layout is not None:
        return None, None
    for name in ("k_scale", "v_scale"):
        check_scale_type(name, getattr(cache, name))
    return as_scale(cache.k_scale, cache.caches[0]), as_scale(cache.v_scale, cache.caches[0])


# ---- where numbers move, and no kernel does all of it


def _rewrite(source: Any, destination: Any, pairs: Tensor | None, backend: Any) -> None:
    """Reads keys and values of chunks of slots, and writes them."""
    spec, target = source.spec, destination.spec
    num_slots = spec.num_blocks * spec.block_size
    if pairs is None:
        slots = targets = torch.arange(num_slots, device=source.caches[0].device)
    else:
        check_indices("pairs", spec_of(pairs), ("n", 2))
        slots = pairs[:, 0]
        targets = pairs[:, 1].where((slots >= 0) & (slots < num_slots), -1)
    chunk = chunk_of(spec.num_heads, spec.head_size, spec.head_size_v, slots.shape[0])
    for layer in [None] if spec.num_layers is None else range(spec.num_layers):
        for some, places in zip(slots.split(chunk), targets.split(chunk), strict=True):
            key, value = source.read(some, dtype=between(spec, target), layer=layer, backend=backend)
            if target.layout.latent:  # kv_c and k_pe
                key, value = key[:, 0, : target.head_size_v], key[:, 0, target.head_size_v :]
            destination.write(key, value, places, layer=layer, backend=backend)
