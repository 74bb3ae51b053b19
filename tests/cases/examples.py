"""Files and prompts for tests of examples/generate.py."""

from pathlib import Path

import gguf
import numpy as np

from examples.llama.jax_session import JaxLlama
from examples.llama.paging import plan_batch
from examples.llama.session import Report, run
from examples.llama.torch_session import TorchLlama

EXAMPLES = Path(__file__).parents[2] / "examples"


TWINS = {"jax": JaxLlama, "torch": TorchLlama}


PROMPTS = ("The capital of France is", "The weather in the north of Canada is usually", "1 2 3 4")


NEW_TOKENS = 32  # the first two end by themselves before


def write_gguf(
    path, *, architecture="llama", pre="smollm", tied=False, frequencies=None, extra=(), without=None, template=None
):
    """A Llama of two layers, its vocabulary 256 bytes, a merge and an end of text that no byte spells."""
    rng = np.random.default_rng(0)
    hidden, heads, kv_heads, size, mlp = 64, 4, 2, 16, 96
    tokens = [*sorted(_byte_alphabet()), "he", "<|end|>"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)

    def add(name, *shape, kind=gguf.GGMLQuantizationType.Q8_0):
        data = rng.standard_normal(shape, np.float32) * 0.3
        if name == without:
            return
        if len(shape) == 1:
            writer.add_tensor(name, 1 + data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), hidden)
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", hidden)
        add(f"blk.{layer}.attn_q.weight", heads * size, hidden)
        add(f"blk.{layer}.attn_k.weight", kv_heads * size, hidden)
        add(f"blk.{layer}.attn_v.weight", kv_heads * size, hidden)
        add(f"blk.{layer}.attn_output.weight", hidden, heads * size, kind=gguf.GGMLQuantizationType.F16)
        add(f"blk.{layer}.ffn_norm.weight", hidden)
        add(f"blk.{layer}.ffn_gate.weight", mlp, hidden)
        add(f"blk.{layer}.ffn_up.weight", mlp, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, mlp)
    add("output_norm.weight", hidden)
    if not tied:
        add("output.weight", len(tokens), hidden)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(frequencies, np.float32))
    for name in extra:
        writer.add_tensor(name, np.zeros(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def open_session(llama, batch, layout="NHD", kv_cache_dtype="auto", granularity=None, sampling=None):
    """A session whose static scales are calibrated on its own prompts."""
    static = granularity in ("tensor", "head")
    scales = llama.calibrate(batch, kv_cache_dtype, granularity) if static else None
    return llama.session(batch, layout, kv_cache_dtype, scales, sampling)


def generate(llama, prompts, new_tokens=NEW_TOKENS, *, chunk=None, sampling=None, **cache):
    """New tokens of each prompt, and the session that made them."""
    batch = plan_batch(prompts, new_tokens, context_length=llama.model.config.context_length)
    session, report = open_session(llama, batch, sampling=sampling, **cache), Report()
    for _ in run(session, report, chunk):
        pass
    return report.answers, session


def some_prompts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length).tolist() for length in lengths]
