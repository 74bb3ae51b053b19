"""Pallas's attention of any number of tokens of each sequence, which it has for TPUs."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import read
from jaxkv._arguments import ArrayLike, as_array, as_indices
from jaxkv.integrations.pallas.arguments import (
    DEFAULT_MASK_VALUE,
    PAGES,
    check_dtype,
    check_heads,
    check_integers,
    check_mask_value,
    check_shape,
    check_soft_cap,
)
from kvcore.contract.checks import is_integer, is_number
from kvcore.formats import FLOATS, INT8


def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = DEFAULT_MASK_VALUE,
    k_scale: float | None = None,
    v_scale: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
) -> jax.Array:
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`: prompts and decoding in one call, over combined pages.

    Causal: of a sequence with n rows of q, row i stands at position `kv_len - n + i`. Pages are read where they are,
    in the layout INTERLEAVED. Arguments that say how Pallas's kernel is to be launched have no effect:
    num_kv_pages_per_block, num_queries_per_block and vmem_limit_bytes.

    Args:
        q: `[max_num_batched_tokens, num_q_heads, head_dim]` of float16, bfloat16 or float32.
        kv_pages: `[total_num_pages, page_size, 2 * num_kv_heads, head_dim]` of a float dtype, int8, or one of fp8: head
            h's key at `2 * h`, its value at `2 * h + 1`.
        kv_lens: `[max_num_seqs]` of integers: tokens of each sequence in the pages, those of q among them.
        page_indices: `[max_num_seqs, pages_per_seq]` of integers: the pages of each sequence, in order. Entries past a
            sequence's length are never read.
        cu_q_lens: `[max_num_seqs + 1]` of integers: where each sequence's rows of q begin, and the last ends. What
            comes after the first num_seqs + 1 is not used, zeros or anything.
        num_seqs: `[1]` of integers: how many sequences there are.
        sm_scale: What logits are multiplied by; not `head_dim ** -0.5` unless it is given.
        sliding_window: How many of the last positions a row sees, its own among them; None: all.
        soft_cap: A logit x becomes `soft_cap * tanh(x / soft_cap)`; None for no cap.
        mask_value: What a row does not see has no weight, as with any mask_value far below the logits; above -10,000 is
            an error. None: the usual one.
        k_scale: What keys are multiplied by; None: 1.
        v_scale: What values are multiplied by; None: 1.
        num_kv_pages_per_block: Not used.
        num_queries_per_block: Not used.
        vmem_limit_bytes: Not used.

    Returns:
        `[max_num_batched_tokens, num_q_heads, head_dim]` of q's dtype; zeros in rows of no sequence.

    Raises:
        ValueError: a shape or a number does not fit.
        TypeError: a dtype or a type does not fit.
        NotImplementedError: on differentiation.

    Example:
        >>> kv_pages = jnp.arange(8.0).reshape(2, 2, 2, 1)  # 2 pages of 2 slots, 1 head of 1 element
        >>> q, num_seqs = jnp.zeros((3, 1, 1)), jnp.array([1])  # rows 0 and 1 of q are of a sequence of 3 tokens
        >>> cu_q_lens, kv_lens, page_indices = jnp.array([0, 2, 0]), jnp.array([3, 0]), jnp.array([[1, 0], [0, 0]])
        >>> pallas.ragged_paged_attention(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs).ravel().tolist()
        [6.0, 4.333333492279053, 0.0]

    Logits are 0: row 0 has the mean of both values of page 1, 5 and 7, row 1 that of 5, 7 and page 0's first, which is
    1, and row 2 is of no sequence.
    """
    rows, pages = as_array(q), as_array(kv_pages)
    tables = as_indices(page_indices)
    lens, starts, count = (as_indices(array, lengths=True) for array in (kv_lens, cu_q_lens, num_seqs))
    _check(rows, pages, lens, tables, starts, count)
    check_mask_value(mask_value)
    check_soft_cap("soft_cap", soft_cap)
    if sliding_window is not None and not is_integer(sliding_window):
        raise TypeError(f"sliding_window must be None or a static int, got {sliding_window!r}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be positive, got {sliding_window}")
    for name, scale in (("sm_scale", sm_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if not is_number(scale) and (scale is not None or name == "sm_scale"):
            raise TypeError(f"{name} must be a static number, got {scale!r}")
    options: Any = {}
    if pages.dtype.name not in FLOATS:
        options = {"k_scale": k_scale, "v_scale": v_scale}
        options["kv_cache_dtype"] = "int8" if pages.dtype.name == INT8.name else "auto"
    elif k_scale is not None:
        sm_scale = sm_scale * k_scale  # of a float cache, which has no scale of its own
    # Starts that descend leave sequences without rows.
    starts = jnp.where(jnp.arange(starts.shape[0]) <= jnp.asarray(count), starts, 0)
    out = read.paged_attention(
        rows, pages, tables, lens, query_start_loc=starts, scale=sm_scale, sliding_window=sliding_window,
        soft_cap=soft_cap, layout="INTERLEAVED", **options,
    )  # fmt: skip
    if options or v_scale is None:
        return out
    return (out.astype(jnp.float32) * v_scale).astype(out.dtype)


def _check(q: Any, kv_pages: Any, kv_lens: Any, page_indices: Any, cu_q_lens: Any, num_seqs: Any) -> None:
    check_shape("q", q, ("max_num_batched_tokens", "num_q_heads", "head_dim"))
    check_shape("kv_pages", kv_pages, ("total_num_pages", "page_size", "2 * num_kv_heads", q.shape[2]))
    if kv_pages.shape[2] % 2:
        raise ValueError(f"kv_pages must have an even number of heads, of keys and values, got {kv_pages.shape[2]}")
    check_heads("kv_pages", q.shape[1], kv_pages.shape[2] // 2)
    check_shape("page_indices", page_indices, ("max_num_seqs", "pages_per_seq"))
    check_shape("kv_lens", kv_lens, page_indices.shape[:1])
    check_shape("cu_q_lens", cu_q_lens, (page_indices.shape[0] + 1,))
    check_shape("num_seqs", num_seqs, (1,))
    check_integers(kv_lens=kv_lens, page_indices=page_indices, cu_q_lens=cu_q_lens, num_seqs=num_seqs)
    check_dtype("q", q, tuple(FLOATS))
    check_dtype("kv_pages", kv_pages, PAGES)
