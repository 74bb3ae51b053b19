"""The public functions of slots: that finds those of new tokens, and that reads what they hold."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor

from kvcore.choices import FloatDtype, KVCacheDtype, Layout, TorchBackend
from kvcore.contract.checks import check_backend, is_bool
from kvcore.contract.slots import check_slot_mapping
from kvcore.layout import CacheLayout
from torchkv._arguments import BACKENDS, check_tensors, spec_of
from torchkv._library import slots as _library
from torchkv._library.base import call
from torchkv._read import gather_with


def slot_mapping(
    block_tables: Tensor,
    query_start_loc: Tensor | None,
    seq_lens: Tensor,
    block_size: int,
    num_tokens: int | None = None,
    *,
    out: Tensor | None = None,
    backend: TorchBackend | None = None,
) -> Tensor:
    """The slot of each new token, as the ops that write take it, out of what `paged_attention` takes.

    The last n positions of a sequence are those of its new tokens, n being `query_start_loc[s + 1] -
    query_start_loc[s]`: token t of sequence s stands at `position = seq_lens[s] - query_start_loc[s + 1] + t`, and its
    slot is `block_tables[s, position // block_size] * block_size + position % block_size`.

    A token has no slot, -1, where it is none of a sequence's (padding), where its position is negative (left padding)
    or beyond the table, where the table has a negative block, and where int32 cannot hold the slot, of caches with 2³¹
    slots or more. Nothing past a sequence's length is read. How many blocks a cache has is not known here: what writes
    skips slots beyond it.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it. What is launched depends on shapes only, never on lengths. Tensors may be strided.

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
        out: A contiguous tensor of int32 that the result is written to, and that is returned; it must not overlap the
            arguments. Without num_tokens, its length is that. None: a new one.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Returns:
        `[num_tokens]` of int32.

    Raises:
        ValueError: a shape, number or device does not fit, or num_tokens cannot be read.
        TypeError: a dtype does not fit, or a number is no int.

    Example:
        >>> block_tables = torch.tensor([[2, 7], [5, -1]])  # blocks of 4 slots
        >>> query_start_loc = torch.tensor([0, 3, 4])  # 3 tokens for sequence 0, 1 for sequence 1
        >>> seq_lens = torch.tensor([6, 2])
        >>> torchkv.slot_mapping(block_tables, query_start_loc, seq_lens, block_size=4, num_tokens=6).tolist()
        [11, 28, 29, 21, -1, -1]

    Sequence 0 has its new tokens at positions 3 to 5: the last slot of block 2, and the first two of block 7.
    """
    check_backend(backend, BACKENDS)
    for name, number in (("block_size", block_size), ("num_tokens", num_tokens)):
        if is_bool(number):  # which torch's dispatcher takes for an integer
            raise TypeError(f"{name} must be an int, got {number!r}")
    if num_tokens is None and out is not None:
        check_tensors(out=out)
        num_tokens = out.shape[0] if out.dim() else 1  # a scalar is for the contract to refuse
    elif num_tokens is None and query_start_loc is not None:
        check_tensors(block_tables=block_tables, query_start_loc=query_start_loc, seq_lens=seq_lens)
        specs = spec_of(block_tables), spec_of(query_start_loc), spec_of(seq_lens)
        check_slot_mapping(*specs, block_size, num_tokens=0)
        num_tokens = _end_of(query_start_loc)
    arguments = (block_tables, query_start_loc, seq_lens, block_size, num_tokens, backend)
    if out is None:
        return call(_library.slot_mapping, arguments)
    call(_library.slot_mapping_out, (out, *arguments))
    return out


def gather_slots(
    caches: Tensor | Sequence[Tensor],
    slots: Tensor,
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
    """Keys and values of slots, out of a paged KV cache into contiguous tensors.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it. Tensors may be strided. Not differentiable.

    Args:
        caches: `(key_cache, value_cache)`, or one tensor for layouts that hold both.
        slots: `[n]` of int32 or int64, as `slot_mapping` gives them.
        dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
        kv_cache_dtype: "auto", or the format in which the cache was written.
        k_scale: What quantised keys are multiplied by: float32 of one element, or one a head, `[num_heads]`, or a
            number; None means 1. Or the scale cache of a `…_per_token_head_quant`, then for both.
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
        Key `[n, num_heads, head_size]` and value `[n, num_heads, head_size_v]`, each as `gather_kv` has them. Zeros for
        slots that are not in the cache: -1 is for padding.

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> key_cache = torch.arange(6.0).reshape(3, 2, 1, 1)  # 3 blocks of 2 slots, 1 head of 1 element
        >>> key, value = torchkv.gather_slots((key_cache, -key_cache), torch.tensor([4, -1, 1]))
        >>> key.ravel().tolist()
        [4.0, 0.0, 1.0]
    """
    check_tensors(slots=slots)
    return gather_with(
        "gather_slots", caches, slots, None, 0, dtype, kv_cache_dtype, k_scale, v_scale, layout, scale_layout, layer,
        head_size, head_size_v, out, backend,
    )  # fmt: skip


def _end_of(starts: Tensor) -> int | None:
    """Where the last sequence ends: at the furthest start, as those of padding may be anything before it.

    None where the starts have no value, or none that the host may wait for: the contract refuses the call then.
    """
    if (
        torch.compiler.is_compiling()
        or isinstance(starts, FakeTensor)
        or starts.is_meta
        or is_batchedtensor(starts)
        or (starts.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return max(0, int(starts.max()))
