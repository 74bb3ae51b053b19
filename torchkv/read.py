"""The public functions that read a cache: attention over it, and a gather out of it."""

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from kvcore.choices import FloatDtype, KVCacheDtype, Layout, TorchBackend
from kvcore.contract.checks import check_options
from kvcore.contract.read import check_attention_options
from kvcore.layout import CacheLayout
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
from torchkv._read import gather_with


class AttendOptions(TypedDict, total=False):
    """Options of `PagedKVCache.attend`, for its overloads."""

    query_start_loc: Tensor | None
    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    layer: int | Tensor | None
    out: Tensor | None
    lse: Tensor | None
    backend: TorchBackend | None


class AttentionOptions(AttendOptions, total=False):
    """Options of `paged_attention`, for its overloads."""

    kv_cache_dtype: KVCacheDtype
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    layout: Layout | None
    scale_layout: str | CacheLayout | None
    head_size_v: int | None


@overload
def paged_attention(
    query: Tensor,
    caches: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def paged_attention(
    query: Tensor,
    caches: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def paged_attention(
    query: Tensor,
    caches: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def paged_attention(
    query: Tensor,
    caches: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    query_start_loc: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    head_size_v: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    backend: TorchBackend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over a paged KV cache: decode, speculative decoding, chunked prefill, or any mix.

    Query i of a sequence with n queries stands at position `seq_len - n + i`. Rows that see nothing are zeros, and
    their log-sum-exp is -inf, or the sink: rows of sequences of length 0, with causal those at negative positions (left
    padding), and rows of no sequence. Entries of block_tables past a sequence's length are never read; one in range
    that is no block of the cache reads nothing: its positions are left out. So are positions beyond the table: a length
    above `max_blocks * block_size` is no error, and attends to what is there. `check_tables` finds such tables. What
    unused slots hold, NaN too, has no effect.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it. What is launched depends on shapes only, never on lengths. Tensors may be strided. Not differentiable.

    Args:
        query: `[num_tokens, num_q_heads, head_size]` of float16, bfloat16 or float32; num_q_heads a multiple of the
            cache's heads. Query head h attends over KV head `h // (num_q_heads / num_heads)`.
        caches: `(key_cache, value_cache)`, or one tensor for layouts that hold both.
        block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
        seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache, the queries' own among them.
        query_start_loc: `[num_seqs + 1]` of int32 or int64: sequence s has the rows of query from `query_start_loc[s]`
            to below `query_start_loc[s + 1]`, and n is their difference. Of rows outside query nothing is computed, and
            they count in n; a pair that descends is an empty sequence, and no sequence has rows before an earlier
            start. None: one row each.
        scale: What logits are multiplied by; None means `head_size ** -0.5`.
        causal: Whether a query sees positions up to its own only.
        sliding_window: With causal, how many of the last positions a query sees, its own among them; None means all,
            like 2³¹ - 1 or more.
        soft_cap: A logit x becomes `soft_cap * tanh(x / soft_cap)`; None or 0 means no cap.
        sinks: `[num_q_heads]`: one more logit of each head in the softmax's denominator.
        kv_cache_dtype: "auto", or the format in which the cache was written.
        k_scale: What quantised keys are multiplied by: float32 of one element, `[num_heads]`, `[num_layers, 1]` or
            `[num_layers, num_heads]`, of which the layer's count, or a number; None means 1. Or the scale cache
            of a `…_per_token_head_quant`, then for both.
        v_scale: What quantised values are multiplied by, of the same kind.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more; for one tensor `block slot head k+v`, or `block slot latent` where it has 3 axes (4 with `layer`).
        scale_layout: Pattern of the scale caches, as they were written; None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layout's `layer` axis. Out of range in a Tensor, nothing is read.
        head_size_v: Elements of a value; needed where V is the first part of K (`block slot latent`), except for
            "fp8_ds_mla", where it is 512.
        return_lse: Whether the log-sum-exp is returned, too.
        out: A contiguous tensor of the result's shape and dtype that it is written to, and that is returned; it must
            not overlap the arguments. None: a new one.
        lse: The same for the log-sum-exp, `[num_tokens, num_q_heads]` of float32; only with out.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Returns:
        `[num_tokens, num_q_heads, head_size_v]` of query's dtype; with return_lse also the natural logarithm of the
        softmax's denominator, `[num_tokens, num_q_heads]` float32, -inf where nothing is seen, with which
        `merge_attention` merges partial results.

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> key_cache = torch.zeros((3, 2, 1, 2))  # 3 blocks of 2 slots, 1 head of 2 elements; all logits are 0
        >>> value_cache = torch.arange(12.0).reshape(3, 2, 1, 2)
        >>> query = torch.ones((1, 1, 2))
        >>> torchkv.paged_attention(query, (key_cache, value_cache), torch.tensor([[2, 0]]), torch.tensor([3])).tolist()
        [[[6.0, 7.0]]]

    The result is the mean of the values at positions 0 to 2: those of block 2, and the first of block 0.
    """
    op, given, caches = _library.attention, (), as_caches(caches)
    if out is not None:
        op, given = _library.attention_out, (out, _new_lse(query, out) if lse is None else lse)
    elif lse is not None:
        raise ValueError("out must be given where lse is, got None")
    operands = (*given, query, caches, block_tables, seq_lens, query_start_loc)
    rest = (as_pattern(layout), *as_layer(layer), head_size_v, backend, as_scale_pattern(scale_layout))
    options = (scale, causal, sliding_window, soft_cap, sinks, kv_cache_dtype, k_scale, v_scale)
    results = call_again(op, (*operands, *options, *rest))
    if results is None:
        numbers = check_attention_options(scale, causal, sliding_window, soft_cap)
        check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
        scales = as_scale(k_scale, caches[0]), as_scale(v_scale, caches[0])
        refuse_gradients("paged_attention", query, *caches, sinks, *scales, *given)
        arguments = (*operands, *numbers, sinks, kv_cache_dtype, *scales, *rest)
        results = cast(tuple[Tensor, Tensor], call(op, arguments) or given)
    return results if return_lse else results[0]


def _new_lse(query: Tensor, out: Tensor) -> Tensor:
    """Memory for a log-sum-exp that nobody asked for, beside the caller's tensor for the result."""
    try:
        return query.new_empty(query.shape[:2], dtype=torch.float32)
    except AttributeError:
        check_tensors(out=out, query=query)
        raise


def gather_kv(
    caches: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    seq_lens: Tensor,
    max_len: int,
    *,
    dtype: torch.dtype | FloatDtype | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    head_size: int | None = None,
    head_size_v: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: TorchBackend | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of sequences, out of a paged KV cache into contiguous tensors.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it. What is launched depends on shapes only, never on lengths. Tensors may be strided. Not differentiable.

    Args:
        caches: `(key_cache, value_cache)`, or one tensor for layouts that hold both.
        block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
        seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache.
        max_len: Positions of a sequence in the result.
        dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
        kv_cache_dtype: "auto", or the format in which the cache was written.
        k_scale: What quantised keys are multiplied by: float32 of one element, `[num_heads]`, `[num_layers, 1]` or
            `[num_layers, num_heads]`, of which the layer's count, or a number; None means 1. Or the scale cache
            of a `…_per_token_head_quant`, then for both.
        v_scale: What quantised values are multiplied by, of the same kind.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more; for one tensor `block slot head k+v`, or `block slot latent` where it has 3 axes (4 with `layer`).
        scale_layout: Pattern of the scale caches, as they were written; None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layout's `layer` axis. Out of range in a Tensor, nothing is read.
        head_size: Elements of a key; needed for layouts with an axis `k+v`.
        head_size_v: Elements of a value; needed where V is the first part of K (`block slot latent`), except for
            "fp8_ds_mla", where it is 512.
        out: Contiguous tensors of the results' shapes and dtype that key and value are written to, and that are
            returned; they must not overlap the arguments. None: new ones.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Returns:
        Key `[num_seqs, max_len, num_heads, head_size]` and value `[num_seqs, max_len, num_heads, head_size_v]`: the
        cache's bits, or `round(float32(x) * scale)`, where nvfp4 has `float32(x) * b`, b being the scale of x's group,
        for x. Zeros past each length, and where block_tables has no block of the cache.

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> key_cache = torch.arange(12.0).reshape(3, 2, 1, 2)  # 3 blocks of 2 slots, 1 head of 2 elements
        >>> key, value = torchkv.gather_kv((key_cache, -key_cache), torch.tensor([[2, 0]]), torch.tensor([3]), 4)
        >>> key[0, :, 0].tolist()  # block 2, then the first slot of block 0; position 3 is past the length
        [[8.0, 9.0], [10.0, 11.0], [0.0, 1.0], [0.0, 0.0]]
    """
    check_tensors(seq_lens=seq_lens)  # the op's may be None, for slots
    return gather_with(
        "gather_kv", caches, block_tables, seq_lens, max_len, dtype, kv_cache_dtype, k_scale, v_scale, layout,
        scale_layout, layer, head_size, head_size_v, out, backend,
    )  # fmt: skip
