"""Copies, swaps and zeros of whole blocks, whatever they hold."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcore.choices import Layout, TorchBackend
from kvcore.contract.checks import check_options
from kvcore.layout import CacheLayout
from torchkv._arguments import BACKENDS, as_memory, as_pattern, as_scale_pattern, check_tensors, refuse_gradients
from torchkv._library import blocks as _library
from torchkv._library import swap as _swap
from torchkv._library.base import call, call_again


def copy_blocks(
    caches: Tensor | Sequence[Tensor],
    pairs: Tensor,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Copies blocks of a cache to other blocks of it, bit for bit, in place.

    All blocks are read before one is written: after pairs `[[1, 2], [2, 3]]`, block 3 holds what block 2 held, and
    `[[1, 2], [2, 1]]` swaps two. Pairs with a block that does not exist are skipped: -1 is for padding. If two pairs
    have one destination, each element is that of one of the two, unspecified which.

    Arrays with an axis `layer` are copied in all layers. One launch does it all, two from 1,025 pairs on. Where no
    pair writes what another reads, the time comes close to that of a plain copy of the same bytes; chains of pairs are
    slower, as one program copies the same part of all their blocks, one after the other.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it; what is allocated, from 1,025 pairs on, is 16 bytes a pair. Tensors may be strided.

    Args:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both, of any dtype of a cache; then
            `k_scale_cache, v_scale_cache` where each token's head has a scale.
        pairs: `[n, 2]` of int32 or int64: source and destination.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD or any other order with `block` in front:
            4 axes, or 5 of a head-major key cache; of one array, 3 or 4.
        scale_layout: Pattern of the scale caches; None means `block slot head`, or `layer block slot head`.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or caches or scale caches overlap.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> key_cache, value_cache = torch.arange(8.0).reshape(2, 4, 1, 1, 1)  # 4 blocks of 1 slot, 1 head of 1 element
        >>> torchkv.copy_blocks((key_cache, value_cache), torch.tensor([[1, 2], [2, 3], [-1, 0]]))
        >>> key_cache.ravel().tolist(), value_cache.ravel().tolist()
        ([0.0, 1.0, 1.0, 2.0], [4.0, 5.0, 5.0, 6.0])

    After `copy_blocks` of vLLM.
    """
    _move(_library.copy_blocks, "copy_blocks", caches, pairs, layout, scale_layout, backend)


def zero_blocks(
    caches: Tensor | Sequence[Tensor],
    blocks: Tensor,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Fills blocks of a cache with zero bytes, which are zeros in every format, in place.

    Blocks that do not exist are skipped: -1 is for padding. Arrays with an axis `layer` are filled in all layers, by
    one launch.

    Everything runs on the current stream of the tensors' device; nothing is synchronised or allocated, so that CUDA
    graphs can capture it. Tensors may be strided.

    Args:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both, of any dtype of a cache; then
            `k_scale_cache, v_scale_cache` where each token's head has a scale.
        blocks: `[n]` of int32 or int64.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD or any other order with `block` in front:
            4 axes, or 5 of a head-major key cache; of one array, 3 or 4.
        scale_layout: Pattern of the scale caches; None means `block slot head`, or `layer block slot head`.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or caches or scale caches overlap.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> kv_cache = torch.arange(1.0, 5.0).reshape(4, 1, 1, 1)  # 4 blocks of 1 slot, 1 head of 1 element
        >>> torchkv.zero_blocks((kv_cache,), torch.tensor([2, -1]))
        >>> kv_cache.ravel().tolist()
        [1.0, 2.0, 0.0, 4.0]
    """
    _move(_library.zero_blocks, "zero_blocks", caches, blocks, layout, scale_layout, backend)


def swap_blocks(
    source: Tensor | Sequence[Tensor],
    destination: Tensor | Sequence[Tensor],
    pairs: Tensor,
    *,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    backend: TorchBackend | None = None,
) -> None:
    """Copies blocks of a cache to blocks of another one, to the host's memory or from it, in place.

    One of the two is in pinned memory, the other one on a GPU. Both may be on one device, too: where they are says
    which way blocks go. They have the same layout and format, and any numbers of blocks. Pairs with a block that does
    not exist are skipped: -1 is for padding. If two pairs have one destination, each element is that of one of the two,
    unspecified which.

    Arrays with an axis `layer` are copied in all layers. On a GPU one launch does it all, wherever the blocks are: the
    kernel loads from pinned memory, or stores there, by the bus.

    Everything runs on the current stream of the GPU, where pairs are, too, and nothing is synchronised, so that CUDA
    graphs can capture it: before the host reads its memory, or writes there, it waits for the stream. Pinned memory
    that nobody refers to any longer is kept until the stream is done with it, but for that of graphs. Tensors may be
    strided.

    Args:
        source: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both, of any dtype of a cache; then
            `k_scale_cache, v_scale_cache` where each token's head has a scale. It stays as it is.
        destination: As many tensors, of the same dtypes and shapes but for the axis `block`.
        pairs: `[n, 2]` of int32 or int64: a block of source and one of destination.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD or any other order with `block` in front:
            4 axes, or 5 of a head-major key cache; of one array, 3 or 4.
        scale_layout: Pattern of the scale caches; None means `block slot head`, or `layer block slot head`.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, memory of the host is not pinned, or caches or scale
            caches overlap.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> cache = torch.arange(4.0).reshape(4, 1, 1, 1)  # 4 blocks of 1 slot, 1 head of 1 element
        >>> host = torch.zeros(2, 1, 1, 1)  # with a GPU: pin_memory=True
        >>> torchkv.swap_blocks(cache, host, torch.tensor([[3, 0], [1, 1], [-1, 0]]))
        >>> host.ravel().tolist()
        [3.0, 1.0]

    After `swap_blocks` of vLLM.
    """
    ours, theirs = as_memory(source, "source"), as_memory(destination, "destination")
    arguments = (*ours, *theirs, pairs, as_pattern(layout), as_scale_pattern(scale_layout), backend)
    if call_again(_swap.swap_blocks, arguments) is None:
        check_options("auto", None, None, None, backend, BACKENDS)
        check_tensors(pairs=pairs)
        refuse_gradients("swap_blocks", *arguments[:8])
        call(_swap.swap_blocks, arguments)


def _move(op: Any, name: str, caches: Any, indices: Any, layout: Any, scale_layout: Any, backend: Any) -> None:
    """Checks what the contract does not see, and calls an op of this name."""
    arguments = (*as_memory(caches), indices, as_pattern(layout), as_scale_pattern(scale_layout), backend)
    if call_again(op, arguments) is None:
        check_options("auto", None, None, None, backend, BACKENDS)
        check_tensors(**{"pairs" if op is _library.copy_blocks else "blocks": indices})
        refuse_gradients(name, *arguments[:4])
        call(op, arguments)
