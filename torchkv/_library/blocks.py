"""The ops that move whole blocks, in place, as torch.library knows them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvcore.contract.blocks import Blocks
from torchkv._arguments import refuse_gradients
from torchkv._blocks import BlocksCall
from torchkv._library.base import Backends, call_each, define
from torchkv._torch import blocks as torch_blocks
from torchkv._triton.blocks import Moves

_CACHES = "Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor(c!)? k_scale_cache, Tensor(d!)? v_scale_cache"
_REST = "str? layout, str? scale_layout, str? backend"
_INDICES = 4
"""The place of pairs, or of blocks, among the arguments."""


def _fake(described: Blocks, call: BlocksCall) -> None:
    """The ops have no results: that the call was checked is all."""


def _vmap(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[None, None]:
    """Caches that are mapped are changed by a call each. For those that are not, the batch is more pairs or blocks."""
    caches_mapped = [dim is not None for dim, cache in zip(in_dims[:_INDICES], args, strict=False) if cache is not None]
    if any(caches_mapped):
        if not all(caches_mapped):
            raise ValueError("vmap must map all caches or none")
        call_each(op, batch_size, in_dims, args)
    else:
        indices = args[_INDICES].movedim(in_dims[_INDICES], 0).flatten(0, 1)
        op(*args[:_INDICES], indices, *args[_INDICES + 1 :])
    return None, None


_BACKENDS = Backends(torch_blocks.move_blocks, _fake)


def _call_of(name: str, indices: str) -> Callable[..., BlocksCall]:
    """What makes a call of the arguments of an op of this name."""

    def call_of(
        key_cache: Tensor,
        value_cache: Tensor | None,
        k_scale_cache: Tensor | None,
        v_scale_cache: Tensor | None,
        given: Tensor,
        layout: str | None,
        scale_layout: str | None,
        backend: str | None,
    ) -> BlocksCall:
        refuse_gradients(name, key_cache, value_cache, k_scale_cache, v_scale_cache)
        caches = (key_cache,) if value_cache is None else (key_cache, value_cache)
        scale_caches = tuple(cache for cache in (k_scale_cache, v_scale_cache) if cache is not None)
        pairs, blocks = (given, None) if indices == "pairs" else (None, given)
        return BlocksCall(caches, scale_caches, pairs, blocks, layout, scale_layout, backend)

    return call_of


_copy_call, _zero_call = _call_of("copy_blocks", "pairs"), _call_of("zero_blocks", "blocks")
copy_blocks = define(f"copy_blocks({_CACHES}, Tensor pairs, {_REST}) -> ()", _copy_call, Moves(), _BACKENDS, _vmap)
zero_blocks = define(f"zero_blocks({_CACHES}, Tensor blocks, {_REST}) -> ()", _zero_call, Moves(), _BACKENDS, _vmap)
