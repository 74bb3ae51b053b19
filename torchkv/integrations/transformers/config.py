"""What a model's config says of its layers."""

from typing import Any

from torchkv.integrations.transformers.handle import UnsupportedError

_FULL, _SLIDING = "full_attention", "sliding_attention"


def layer_windows(config: Any) -> tuple[Any, list[int | None]]:
    """The config of a model's text part, and the sliding window of each layer; None: no window.

    Raises:
        UnsupportedError: a layer is of another kind, or reads the keys of another one, or the model is an encoder's.
    """
    if config.is_encoder_decoder:
        raise UnsupportedError("config must be that of a decoder, got an encoder and a decoder")
    config = config.get_text_config(decoder=True)
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) is True:
        raise UnsupportedError("config must be of a model with causal attention, got a bidirectional one")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = _FULL if window is None else _SLIDING
        if getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        kinds = [kind] * config.num_hidden_layers
    others = sorted(set(kinds) - {_FULL, _SLIDING})
    if others:
        raise UnsupportedError(f"layer_types must be {_FULL} or {_SLIDING}, got {', '.join(others)}")
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    if shared or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedError("config must be of a model whose layers have keys of their own, got shared ones")
    return config, [window if kind == _SLIDING else None for kind in kinds]
