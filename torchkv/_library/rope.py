"""The ops that rotate queries and keys and write a cache, in place, as torch.library knows them.

`rope_and_cache_out` writes the rotated query to its first argument, which is query where that is None.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from kvcore.contract.rope import Rope
from torchkv._arguments import refuse_gradients
from torchkv._call import WriteCall
from torchkv._library.base import Backends, call_each, define
from torchkv._rotated import RopeCall
from torchkv._torch import rope as torch_rope
from torchkv._triton.rope import Ropes

_ARGUMENTS = (
    "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor(c!)? k_scale_cache, "
    "Tensor(d!)? v_scale_cache, Tensor positions, Tensor cos_sin, Tensor slot_mapping, str rope, int? rotary_dim, "
    "int[]? mrope_section, Tensor? q_norm, Tensor? k_norm, float eps, str kv_cache_dtype, Tensor? k_scale, "
    "Tensor? v_scale, str? layout, str? scale_layout, SymInt? layer, Tensor? layer_index, str? backend"
)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    k_scale_cache: Tensor | None,
    v_scale_cache: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    rope: str,
    rotary_dim: int | None,
    mrope_section: Sequence[int] | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    kv_cache_dtype: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str | None,
    scale_layout: str | None,
    layer: int | None,
    layer_index: Tensor | None,
    backend: str | None,
    out: Tensor | None = None,
) -> RopeCall:
    refuse_gradients(
        "rope_and_cache", query, key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, cos_sin, q_norm,
        k_norm, k_scale, v_scale, out,
    )  # fmt: skip
    caches = (key_cache,) if value_cache is None else (key_cache, value_cache)
    scale_caches = tuple(cache for cache in (k_scale_cache, v_scale_cache) if cache is not None)
    write = WriteCall(
        key, value, caches, scale_caches, slot_mapping, kv_cache_dtype, k_scale, v_scale, layout, layer, layer_index,
        backend, scale_layout,
    )  # fmt: skip
    return RopeCall(
        write, query, positions, cos_sin, q_norm, k_norm, rope, rotary_dim, mrope_section, eps, out
    )  # fmt: skip


def _out_call(out: Tensor, query: Tensor | None, *rest: Any) -> RopeCall:
    return _call(out if query is None else query, *rest, out=out)


def _fake(rope: Rope, call: RopeCall) -> Tensor:
    return call.result()


_BACKENDS = Backends(torch_rope.rope_and_cache, _fake)


# ---- vmap

_TOKENS = ("query", "key", "value", "positions", "slot_mapping")
"""Arguments with an axis of tokens."""


def _vmap(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, int | None]:
    """Where caches are mapped, a call for each item of the batch. Else the batch is more tokens."""
    names = [argument.name for argument in op._schema.arguments]
    dims, given = dict(zip(names, in_dims, strict=True)), dict(zip(names, args, strict=True))
    refuse_gradients("rope_and_cache", *(x for x in args if isinstance(x, Tensor)))
    caches_mapped = [dims[name] is not None for name in _written(given)]
    if any(caches_mapped) and not all(caches_mapped):
        raise ValueError("vmap must map all caches or none")
    if not any(caches_mapped) and dims["slot_mapping"] is None:
        raise ValueError("vmap must map slot_mapping where it does not map the caches")
    if "out" in names:
        if dims["out"] is None:
            raise ValueError("vmap must map the tensors that are given for results")
        call_each(op, batch_size, in_dims, args)
        return None, None
    shared = [dim for name, dim in dims.items() if name not in _TOKENS]
    if any(caches_mapped) or any(dim is not None for dim in pytree.tree_leaves(shared)):
        return torch.stack(call_each(op, batch_size, in_dims, args)), 0
    rows = [
        given[name].expand(batch_size, *given[name].shape) if dims[name] is None else given[name].movedim(dims[name], 0)
        for name in _TOKENS
    ]
    query, key, value, positions, slots = rows
    num_tokens = query.shape[1]
    slots = pad(slots, (0, max(0, num_tokens - slots.shape[1])), value=-1)  # every row of query is rotated
    rows = *(x.flatten(0, 1) for x in (query, key, value)), positions.movedim(0, -2).flatten(-2), slots.flatten()
    result = op(*(given | dict(zip(_TOKENS, rows, strict=True))).values())
    return result.unflatten(0, (batch_size, num_tokens)), 0


def _written(given: dict[str, Any]) -> list[str]:
    """The names of the caches and scale caches that there are."""
    names = ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache")
    return [name for name in names if given[name] is not None]


rope_and_cache = define(
    f"rope_and_cache(Tensor query, {_ARGUMENTS}) -> Tensor", _call, Ropes(gives=True), _BACKENDS, _vmap
)
rope_and_cache_out = define(
    f"rope_and_cache_out(Tensor(e!) out, Tensor? query, {_ARGUMENTS}) -> ()",
    _out_call,
    Ropes(gives=False),
    _BACKENDS,
    _vmap,
)
