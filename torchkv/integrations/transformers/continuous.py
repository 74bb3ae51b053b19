"""transformers' continuous batching over torchkv's caches and attention: `generate_batch`, and the manager below it.

transformers makes the cache of its continuous batching itself, and in 5.24 refuses attentions that it does not
know: there is no hook for either. So a model gets a method of its own, `init_continuous_batching`, whose manager makes
another cache. Other models, and transformers' modules, stay as they are.
"""

import types
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvcore.choices import KVCacheDtype, TorchBackend
from torchkv._arguments import refuse_gradients
from torchkv.integrations.transformers.attention import check_call
from torchkv.integrations.transformers.cache import check_scales_of_layers
from torchkv.integrations.transformers.config import layer_windows
from torchkv.integrations.transformers.handle import UnsupportedError
from torchkv.integrations.transformers.kind import CacheKind
from torchkv.integrations.transformers.rebinding import unknown_version, with_globals

CONTINUOUS = "torchkv_continuous"
"""The name of the attention. It has no mask: sequences lie one behind the other, with a list of their lengths."""

_METHOD = "init_continuous_batching"
_PACKAGE = "transformers.generation.continuous_batching"


def continuous_batching(
    model: Any,
    *,
    kv_cache_dtype: KVCacheDtype = "auto",
    per_token_head: bool = False,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    backend: TorchBackend | None = None,
) -> ExitStack:
    """Has a model's continuous batching use torchkv's cache and attention, until it is undone.

    `model.generate_batch`, `model.continuous_batching_context_manager` and `model.init_continuous_batching` are called
    as before, with the same configs. Nothing else of transformers changes, and no other model.

    Args:
        model: A model of transformers, for text.
        kv_cache_dtype: "auto" for the model's dtype, or a format that `torchkv.PagedKVCache` knows: "fp8", "int8", ….
        per_token_head: Whether each head of a token has a scale of its own, as is best for "int8".
        k_scale: Otherwise, what quantised keys are divided by: a number, or float32 of one element or `[num_heads]`, or
            for each layer `[num_layers, 1]` or `[num_layers, num_heads]`; None means 1.
        v_scale: The same for values.
        backend: None, "triton", "torch" or "interpret".

    Returns:
        What undoes it: `close()`, or the end of a `with`. A manager that was kept (`persistent_manager=True`) ends with
            it.

    Raises:
        UnsupportedError: the model has layers of another kind than attention, with or without a sliding window; or this
            version of transformers is one whose continuous batching is not known.
        ValueError: a choice or a scale's shape does not fit.

    Example:
        >>> from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
        >>> from torchkv.integrations.transformers import continuous_batching
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
        >>> room = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
        >>> with continuous_batching(model, kv_cache_dtype="int8", per_token_head=True):
        ...     answers = model.generate_batch([[1, 2, 3], [4, 5]], options, continuous_batching_config=room)
        >>> [len(answer.generated_tokens) for answer in answers.values()]
        [4, 4]
    """
    config, windows = layer_windows(model.config)
    kind = CacheKind(kv_cache_dtype, per_token_head, k_scale, v_scale, backend)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    check_scales_of_layers(len(windows), k_scale=k_scale, v_scale=v_scale)
    for layer in range(len(windows)):  # what does not fit is said here, not by a thread of transformers
        kind.create(layer, 1, num_heads, head_size, dtype=model.dtype, device="cpu")
    made: Any = _initialiser(kind)
    made.torchkv_before, made.torchkv_undone = model.__dict__.get(_METHOD), False
    model.__dict__[_METHOD] = types.MethodType(made, model)
    undo = ExitStack()
    undo.callback(_restore, model, made, kind)
    return undo


def _restore(model: Any, made: Any, kind: CacheKind) -> None:
    """Undoes what one call has made. What a later call has made stays, until it is undone."""
    manager = getattr(model, "_cached_continuous_batching_manager", None)
    if getattr(manager, "torchkv_kind", None) is kind:
        model.destroy_cached_continuous_batching_manager()
    made.torchkv_undone = True
    method = model.__dict__.pop(_METHOD, None)
    while getattr(method, "torchkv_undone", False):
        method = method.torchkv_before
    if method is not None:
        model.__dict__[_METHOD] = method


def _initialiser(kind: CacheKind) -> Callable[..., Any]:
    """The function `init_continuous_batching` for caches of this kind."""
    try:
        api, caches = import_module(f"{_PACKAGE}.continuous_api"), import_module(f"{_PACKAGE}.cache")
        theirs = api.ContinuousBatchingManager
        create, initialise = theirs._create_batch_processor, getattr(api.ContinuousMixin, _METHOD)
        if hasattr(caches, "ATTN_TYPE_TO_ALLOCATOR"):  # from 5.18 on
            from torchkv.integrations.transformers.sectors import SectorCache as OurCache
        else:  # 5.17
            from torchkv.integrations.transformers.groups import GroupCache as OurCache
    except (ImportError, AttributeError) as error:
        raise unknown_version(str(error)) from error

    class Manager(theirs):
        torchkv_kind = kind

        def switch_to_cb_friendly_attn(self, model: Any, *_: Any) -> None:
            before = model.config._attn_implementation
            if before != CONTINUOUS:
                model.set_attn_implementation(CONTINUOUS)
                self._original_attn_impl = before
            got = model.config.get_text_config(decoder=True)._attn_implementation
            if got != CONTINUOUS:
                raise UnsupportedError(f'attn_implementation must be "{CONTINUOUS}", got "{got}" of the model')

        _create_batch_processor = with_globals(create, PagedAttentionCache=partial(OurCache, kind))

    return torch.no_grad()(with_globals(initialise, ContinuousBatchingManager=Manager))


@torch.compiler.disable
def continuous_attention_forward(
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
    """Writes new keys and values to the cache of continuous batching, and attends: "torchkv_continuous".

    Args:
        module: The model's attention.
        query: `[1, num_q_heads, tokens, head_size]`: sequences one behind the other.
        key: `[1, num_heads, tokens, head_size]`: of the new tokens.
        value: `[1, num_heads, tokens, head_size_v]`.
        attention_mask: None.
        scaling: What logits are multiplied by; None means `head_size ** -0.5`.
        dropout: 0.
        sliding_window: None, or the window that the cache has for this layer.
        softcap: A logit x becomes `softcap * tanh(x / softcap)`; None: no cap.
        s_aux: `[num_q_heads]`, attention sinks; None: none.
        is_causal: True, or None for what module says.
        kwargs: What continuous batching says of the sequences, with its cache, and what has no effect here.

    Returns:
        `[1, tokens, num_q_heads, head_size_v]`, and None for the weights.

    Raises:
        UnsupportedError: there is no such cache, or an argument is another than described here, or asks for weights.
        NotImplementedError: autograd follows an argument.
    """
    cache: Any = kwargs.get("cache")
    if not hasattr(cache, "torchkv_attend"):
        raise UnsupportedError(
            f'attention "{CONTINUOUS}" must be used within continuous batching (generate_batch) of a model that '
            f"continuous_batching was called for; cache is {type(cache).__name__}"
        )
    refuse_gradients("continuous_attention_forward", query, key, value, s_aux)
    check_call(
        module, dropout, is_causal, {"attention_mask": attention_mask, **kwargs}, ("attention_mask", "block_table")
    )
    options = {"scale": scaling, "soft_cap": softcap, "sinks": s_aux}
    rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = cache.torchkv_attend(module.layer_idx, *rows, sliding_window, kwargs, options)
    return out.unsqueeze(0), None
