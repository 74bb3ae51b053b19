"""FlashInfer's merge of partial results, whose log-sum-exp is to base 2."""

import math

import torch
from torch import Tensor

from torchkv import merge

LOG2_E = math.log2(math.e)


def lse_to_base_2(lse: Tensor) -> Tensor:
    """A log-sum-exp as FlashInfer has it: `log2` in place of torchkv's `log`. -inf stays."""
    return lse * LOG2_E


def lse_to_base_e(lse: Tensor) -> Tensor:
    """A log-sum-exp as torchkv has it: `log` in place of FlashInfer's `log2`. -inf stays."""
    return lse / LOG2_E


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """`flashinfer.merge_state`: `torchkv.merge_attention` of two partial results.

    Args:
        v_a: `[seq_len, num_heads, head_dim]`.
        s_a: `[seq_len, num_heads]`: its log-sum-exp, to base 2.
        v_b: `[seq_len, num_heads, head_dim]`.
        s_b: `[seq_len, num_heads]`.

    Returns:
        The merged result, of the dtype of v_a, and its log-sum-exp, of float32. Rows of which neither saw anything are
        zeros, and -inf.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    shape = tuple(v_a.shape)
    for name, tensor, wanted in (("v_b", v_b, shape), ("s_a", s_a, shape[:2]), ("s_b", s_b, shape[:2])):
        if tensor.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}, as v_a, got {tuple(tensor.shape)}")
    return merge_states(torch.stack([v_a, v_b], 1), torch.stack([s_a.float(), s_b.float()], 1))


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """`flashinfer.merge_state_in_place`: merges another partial result into v and s.

    Args:
        v: `[seq_len, num_heads, head_dim]`, written to.
        s: `[seq_len, num_heads]` of float32: its log-sum-exp, to base 2, written to.
        v_other: `[seq_len, num_heads, head_dim]`.
        s_other: `[seq_len, num_heads]`.
        mask: `[seq_len]` of bool: rows that are merged. None: all.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    merged, lse = merge_state(v, s, v_other, s_other)
    if mask is not None:
        merged = torch.where(mask[:, None, None], merged, v)
        lse = torch.where(mask[:, None], lse, s.float())
    v.copy_(merged)
    s.copy_(lse)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`flashinfer.merge_states`: `torchkv.merge_attention` of any number of partial results.

    Args:
        v: `[seq_len, num_states, num_heads, head_dim]`.
        s: `[seq_len, num_states, num_heads]`: their log-sum-exps, to base 2.

    Returns:
        The merged result, `[seq_len, num_heads, head_dim]` of the dtype of v, and its log-sum-exp, `[seq_len,
        num_heads]` of float32.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    if v.dim() != 4 or tuple(s.shape) != tuple(v.shape[:3]):
        raise ValueError(
            "v must have shape (seq_len, num_states, num_heads, head_dim), and s its first three sizes, "
            f"got {tuple(v.shape)} and {tuple(s.shape)}"
        )
    out, lse = merge.merge_attention(
        v.transpose(0, 1).contiguous(), lse_to_base_e(s.float().transpose(0, 1)).contiguous()
    )
    return out, lse_to_base_2(lse)
