"""`swap_blocks`, in place of its destination, as torch.library knows it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcore.contract.swap import Swap
from torchkv._arguments import refuse_gradients
from torchkv._library.base import Backends, call_each, define
from torchkv._swap import SwapCall
from torchkv._torch import swap as torch_swap
from torchkv._triton.swap import Swaps

_SCHEMA = (
    "swap_blocks(Tensor source_key_cache, Tensor? source_value_cache, Tensor? source_k_scale_cache, "
    "Tensor? source_v_scale_cache, Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor(c!)? k_scale_cache, "
    "Tensor(d!)? v_scale_cache, Tensor pairs, str? layout, str? scale_layout, str? backend) -> ()"
)
_DESTINATION, _PAIRS = 4, 8
"""The places of the first cache that is written, and of pairs, among the arguments."""


def _fake(described: Swap, call: SwapCall) -> None:
    """The op has no results: that the call was checked is all."""


def _vmap(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[None, None]:
    """A destination that is mapped is changed by a call for each item. Else the batch is more pairs of one source."""
    mapped = [dim is not None for dim, cache in zip(in_dims[:_PAIRS], args, strict=False) if cache is not None]
    source, destination = mapped[: len(mapped) // 2], mapped[len(mapped) // 2 :]
    if any(destination) or any(source):
        if not all(destination):
            raise ValueError("vmap must map all caches of destination, or none and none of source")
        call_each(op, batch_size, in_dims, args)
    else:
        pairs = args[_PAIRS].movedim(in_dims[_PAIRS], 0).flatten(0, 1)
        op(*args[:_PAIRS], pairs, *args[_PAIRS + 1 :])
    return None, None


def _parts(arguments: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Caches, and scale caches, of those that there are."""
    caches, scales = (tuple(t for t in some if t is not None) for some in (arguments[:2], arguments[2:]))
    return caches, scales


def _call_of(*arguments: Any) -> SwapCall:
    refuse_gradients("swap_blocks", *arguments[:_PAIRS])
    return SwapCall(*_parts(arguments[:_DESTINATION]), *_parts(arguments[_DESTINATION:_PAIRS]), *arguments[_PAIRS:])


_BACKENDS = Backends(torch_swap.swap_blocks, _fake)
swap_blocks = define(_SCHEMA, _call_of, Swaps(), _BACKENDS, _vmap)
