"""The attention function of transformers over a paged cache."""

from typing import Any

import torch
from torch import Tensor

from torchkv._arguments import refuse_gradients
from torchkv.integrations.transformers.handle import UnsupportedError, take

_UNKNOWN = (
    "position_bias", "head_mask", "indices", "block_indices", "seq_idx", "sinks", "learnable_sink",
)  # fmt: skip
"""Arguments of transformers' attentions that change the result, and that this one has no meaning for."""


def paged_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes new keys and values to a `PagedCache`, and attends over it: the attention "torchkv" of transformers.

    Args:
        module: The model's attention.
        query: `[batch, num_q_heads, tokens, head_size]`.
        key: `[batch, num_heads, tokens, head_size]`: of the new tokens, as the cache's `update` returned it.
        value: `[batch, num_heads, tokens, head_size_v]`.
        attention_mask: What `paged_mask` returned.
        scaling: What logits are multiplied by; None means `head_size ** -0.5`.
        dropout: 0.
        sliding_window: None, or the window that the cache has for this layer.
        softcap: A logit x becomes `softcap * tanh(x / softcap)`; None: no cap.
        s_aux: `[num_q_heads]`, attention sinks; None: none.
        is_causal: True, or None for what module says.
        kwargs: What the cache left for this call, and what has no effect here.

    Returns:
        `[batch, tokens, num_q_heads, head_size_v]`, and None for the weights. Rows of padding have no meaning.

    Raises:
        UnsupportedError: there is no PagedCache, or an argument is another than described here, or asks for weights.
        ValueError: a shape does not fit, or the cache has too few tokens for this call.
        OutOfBlocks: the cache has too few blocks for this call.
        NotImplementedError: autograd follows an argument.
    """
    handle = take(key, kwargs)
    refuse_gradients("paged_attention_forward", query, key, value, s_aux)
    check_call(module, dropout, is_causal, kwargs, ("cu_seq_lens_q", "cu_seq_lens_k"))
    options = {"scale": scaling, "soft_cap": softcap, "sinks": s_aux}
    return handle.layer.attend(query, key, value, attention_mask, sliding_window, options), None


def check_call(
    module: torch.nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any], unknown: tuple[str, ...]
) -> None:
    """Raises an UnsupportedError where a layer's attention is asked for what a paged cache cannot give.

    Args:
        module: The model's attention.
        dropout: Its dropout.
        is_causal: What the call says, or None.
        kwargs: Other arguments of the call.
        unknown: Which of them have no meaning here either.
    """
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            "output_attentions must be False, got True: weights are not kept; use attn_implementation='eager'"
        )
    if dropout:
        raise UnsupportedError(f"dropout must be 0 with a paged cache, got {dropout}: call model.eval()")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedError("is_causal must be True with a paged cache, got False")
    for name in (*_UNKNOWN, *unknown):
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name} must be None with a paged cache, got {type(kwargs[name]).__name__}")
