"""`relayout`, in place of the destination, as torch.library knows it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcore.contract.relayout import Relayout
from torchkv._arguments import refuse_gradients
from torchkv._library.base import Backends, call_each, define
from torchkv._relayout import RelayoutCall
from torchkv._torch import relayout as torch_relayout
from torchkv._triton.relayout import Relayouts

_SCHEMA = (
    "relayout(Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor(c!)? k_scale_cache, Tensor(d!)? v_scale_cache, "
    "Tensor[] source, Tensor? pairs, str kv_cache_dtype, str layout, str? scale_layout, str source_layout, "
    "str? source_scale_layout, int head_size, int? head_size_v, str? backend, str? source_kv_cache_dtype=None, "
    "Tensor? source_k_scale=None, Tensor? source_v_scale=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()"
)


def _fake(described: Relayout, call: RelayoutCall) -> None:
    """The op has no results: that the call was checked is all."""


def _vmap(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[None, None]:
    """A call for each item. A destination that is not mapped cannot hold the items of those that are."""
    mapped = [dim is not None for dim, cache in zip(in_dims[:4], args, strict=False) if cache is not None]
    if not all(mapped):
        raise ValueError("vmap must map all arrays of the destination")
    call_each(op, batch_size, in_dims, args)
    return None, None


def _call_of(
    key_cache: Tensor,
    value_cache: Tensor | None,
    k_scale_cache: Tensor | None,
    v_scale_cache: Tensor | None,
    source: Sequence[Tensor],
    pairs: Tensor | None,
    *rest: Any,
) -> RelayoutCall:
    refuse_gradients("relayout", key_cache, value_cache, k_scale_cache, v_scale_cache, *source)
    caches = (key_cache,) if value_cache is None else (key_cache, value_cache)
    scale_caches = tuple(cache for cache in (k_scale_cache, v_scale_cache) if cache is not None)
    return RelayoutCall(caches, scale_caches, tuple(source), pairs, *rest)


relayout = define(_SCHEMA, _call_of, Relayouts(), Backends(torch_relayout.relayout, _fake), _vmap)
