"""The mask function of transformers: which tokens of a padded batch are real, in a form that the cache understands.

Which positions a query sees is not in it: that is causal attention, with the window of the layer. A model that asks for
anything else is refused here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from torchkv.integrations.transformers.handle import UnsupportedError

COUNTS = 2
"""Columns of a real mask before those of the new tokens: tokens of the sequence, and of them the new ones."""


def require(condition: Tensor | bool, message: str, error: type[Exception] = UnsupportedError) -> None:
    """Raises an error unless a condition holds; in compiled code, on the device, without waiting for it."""
    if torch.compiler.is_compiling() and isinstance(condition, Tensor):
        torch.ops.aten._assert_async.msg(condition, message)
    elif not condition:
        raise error(message)


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """Which tokens are real, registered with transformers as the mask of the attention "torchkv".

    Args:
        batch_size: Not used.
        q_length: New tokens of each sequence, padding among them.
        kv_length: Not used.
        q_offset: Tokens of each sequence before the new ones, padding among them.
        kv_offset: Not used.
        mask_function: Causal, or causal with a window of `local_size`.
        attention_mask: `[batch, q_offset + q_length]`, nonzero where a token is real. None: all are.
        local_size: The window; None: there is none.
        options: Not used, but for `use_vmap`, which says that mask_function is one of a user's.

    Returns:
        None without attention_mask. Else int32 `[batch, 1, 1, 2 + q_length]`: how many real tokens a sequence has, how
        many of them are new, and which of the new ones are real. No mask of attention has this dtype.

    Raises:
        UnsupportedError: the mask is another, or has another length, or there is padding within a window that
            transformers counts as a part of it.
    """
    _check_pattern(mask_function, local_size, options.get("use_vmap", False))
    if attention_mask is None:
        return None
    mask = attention_mask != 0
    total = mask.shape[1]
    message = (
        f"attention_mask must have a column for each token so far and each new one, got {total} columns; call "
        "cache.reset() before another text"
    )
    require(q_offset + q_length == total, message)
    new = mask[:, total - q_length :]
    length = mask.sum(1)
    if local_size is not None:
        first = mask.int().argmax(1)  # 0 without a real token, whose length is 0
        apart = torch.where(length > 0, total - first, 0)
        whole = ((apart == length) | (apart <= local_size)).all()
        message = (
            f"attention_mask must have padding on the left only, in a model with a window of {local_size}: "
            "transformers counts other padding as tokens of the window; pass padding_side='left' to the tokenizer"
        )
        require(whole, message)
    counts = torch.stack((length, new.sum(1)), 1)
    return torch.cat((counts, new), 1).to(torch.int32)[:, None, None]


def _check_pattern(mask_function: Callable[..., Any], local_size: int | None, custom: bool) -> None:
    """Raises an UnsupportedError unless a mask function is causal, or causal with a window of this size."""
    if local_size is None:
        known = mask_function is causal_mask_function
    else:
        known = _is_like(mask_function, sliding_window_causal_mask_function(local_size))
    if custom or not known:
        raise UnsupportedError(
            "the model's mask must be causal, with or without a sliding window: bidirectional, blockwise and chunked "
            f"masks, and those of a user, cannot be read from a paged cache, got {_name(mask_function)}"
        )


def _is_like(function: Any, other: Any) -> bool:
    """Whether two functions have the same code, and values that are alike in what they close over."""
    if isinstance(other, tuple):
        return isinstance(function, tuple) and len(function) == len(other) and all(map(_is_like, function, other))
    if not callable(other):
        return function == other
    if getattr(function, "__code__", None) is not other.__code__:
        return False
    mine, others = function.__closure__ or (), other.__closure__ or ()
    return all(_is_like(a.cell_contents, b.cell_contents) for a, b in zip(mine, others, strict=True))


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))
