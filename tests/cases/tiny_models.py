"""Small random models of transformers, and texts that they make."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, WINDOW = 211, 8
COMMON = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=24)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **COMMON,
            **MIXED,
            head_dim=16,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=2.0,
            tie_word_embeddings=False,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**COMMON, **MIXED, head_dim=16, query_pre_attn_scalar=20, tie_word_embeddings=False)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, **MIXED, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    ),
}
"""In float32, with weights large enough for attention to matter."""

REFERENCE = {"gpt_oss": "eager", "gemma2": "eager"}
"""The attention of transformers that says what is right, where it is not sdpa: it knows no sinks and no caps."""

GREEDY = dict(do_sample=False, max_new_tokens=20)


def tiny(name, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.copy_(torch.linspace(0, 4, parameter.numel()))
    return model.to(device, dtype)


def prompts(lengths=(21, 14, 8), padding="left", device="cpu"):
    """Token ids and mask of a padded batch."""
    torch.manual_seed(1)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width))
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[width - length if padding == "left" else 0 :][:length] = 1
    return (ids * mask).to(device), mask.to(device)


def reference(model, name):
    """The model with transformers' own attention."""
    model.set_attn_implementation(REFERENCE.get(name, "sdpa"))
    return model
