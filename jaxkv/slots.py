"""The public functions of slots: that finds those of new tokens, and that reads what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxkv._arguments import (
    BACKENDS,
    ArrayLike,
    Index,
    Scale,
    as_indices,
    as_layer,
    as_static,
    dtype_name,
)
from jaxkv._call import ReadOperands, ReadOptions
from jaxkv._primitive import slots as primitive
from jaxkv._read import Caches, as_read_scale, cache_of, read_checked
from jaxkv._slots import SlotOperands, SlotOptions
from kvcore.choices import JaxBackend, KVCacheDtype, Layout
from kvcore.contract.checks import check_backend, check_options
from kvcore.layout import CacheLayout


def slot_mapping(
    block_tables: ArrayLike,
    query_start_loc: ArrayLike | None,
    seq_lens: ArrayLike,
    block_size: int,
    num_tokens: int | None = None,
    *,
    backend: JaxBackend | None = None,
) -> jax.Array:
    """The slot of each new token, as the ops that write take it, out of what `paged_attention` takes.

    The last n positions of a sequence are those of its new tokens, n being `query_start_loc[s + 1] -
    query_start_loc[s]`: token t of sequence s stands at `position = seq_lens[s] - query_start_loc[s + 1] + t`, and its
    slot is `block_tables[s, position // block_size] * block_size + position % block_size`.

    A token has no slot, -1, where it is none of a sequence's (padding), where its position is negative (left padding)
    or beyond the table, where the table has a negative block, and where int32 cannot hold the slot, of caches with 2³¹
    slots or more. Nothing past a sequence's length is read. How many blocks a cache has is not known here: what writes
    skips slots beyond it.

    It runs inside jit, scan, while_loop, vmap and shard_map; what is launched depends on shapes only, never on lengths.
    With operands that are split over devices, each device gets all of them, and has the whole result.

    Args:
        block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
        query_start_loc: `[num_seqs + 1]` of int32 or int64: sequence s has the tokens from `query_start_loc[s]` to
            below `query_start_loc[s + 1]`; a pair that descends is an empty sequence, and no sequence has tokens before
            an earlier start. None: one token each.
        seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence, the new ones among them. Lengths and starts
            of 2³¹ or more count as 2³¹ - 1.
        block_size: Slots of a block.
        num_tokens: Entries of the result: tokens, and padding after them. None: one a sequence without query_start_loc,
            else where that ends, which is read on the host; an error under jit, vmap and torch.compile, and while a
            CUDA graph is captured.
        backend: None runs "triton" on CUDA and ROCm, "xla" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, through a host callback, for tests.

    Returns:
        `[num_tokens]` of int32.

    Raises:
        ValueError: a shape or number does not fit, or num_tokens cannot be read.
        TypeError: a dtype does not fit, or a number is no int.

    Example:
        >>> block_tables = jnp.array([[2, 7], [5, -1]])  # blocks of 4 slots
        >>> query_start_loc = jnp.array([0, 3, 4])  # 3 tokens for sequence 0, 1 for sequence 1
        >>> seq_lens = jnp.array([6, 2])
        >>> jaxkv.slot_mapping(block_tables, query_start_loc, seq_lens, block_size=4, num_tokens=6).tolist()
        [11, 28, 29, 21, -1, -1]

    Sequence 0 has its new tokens at positions 3 to 5: the last slot of block 2, and the first two of block 7.
    """
    check_backend(backend, BACKENDS)
    starts = None if query_start_loc is None else as_indices(query_start_loc, lengths=True)
    operands = SlotOperands(as_indices(block_tables), starts, as_indices(seq_lens, lengths=True))
    options = SlotOptions(as_static("block_size", block_size), as_static("num_tokens", num_tokens), backend)
    if options.num_tokens is None and starts is not None:
        options._replace(num_tokens=0).describe(operands)
        options = options._replace(num_tokens=_end_of(starts))
    options.describe(operands)
    return primitive.slot_mapping(options, jax.tree.map(jnp.asarray, operands))


def gather_slots(
    caches: Caches,
    slots: ArrayLike,
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
    """Keys and values of slots, out of a paged KV cache into contiguous arrays.

    It runs inside jit, scan, while_loop, vmap and shard_map. Not differentiable.

    Args:
        caches: `(key_cache, value_cache)`, or one array for layouts that hold both.
        slots: `[n]` of int32 or int64, as `slot_mapping` gives them.
        dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
        kv_cache_dtype: "auto", or the format in which the cache was written.
        k_scale: What quantised keys are multiplied by: float32 of one element, or one a head, `[num_heads]`, or a
            number; None means 1. Or the scale cache (array or Ref) of a `…_per_token_head_quant`, then for both.
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
        Key `[n, num_heads, head_size]` and value `[n, num_heads, head_size_v]`, each as `gather_kv` has them. Zeros for
        slots that are not in the cache: -1 is for padding.

    Raises:
        ValueError: a shape, layout or choice does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: on differentiation.

    Example:
        >>> key_cache = jnp.arange(6.0).reshape(3, 2, 1, 1)  # 3 blocks of 2 slots, 1 head of 1 element
        >>> key, value = jaxkv.gather_slots((key_cache, -key_cache), jnp.array([4, -1, 1]))
        >>> key.ravel().tolist()
        [4.0, 0.0, 1.0]
    """
    k_scale, v_scale, layer = as_read_scale(k_scale), as_read_scale(v_scale), as_layer(layer)
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    cache_options, cache = cache_of(caches, kv_cache_dtype, k_scale, v_scale, layout, scale_layout, layer)
    operands = ReadOperands(None, cache, as_indices(slots), None, None, None)
    options = ReadOptions(
        cache=cache_options,
        head_size=as_static("head_size", head_size),
        head_size_v=as_static("head_size_v", head_size_v),
        backend=backend,
        max_len=None,
        dtype=None if dtype is None else dtype_name(dtype),
    )
    key, value = read_checked(options, operands)
    return key, value


def _end_of(starts: jax.Array | np.ndarray) -> int | None:
    """Where the last sequence ends: at the furthest start, as those of padding may be anything before it.

    None where the starts have no value: the contract refuses the call then.
    """
    return None if isinstance(starts, Tracer) else max(0, int(np.max(np.asarray(starts))))
