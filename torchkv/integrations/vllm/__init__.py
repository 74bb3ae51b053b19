"""vLLM's cache and attention functions with vLLM 0.33's names, parameters, order and defaults, on torchkv's kernels.

    from torchkv.integrations import vllm
    with vllm.patch():  # or undo = vllm.patch(); …; undo.close()
        ...             # an imported vLLM calls them

What an argument asks for and torchkv lacks is an `UnsupportedError`, before anything is written; a patched vLLM calls
its own function then.
"""

from torchkv.integrations.vllm.arguments import UnsupportedError
from torchkv.integrations.vllm.attention import merge_attn_states, unified_attention
from torchkv.integrations.vllm.patching import patch
from torchkv.integrations.vllm.write import (
    concat_and_cache_mla,
    reshape_and_cache_flash,
    triton_reshape_and_cache_flash,
    triton_reshape_and_cache_flash_diffkv,
    triton_reshape_and_cache_flash_per_token_head_quant,
)

__all__ = [
    "UnsupportedError",
    "concat_and_cache_mla",
    "merge_attn_states",
    "patch",
    "reshape_and_cache_flash",
    "triton_reshape_and_cache_flash",
    "triton_reshape_and_cache_flash_diffkv",
    "triton_reshape_and_cache_flash_per_token_head_quant",
    "unified_attention",
]
