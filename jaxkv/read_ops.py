"""The public functions that read a cache: attention over it, and a gather out of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import _read_primitive
from jaxkv._read_primitive import Operands, Options
from jaxkv.ops import BACKENDS, indices
from kvcore.checks import check_options
from kvcore.layout import CacheLayout
from kvcore.read_contract import Cache, check_attention_options


def paged_attention(
    query: jax.Array,
    caches: jax.Array | jax.Ref | Sequence[jax.Array | jax.Ref],
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    query_start_loc: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    layout: str | CacheLayout | None = None,
    layer: int | jax.Array | None = None,
    head_size_v: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of new tokens over a paged KV cache: decode, speculative decoding, chunked prefill, or any mix.

    Query i of a sequence with n queries stands at position `seq_len - n + i`. Sequences of length 0, and query rows
    past `query_start_loc[-1]`, give zeros. Entries of block_tables past a sequence's length are never read; one in
    range that is no block of the cache reads nothing: its positions are left out. What unused slots hold, NaN too, has
    no effect.

    It runs inside jit, scan, while_loop, vmap and shard_map; what is launched depends on shapes only, never on lengths.
    With the cache split over heads, each device attends with its own. Not differentiable.

    Args:
        query: `[num_tokens, num_q_heads, head_size]` of float16, bfloat16 or float32; num_q_heads a multiple of the
            cache's heads. Query head h attends over KV head `h // (num_q_heads / num_heads)`.
        caches: `(key_cache, value_cache)`, or one array for layouts that hold both.
        block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
        seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache, the queries' own among them.
        query_start_loc: `[num_seqs + 1]` of int32 or int64: sequence s has the query tokens from `query_start_loc[s]`
            to below `query_start_loc[s + 1]`. None: one token each.
        scale: What logits are multiplied by; None means `head_size ** -0.5`.
        causal: Whether a query sees positions up to its own only.
        sliding_window: With causal, how many of the last positions a query sees, its own among them; None means all.
        soft_cap: A logit x becomes `soft_cap * tanh(x / soft_cap)`; None means no cap.
        sinks: `[num_q_heads]`: one more logit of each head in the softmax's denominator.
        kv_cache_dtype: "auto", or the fp8 format that a uint8 cache holds: "fp8" (= "fp8_e4m3") or "fp8_e5m2".
        k_scale: float32 of one element, also traced, or a number, by which fp8 keys are multiplied; None means 1.
        v_scale: Likewise, for values.
        layout: As in `reshape_and_cache_flash`; for one array, None means `block slot head k+v`, or
            `block slot latent` where it has 3 axes (4 with `layer`).
        layer: Index into the layout's `layer` axis. Out of range in a traced integer, nothing is read.
        head_size_v: Elements of a value; needed where V is the first part of K (`block slot latent`).
        return_lse: Whether the log-sum-exp is returned, too.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        `[num_tokens, num_q_heads, head_size_v]` of query's dtype; with return_lse also the natural logarithm of the
        softmax's denominator, `[num_tokens, num_q_heads]` float32, -inf where nothing is seen, with which
        `merge_attention` joins results over parts of the positions.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.
    """
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    operands, static = _operands(caches, block_tables, seq_lens, k_scale, v_scale, layer)
    operands = operands._replace(query=jnp.asarray(query), sinks=None if sinks is None else jnp.asarray(sinks))
    if query_start_loc is not None:
        operands = operands._replace(query_start_loc=indices(query_start_loc))
    options = Options(
        kv_cache_dtype=kv_cache_dtype,
        layout=layout,  # type: ignore[arg-type]  # resolved below
        layer=static,
        head_size=None,
        head_size_v=head_size_v,
        backend=backend,
        attention=check_attention_options(scale, causal, sliding_window, soft_cap),
    )
    out, lse = _read(options, operands)
    return (out, lse) if return_lse else out


def gather_kv(
    caches: jax.Array | jax.Ref | Sequence[jax.Array | jax.Ref],
    block_tables: jax.Array,
    seq_lens: jax.Array,
    max_len: int,
    *,
    dtype: Any = None,
    kv_cache_dtype: str = "auto",
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    layout: str | CacheLayout | None = None,
    layer: int | jax.Array | None = None,
    head_size: int | None = None,
    head_size_v: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of sequences, out of a paged KV cache into contiguous arrays.

    Args:
        caches: `(key_cache, value_cache)`, or one array for layouts that hold both.
        block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
        seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache.
        max_len: Positions of a sequence in the result.
        dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 for fp8.
        kv_cache_dtype: "auto", or the fp8 format that a uint8 cache holds.
        k_scale: float32 of one element, also traced, or a number, by which fp8 keys are multiplied; None means 1.
        v_scale: Likewise, for values.
        layout: As in `paged_attention`.
        layer: Index into the layout's `layer` axis. Out of range in a traced integer, nothing is read.
        head_size: Elements of a key; needed for layouts with an axis `k+v`.
        head_size_v: Elements of a value; needed where V is the first part of K (`block slot latent`).
        backend: None, "triton", "xla" or "interpret".

    Returns:
        Key `[num_seqs, max_len, num_heads, head_size]` and value `[num_seqs, max_len, num_heads, head_size_v]`: the
        cache's bits, or `round(float32(x) * scale)`. Zeros past each length, and where block_tables has no block of the
        cache.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.
    """
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    operands, static = _operands(caches, block_tables, seq_lens, k_scale, v_scale, layer)
    options = Options(
        kv_cache_dtype=kv_cache_dtype,
        layout=layout,  # type: ignore[arg-type]  # resolved below
        layer=static,
        head_size=head_size,
        head_size_v=head_size_v,
        backend=backend,
        max_len=max_len,
        dtype=None if dtype is None else jnp.dtype(dtype).name,
    )
    key, value = _read(options, operands)
    return key, value


def merge_attention(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins attention over parts of the positions, as devices compute that share a context between them.

    Args:
        outs: `[parts, num_tokens, num_q_heads, head_size_v]`, from `paged_attention` over each part.
        lses: `[parts, num_tokens, num_q_heads]` float32, from the same calls. Sinks belong to one part only.

    Returns:
        What one call over all the positions gives: result of outs' dtype, and log-sum-exp.
    """
    lse = jax.nn.logsumexp(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(lse == -jnp.inf, 0.0, lse))
    return jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0).astype(outs.dtype), lse


def _operands(
    caches: Any, block_tables: Any, seq_lens: Any, k_scale: Any, v_scale: Any, layer: Any
) -> tuple[Operands, int | None]:
    """The arrays of a call as JAX arrays, and a static layer."""
    arrays = caches if isinstance(caches, Sequence) else (caches,)
    k_scale, v_scale = (jnp.float32(s) if isinstance(s, (int, float)) else s for s in (k_scale, v_scale))
    traced = hasattr(layer, "shape") and not isinstance(layer, np.integer)
    return Operands(
        query=None,
        caches=tuple(c[...] if isinstance(c, jax.Ref) else jnp.asarray(c) for c in arrays),
        block_tables=indices(block_tables),
        seq_lens=indices(seq_lens),
        query_start_loc=None,
        sinks=None,
        k_scale=k_scale,
        v_scale=v_scale,
        layer=indices(layer) if traced else None,
    ), None if traced or layer is None else int(layer)


def _read(options: Options, operands: Operands) -> list[jax.Array]:
    """Checks a call, gives scales and layer an axis, and drops scales without effect."""
    call = _read_primitive.describe(options, operands)
    cache: Cache = call.cache
    one = {name: None if x is None else jnp.reshape(x, 1) for name, x in _scalars(operands, cache.scaled).items()}
    return _read_primitive.read(options._replace(layout=cache.layout), operands._replace(**one))


def _scalars(operands: Operands, scaled: bool) -> dict[str, Any]:
    scales = (operands.k_scale, operands.v_scale) if scaled else (None, None)
    return {"k_scale": scales[0], "v_scale": scales[1], "layer": operands.layer}
