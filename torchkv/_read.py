"""A gather as it is called: of positions, or of slots."""

from typing import Any, cast

import torch
from torch import Tensor

from kvcore.contract.checks import check_options
from torchkv._arguments import (
    BACKENDS,
    as_caches,
    as_layer,
    as_pattern,
    as_scale,
    as_scale_pattern,
    check_tensors,
    refuse_gradients,
)
from torchkv._library import read as _library
from torchkv._library.base import call, call_again


def gather_with(
    function: str,
    caches: Any,
    block_tables: Any,
    seq_lens: Any,
    max_len: Any,
    dtype: Any,
    kv_cache_dtype: Any,
    k_scale: Any,
    v_scale: Any,
    layout: Any,
    scale_layout: Any,
    layer: Any,
    head_size: Any,
    head_size_v: Any,
    out: Any,
    backend: Any,
) -> tuple[Tensor, Tensor]:
    """Key and value of a call of `gather_kv`, or of `gather_slots`, whose name `function` is and seq_lens None."""
    op, given, caches = _library.gather, (), as_caches(caches)
    if out is not None:
        if not (isinstance(out, (tuple, list)) and len(out) == 2):
            raise TypeError(f"out must be two tensors, for key and value, got {type(out).__name__}")
        op, given = _library.gather_out, tuple(out)
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    operands = (*given, caches, block_tables, seq_lens, max_len, name, kv_cache_dtype)
    rest = (
        as_pattern(layout), *as_layer(layer), head_size, head_size_v, backend, as_scale_pattern(scale_layout),
    )  # fmt: skip
    results = call_again(op, (*operands, k_scale, v_scale, *rest))
    if results is None:
        check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
        scales = as_scale(k_scale, caches[0]), as_scale(v_scale, caches[0])
        check_tensors(**{f"out[{i}]": tensor for i, tensor in enumerate(given)})  # the op's schema calls them otherwise
        refuse_gradients(function, *caches, *scales, *given)
        results = cast(tuple[Tensor, Tensor], call(op, (*operands, *scales, *rest)) or given)
    return results
