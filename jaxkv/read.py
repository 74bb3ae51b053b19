"""The public functions that read a cache: attention over it, and a gather out of it."""

from typing import Literal, TypedDict, Unpack, overload

import jax
from jax.typing import DTypeLike

from jaxkv._arguments import (
    BACKENDS,
    ArrayLike,
    Index,
    Scale,
    TokenRows,
    as_array,
    as_indices,
    as_layer,
    as_rows,
    as_static,
    dtype_name,
)
from jaxkv._call import ReadOperands, ReadOptions
from jaxkv._read import Caches, as_read_scale, cache_of, read_checked
from kvcore.choices import JaxBackend, KVCacheDtype, Layout
from kvcore.contract.checks import check_options
from kvcore.contract.read import check_attention_options
from kvcore.integers import integer
from kvcore.layout import CacheLayout


class AttendOptions(TypedDict, total=False):
    """Options of `PagedKVCache.attend`, for its overloads."""

    query_start_loc: ArrayLike | None
    scale: float | None
    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    sinks: ArrayLike | None
    layer: Index | None
    backend: JaxBackend | None


class AttentionOptions(AttendOptions, total=False):
    """Options of `paged_attention`, for its overloads."""

    kv_cache_dtype: KVCacheDtype
    k_scale: Scale | jax.Ref | None
    v_scale: Scale | jax.Ref | None
    layout: Layout | None
    scale_layout: str | CacheLayout | None
    head_size_v: int | None


@overload
def paged_attention(
    query: TokenRows,
    caches: Caches,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> jax.Array: ...
@overload
def paged_attention(
    query: TokenRows,
    caches: Caches,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def paged_attention(
    query: TokenRows,
    caches: Caches,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def paged_attention(
    query: TokenRows,
    caches: Caches,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    *,
    query_start_loc: ArrayLike | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Scale | jax.Ref | None = None,
    v_scale: Scale | jax.Ref | None = None,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: Index | None = None,
    head_size_v: int | None = None,
    return_lse: bool = False,
    backend: JaxBackend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of new tokens over a paged KV cache: decode, speculative decoding, chunked prefill, or any mix.

    Query i of a sequence with n queries stands at position `seq_len - n + i`. Rows that see nothing are zeros, and
    their log-sum-exp is -inf, or the sink: rows of sequences of length 0, with causal those at negative positions (left
    padding), and rows of no sequence. Entries of block_tables past a sequence's length are never read; one in range
    that is no block of the cache reads nothing: its positions are left out. So are positions beyond the table: a length
    above `max_blocks * block_size` is no error, and attends to what is there. Outside jit, `check_tables` finds such
    tables. What unused slots hold, NaN too, has no effect.

    It runs inside jit, scan, while_loop, vmap and shard_map; what is launched depends on shapes only, never on lengths.
    With the cache split over heads, each device attends with its own. Not differentiable.

    Args:
        query: `[num_tokens, num_q_heads, head_size]` of float16, bfloat16 or float32; num_q_heads a multiple of the
            cache's heads. Query head h attends over KV head `h // (num_q_heads / num_heads)`.
        caches: `(key_cache, value_cache)`, or one array for layouts that hold both.
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
            (array or Ref) of a `…_per_token_head_quant`, then for both.
        v_scale: What quantised values are multiplied by, of the same kind.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more; for one array `block slot head k+v`, or `block slot latent` where it has 3 axes (4 with `layer`).
        scale_layout: Pattern of the scale caches, as they were written; None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layout's `layer` axis. Out of range in a traced integer, nothing is read.
        head_size_v: Elements of a value; needed where V is the first part of K (`block slot latent`), except for
            "fp8_ds_mla", where it is 512.
        return_lse: Whether the log-sum-exp is returned, too.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        `[num_tokens, num_q_heads, head_size_v]` of query's dtype; with return_lse also the natural logarithm of the
        softmax's denominator, `[num_tokens, num_q_heads]` float32, -inf where nothing is seen, with which
        `merge_attention` merges partial results.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    Example:
        >>> key_cache = jnp.zeros((3, 2, 1, 2))  # 3 blocks of 2 slots, 1 head of 2 elements; all logits are 0
        >>> value_cache = jnp.arange(12.0).reshape(3, 2, 1, 2)
        >>> query = jnp.ones((1, 1, 2))
        >>> jaxkv.paged_attention(query, (key_cache, value_cache), jnp.array([[2, 0]]), jnp.array([3])).tolist()
        [[[6.0, 7.0]]]

    The result is the mean of the values at positions 0 to 2: those of block 2, and the first of block 0.
    """
    k_scale, v_scale, layer = as_read_scale(k_scale), as_read_scale(v_scale), as_layer(layer)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    cache_options, cache = cache_of(caches, kv_cache_dtype, k_scale, v_scale, layout, scale_layout, layer)
    operands = ReadOperands(
        query=as_rows(query),
        cache=cache,
        block_tables=as_indices(block_tables),
        seq_lens=as_indices(seq_lens, lengths=True),
        query_start_loc=None if query_start_loc is None else as_indices(query_start_loc, lengths=True),
        sinks=None if sinks is None else as_array(sinks),
    )
    options = ReadOptions(
        cache=cache_options,
        head_size=None,
        head_size_v=as_static("head_size_v", head_size_v),
        backend=backend,
        attention=check_attention_options(scale, causal, sliding_window, soft_cap),
    )
    out, lse = read_checked(options, operands)
    return (out, lse) if return_lse else out


def gather_kv(
    caches: Caches,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    max_len: int,
    *,
    dtype: DTypeLike | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Scale | jax.Ref | None = None,
    v_scale: Scale | jax.Ref | None = None,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: Index | None = None,
    head_size: int | None = None,
    head_size_v: int | None = None,
    backend: JaxBackend | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of sequences, out of a paged KV cache into contiguous arrays.

    It runs inside jit, scan, while_loop, vmap and shard_map; what is launched depends on shapes only, never on lengths.
    Not differentiable.

    Args:
        caches: `(key_cache, value_cache)`, or one array for layouts that hold both.
        block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
        seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache.
        max_len: Positions of a sequence in the result.
        dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
        kv_cache_dtype: "auto", or the format in which the cache was written.
        k_scale: What quantised keys are multiplied by: float32 of one element, `[num_heads]`, `[num_layers, 1]` or
            `[num_layers, num_heads]`, of which the layer's count, or a number; None means 1. Or the scale cache
            (array or Ref) of a `…_per_token_head_quant`, then for both.
        v_scale: What quantised values are multiplied by, of the same kind.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more; for one array `block slot head k+v`, or `block slot latent` where it has 3 axes (4 with `layer`).
        scale_layout: Pattern of the scale caches, as they were written; None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layout's `layer` axis. Out of range in a traced integer, nothing is read.
        head_size: Elements of a key; needed for layouts with an axis `k+v`.
        head_size_v: Elements of a value; needed where V is the first part of K (`block slot latent`), except for
            "fp8_ds_mla", where it is 512.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        Key `[num_seqs, max_len, num_heads, head_size]` and value `[num_seqs, max_len, num_heads, head_size_v]`: the
        cache's bits, or `round(float32(x) * scale)`, where nvfp4 has `float32(x) * b`, b being the scale of x's group,
        for x. Zeros past each length, and where block_tables has no block of the cache.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    Example:
        >>> key_cache = jnp.arange(12.0).reshape(3, 2, 1, 2)  # 3 blocks of 2 slots, 1 head of 2 elements
        >>> key, value = jaxkv.gather_kv((key_cache, -key_cache), jnp.array([[2, 0]]), jnp.array([3]), 4)
        >>> key[0, :, 0].tolist()  # block 2, then the first slot of block 0; position 3 is past the length
        [[8.0, 9.0], [10.0, 11.0], [0.0, 1.0], [0.0, 0.0]]
    """
    k_scale, v_scale, layer = as_read_scale(k_scale), as_read_scale(v_scale), as_layer(layer)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    cache_options, cache = cache_of(caches, kv_cache_dtype, k_scale, v_scale, layout, scale_layout, layer)
    operands = ReadOperands(
        query=None,
        cache=cache,
        block_tables=as_indices(block_tables),
        seq_lens=as_indices(seq_lens, lengths=True),
        query_start_loc=None,
        sinks=None,
    )
    options = ReadOptions(
        cache=cache_options,
        head_size=as_static("head_size", head_size),
        head_size_v=as_static("head_size_v", head_size_v),
        backend=backend,
        max_len=integer("max_len", as_static("max_len", max_len)),
        dtype=None if dtype is None else dtype_name(dtype),
    )
    key, value = read_checked(options, operands)
    return key, value
