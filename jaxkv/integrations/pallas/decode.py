"""Pallas's attention of one token of each sequence, which it has for GPUs."""

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
from kvcore.formats import FLOATS, INT8


def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike | None,
    k_scales_pages: ArrayLike | None = None,
    v_scales_pages: ArrayLike | None = None,
    *,
    block_h: int = 16,
    pages_per_compute_block: int = 8,
    k_splits: int = 16,
    num_warps: int = 8,
    num_stages: int = 2,
    interpret: bool = False,
    debug: bool = False,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
) -> jax.Array:
    """`jax.experimental.pallas.ops.gpu.paged_attention.paged_attention`: one query token a sequence, over PALLAS pages.

    Logits are not scaled: scale q. Arguments that say how Pallas's kernel is to be launched have no effect, and need
    not divide anything: block_h, pages_per_compute_block, k_splits, num_warps, num_stages, interpret (on a CPU it runs
    without) and debug.

    Pages are read where they are, by one kernel, where k_pages and v_pages have one dtype, and both scales or none are
    given. Where one of them only is quantised, or only one has scales, the pages of block_tables are copied first,
    dequantised to q's dtype: memory and time of the sequences' contexts.

    Args:
        q: `[batch_size, num_heads, head_dim]` of float16, bfloat16 or float32.
        k_pages: `[num_kv_heads, total_num_pages, page_size, head_dim]` of a float dtype, int8, or one of fp8.
        v_pages: Of the same shape.
        block_tables: `[batch_size, pages_per_sequence]` of integers. Entries past a sequence's length are never read;
            one that is no page reads nothing.
        lengths: `[batch_size]` of integers: tokens of each sequence. None: as many as its pages hold. Of a length of 0
            the result is zeros.
        k_scales_pages: `[num_kv_heads, total_num_pages, page_size]` of a float dtype: what keys are multiplied by, in
            float32; made float32 where it is another. None: 1.
        v_scales_pages: The same for values.
        block_h: Not used.
        pages_per_compute_block: Not used.
        k_splits: Not used.
        num_warps: Not used.
        num_stages: Not used.
        interpret: Not used.
        debug: Not used.
        mask_value: Positions past a length have no weight, as with any mask_value far below the logits; above -10,000
            is an error.
        attn_logits_soft_cap: A logit x becomes `cap * tanh(x / cap)`; None for no cap.

    Returns:
        `[batch_size, num_heads, head_dim]` of q's dtype.

    Raises:
        ValueError: a shape or a number does not fit.
        TypeError: a dtype or a type does not fit.
        NotImplementedError: on differentiation.

    Example:
        >>> pages = jnp.arange(8.0).reshape(1, 2, 2, 2)  # 1 head, 2 pages of 2 slots
        >>> q, tables, lengths = jnp.zeros((1, 1, 2)), jnp.array([[1, 0]]), jnp.array([2])
        >>> pallas.paged_attention(q, pages, pages, tables, lengths).tolist()
        [[[5.0, 6.0]]]

    Logits are 0: the result is the mean of the values at positions 0 and 1, which are in page 1.
    """
    rows, k, v = map(as_array, (q, k_pages, v_pages))
    tables, lens = as_indices(block_tables), None if lengths is None else as_indices(lengths, lengths=True)
    k_scales, v_scales = (None if array is None else as_array(array) for array in (k_scales_pages, v_scales_pages))
    _check(rows, k, v, tables, lens, k_scales, v_scales)
    check_mask_value(mask_value)
    check_soft_cap("attn_logits_soft_cap", attn_logits_soft_cap)
    if lens is None:
        lens = jnp.full(tables.shape[0], tables.shape[1] * k.shape[2], jnp.int32)
    options: Any = {"scale": 1.0, "soft_cap": attn_logits_soft_cap, "layout": "PALLAS"}
    dtype, quantised = k.dtype, k.dtype.name not in FLOATS
    if v.dtype != dtype or (k_scales is None) != (v_scales is None) or (k_scales is not None and not quantised):
        k, v, tables = _copied(rows.dtype, k, v, k_scales, v_scales, tables)
    elif quantised:
        options["kv_cache_dtype"] = _FORMATS[dtype.name]
        if k_scales is not None and v_scales is not None:
            options |= {"k_scale": k_scales.astype(jnp.float32), "v_scale": v_scales.astype(jnp.float32)}
            options["scale_layout"] = "head block slot"
    return read.paged_attention(rows, (k, v), tables, lens, **options)


_FORMATS = {
    INT8.name: "int8",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "float8_e4m3fnuz": "fp8_e4m3fnuz",
    "float8_e5m2fnuz": "fp8_e5m2fnuz",
}


def _check(q: Any, k_pages: Any, v_pages: Any, block_tables: Any, lengths: Any, k_scales: Any, v_scales: Any) -> None:
    check_shape("q", q, ("batch_size", "num_heads", "head_dim"))
    batch_size, num_heads, head_dim = q.shape
    check_shape("k_pages", k_pages, ("num_kv_heads", "total_num_pages", "page_size", head_dim))
    check_shape("v_pages", v_pages, k_pages.shape)
    check_heads("k_pages", num_heads, k_pages.shape[0])
    check_shape("block_tables", block_tables, (batch_size, "pages_per_sequence"))
    check_integers(block_tables=block_tables)
    check_dtype("q", q, tuple(FLOATS))
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_dtype(name, pages, PAGES)
    if lengths is not None:
        check_shape("lengths", lengths, (batch_size,))
        check_integers(lengths=lengths)
    for name, scales in (("k_scales_pages", k_scales), ("v_scales_pages", v_scales)):
        if scales is not None:
            check_shape(name, scales, k_pages.shape[:3])
            check_dtype(name, scales, tuple(FLOATS))


@jax.jit(static_argnames="dtype")
def _copied(
    dtype: Any, k_pages: Any, v_pages: Any, k_scales: Any, v_scales: Any, block_tables: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pages that tables name, dequantised, in the tables' order; and the tables of these."""
    named = (block_tables >= 0) & (block_tables < k_pages.shape[1])
    tables = jnp.where(named, jnp.arange(block_tables.size, dtype=jnp.int32).reshape(block_tables.shape), -1)
    indices = jnp.where(named, block_tables, 0).ravel()

    def of_tables(pages: Any, scales: Any) -> jax.Array:
        found = jnp.take(pages, indices, axis=1, mode="clip").astype(jnp.float32)
        if scales is not None:
            found *= jnp.take(scales, indices, axis=1, mode="clip").astype(jnp.float32)[..., None]
        return found.astype(dtype)

    return of_tables(k_pages, k_scales), of_tables(v_pages, v_scales), tables
