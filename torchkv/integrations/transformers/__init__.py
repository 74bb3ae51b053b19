"""A paged, quantised cache for the `generate` of Hugging Face's transformers, and the attention that reads it.

    from torchkv.integrations.transformers import PagedCache
    cache = PagedCache.for_model(model, max_tokens=2048, batch_size=4, kv_cache_dtype="fp8")
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

Importing it registers the attention "torchkv" with transformers, for `model.set_attn_implementation("torchkv")`, which
`for_model` calls. Docs: docs/transformers.md.
"""

from kvcore import installed
from torchkv.integrations.transformers.versions import MISSING, check_version

with installed.needed("transformers", MISSING):
    import transformers as _transformers

check_version(_transformers.__version__)

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402, once it is known to be there

from torchkv.integrations.transformers.attention import paged_attention_forward  # noqa: E402
from torchkv.integrations.transformers.cache import PagedCache  # noqa: E402
from torchkv.integrations.transformers.continuous import (  # noqa: E402
    CONTINUOUS,
    continuous_attention_forward,
    continuous_batching,
)
from torchkv.integrations.transformers.handle import ATTENTION, UnsupportedError  # noqa: E402
from torchkv.integrations.transformers.masks import paged_mask  # noqa: E402

AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, paged_mask)
AttentionInterface.register(CONTINUOUS, continuous_attention_forward)

__all__ = [
    "PagedCache",
    "UnsupportedError",
    "continuous_attention_forward",
    "continuous_batching",
    "paged_attention_forward",
    "paged_mask",
]
