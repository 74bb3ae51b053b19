"""vLLM's functions that read a cache, and its merge of partial results."""

from typing import Any

import torch
from torch import Tensor

from torchkv import merge, read
from torchkv.integrations.vllm.arguments import (
    FP8_PER_TENSOR,
    NONE,
    UnsupportedError,
    check_absent,
    check_device,
    check_floats,
    fp8_format,
    mode_of,
    per_token_head_format,
    printed,
)


def unified_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, seqused_k: Tensor, max_seqlen_k: int,
    softmax_scale: float, causal: Any, window_size: tuple[int, int] | None,
    block_table: Tensor, softcap: float | None,
    q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
    seq_threshold_3D: Any = None, num_par_softmax_segments: Any = None,  # noqa: N803
    softmax_segm_output: Any = None, softmax_segm_max: Any = None, softmax_segm_expsum: Any = None,
    alibi_slopes: Tensor | None = None, output_scale: Tensor | None = None, qq_bias: Tensor | None = None,
    sinks: Tensor | None = None, mm_prefix_range: Tensor | None = None,
    rswa_prefix_lens: Tensor | None = None, rswa_window: int | None = None, use_alibi_sqrt: bool = False,
    kv_quant_mode: Any = NONE, k_scale_cache: Tensor | None = None, v_scale_cache: Tensor | None = None,
    chunk_lookback: int = -1, use_td: bool = False, mm_prefix_clamp_sliding_window: bool = False,
) -> None:  # fmt: skip
    """The function of this name in vLLM (`triton_unified_attention`): `torchkv.paged_attention` into `out`.

    Arguments that say how vLLM's kernel is to be launched have no effect: max_seqlen_q, max_seqlen_k, seq_threshold_3D,
    num_par_softmax_segments, softmax_segm_output, softmax_segm_max, softmax_segm_expsum and use_td. Rows of out after
    the last sequence's become zeros.

    Args:
        q: `[num_tokens, num_q_heads, head_size]`, not quantised.
        k: `[num_blocks, block_size, num_heads, head_size]`, in any order of memory; with the scales of tokens and heads
            also with padding after each head's elements.
        v: The value cache, of the same axes as k.
        out: `[num_tokens, num_q_heads, head_size]`, not quantised, written to.
        cu_seqlens_q: `[num_seqs + 1]`: where each sequence's rows of q begin.
        max_seqlen_q: Not used.
        seqused_k: `[num_seqs]`: tokens of each sequence in the cache.
        max_seqlen_k: Not used.
        softmax_scale: What logits are multiplied by.
        causal: True or False.
        window_size: `(left, 0)`: a query sees left positions before its own; `(-1, -1)` or None: all.
        block_table: `[num_seqs, max_blocks]`.
        softcap: 0 for none.
        q_descale: None.
        k_descale: With the mode FP8_PER_TENSOR, by which keys are multiplied: float32 of one element, `[num_heads]`, or
            a row of either, expanded to `[num_seqs, num_heads]`. Without a mode not read, as in vLLM.
        v_descale: The same for values.
        seq_threshold_3D: Not used.
        num_par_softmax_segments: Not used.
        softmax_segm_output: Not used.
        softmax_segm_max: Not used.
        softmax_segm_expsum: Not used.
        alibi_slopes: None.
        output_scale: None.
        qq_bias: None.
        sinks: `[num_q_heads]`, or None.
        mm_prefix_range: None.
        rswa_prefix_lens: None, or rswa_window is.
        rswa_window: None, or rswa_prefix_lens is.
        use_alibi_sqrt: Has no effect without alibi_slopes.
        kv_quant_mode: NONE, FP8_PER_TENSOR, INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD of vLLM's enum, its number, or,
            for the latter two, the format's name (`int8_per_token_head`).
        k_scale_cache: Needed with the latter two, `[num_blocks, block_size, num_heads]` of float32.
        v_scale_cache: The same for values.
        chunk_lookback: Below 0 where there is a window.
        use_td: Not used.
        mm_prefix_clamp_sliding_window: Has no effect without mm_prefix_range.

    Raises:
        UnsupportedError: an argument is another than described here.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    check_device(k)
    check_floats(q=q, out=out)
    check_absent(
        q_descale=q_descale, alibi_slopes=alibi_slopes, output_scale=output_scale, qq_bias=qq_bias,
        mm_prefix_range=mm_prefix_range,
    )  # fmt: skip
    if rswa_window is not None and rswa_prefix_lens is not None:
        raise UnsupportedError(f"rswa_window must be None where rswa_prefix_lens is given, got {rswa_window}")
    causal, window = _causal_window(causal, window_size, chunk_lookback)

    mode = mode_of(kv_quant_mode)
    kv_cache_dtype, k_scale, v_scale = "auto", None, None
    if mode == FP8_PER_TENSOR:
        kv_cache_dtype = fp8_format(k)
        k_scale, v_scale = _one_row("k_descale", k_descale), _one_row("v_descale", v_descale)
    elif mode != NONE:
        kv_cache_dtype, k_scale, v_scale = per_token_head_format(mode, k), k_scale_cache, v_scale_cache
        _check_given(k_scale_cache=k_scale, v_scale_cache=v_scale)
        k, v = k[..., : q.shape[-1]], v[..., : out.shape[-1]]
    if block_table.shape[0] > seqused_k.shape[0]:
        block_table = block_table[: seqused_k.shape[0]]
    direct = out.dtype == q.dtype and out.is_contiguous()
    result = read.paged_attention(
        q, (k, v), block_table, seqused_k, query_start_loc=cu_seqlens_q, scale=softmax_scale, causal=causal,
        sliding_window=window, soft_cap=softcap, sinks=sinks, kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        k_scale=k_scale, v_scale=v_scale, out=out if direct else None,
    )  # fmt: skip
    if not direct:
        assert isinstance(result, Tensor)
        out.copy_(result)


def _causal_window(causal: Any, window_size: tuple[int, int] | None, chunk_lookback: int) -> tuple[bool, int | None]:
    """Whether attention is causal, and how many positions a query sees then, its own among them; None: all."""
    if isinstance(causal, Tensor):
        raise UnsupportedError(f"causal must be True or False, got {printed(causal)}")
    if window_size is None or tuple(window_size) == (-1, -1):
        return bool(causal), None
    left, right = window_size
    if left < 0 or right != 0:
        raise UnsupportedError(f"window_size must be (left, 0) or (-1, -1), got {tuple(window_size)}")
    if not causal:
        raise UnsupportedError(f"causal must be True with a window, got {bool(causal)}")
    if chunk_lookback > -1:
        raise UnsupportedError(f"chunk_lookback must be -1 with a window, got {chunk_lookback}")
    return True, left + 1


def _check_given(**scale_caches: Tensor | None) -> None:
    for name, scale_cache in scale_caches.items():
        if scale_cache is None:
            raise ValueError(f"{name} must be given with the scales of tokens and heads, got None")


def _one_row(name: str, scale: Tensor | None) -> Tensor | None:
    """A scale for all sequences: one element, or one a head."""
    if scale is None or scale.dim() < 2:
        return scale
    if scale.shape[0] > 1 and scale.stride(0) != 0:
        raise UnsupportedError(f"{name} must be one row, expanded to all sequences, got strides {scale.stride()}")
    if 0 in scale.shape:
        return None
    return scale[0, 0] if scale.stride(1) == 0 else scale[0]


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    """The function of this name in vLLM: `torchkv.merge_attention` of two partial results, into `output`.

    Args:
        output: `[num_tokens, num_q_heads, head_size]`, written to; it may be prefix_output or suffix_output.
        prefix_output: `[num_tokens, num_q_heads, head_size]`.
        prefix_lse: `[num_q_heads, num_tokens]` of float32.
        suffix_output: `[num_tokens, num_q_heads, head_size]`.
        suffix_lse: `[num_q_heads, num_tokens]` of float32.
        output_lse: `[num_q_heads, num_tokens]` of float32, written to; or None.
        prefill_tokens_with_context: How many tokens have a prefix; those after them are copied from the suffix. None:
            all.
        output_scale: None.

    Raises:
        UnsupportedError: output_scale is given, or tensors are quantised or on another device than a CPU, CUDA or ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    check_device(output)
    check_floats(output=output, prefix_output=prefix_output, suffix_output=suffix_output)
    check_absent(output_scale=output_scale)
    n, alone = prefill_tokens_with_context, []
    if n is not None and n < output.shape[0]:
        alone = [(output[n:], suffix_output[n:])]
        if output_lse is not None:
            alone.append((output_lse[:, n:], suffix_lse[:, n:]))
            output_lse = output_lse[:, :n]
        output, prefix_output, suffix_output = output[:n], prefix_output[:n], suffix_output[:n]
        prefix_lse, suffix_lse = prefix_lse[:, :n], suffix_lse[:, :n]
    shape = tuple(output.shape)
    for name, tensor, wanted in (
        ("prefix_output", prefix_output, shape), ("suffix_output", suffix_output, shape),
        ("prefix_lse", prefix_lse, shape[1::-1]), ("suffix_lse", suffix_lse, shape[1::-1]),
    ):  # fmt: skip
        if tensor.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}, as output, got {tuple(tensor.shape)}")
    lse = None if output_lse is None else output_lse.T
    outs, lses = torch.stack((prefix_output, suffix_output)), torch.stack((prefix_lse.T, suffix_lse.T))
    direct = output.dtype == outs.dtype
    result, _ = merge.merge_attention(outs, lses, out=output if direct else None, lse=lse)
    if not direct:
        output.copy_(result)
    for rows, suffix in alone:
        rows.copy_(suffix)
