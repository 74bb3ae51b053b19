"""The example: real text from a real model, in JAX and in torch, equal to transformers' on the same file."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import accuracy
from examples.llama import jax_model, torch_model
from examples.llama.chat import as_chat
from examples.llama.gguf_model import ArrayReader, InputError, find_model, load_model, open_model
from examples.llama.jax_session import JaxLlama
from examples.llama.memory import check_host_memory, free_host_memory, ran_out
from examples.llama.paging import BLOCK_SIZE, BlockAllocator, plan_batch
from examples.llama.session import Report, Sampling, run
from examples.llama.text import TextStream
from examples.llama.tokenizer import build_tokenizer
from examples.llama.torch_session import TorchLlama, TorchSession

EXAMPLES = Path(__file__).parents[2] / "examples"
TWINS = {"jax": JaxLlama, "torch": TorchLlama}
PROMPTS = ("The capital of France is", "The weather in the north of Canada is usually", "1 2 3 4")
NEW_TOKENS = 32  # the first two end by themselves before
LAYOUTS = (
    *("NHD", "HND", "HEAD_MAJOR", "PALLAS", "KV_NHD", "BLOCK_KV_NHD", "BLOCK_KV_HND"),
    *("PACKED_NHD", "PACKED_HND", "INTERLEAVED", "head slot dim block", "slot (kv head) block dim"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Beside other processes, threads that wait for each other in a loop take many times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def quick_reader():
    """transformers reads a GGUF file twice, 3 s each time; through our reader, 1 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", ArrayReader)
        yield


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


def cache_arrays(session):
    if isinstance(session, TorchSession):
        return [cache.cpu().numpy() for cache in session.cache.caches]
    return [np.asarray(cache) for cache in session.state.cache.caches]


def reference_greedy(model, prompt, new_tokens=NEW_TOKENS):
    """The same from transformers, without the prompt."""
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


# --- SmolLM2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    return load_model(find_model())


@pytest.fixture(scope="module")
def prompt_ids(smollm):
    return [smollm.tokenizer.encode(prompt).ids for prompt in PROMPTS]


def test_greedy_text_equals_transformers_alone_and_batched(smollm, prompt_ids):
    # One test for both twins: loading the reference takes longer than either.
    path = find_model()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = [reference_greedy(model, ids) for ids in prompt_ids]
    assert smollm.tokenizer.decode(expected[0]).startswith(" Paris.")
    assert expected[0][-1] in smollm.config.stop_ids
    assert len(expected[2]) == NEW_TOKENS
    for name, twin in TWINS.items():
        llama = twin(smollm)
        for ids, wanted in zip(prompt_ids, expected, strict=True):
            assert generate(llama, [ids])[0] == [wanted], name
        assert generate(llama, prompt_ids)[0] == expected, name


def test_tokenizer_equals_transformers(smollm):
    path = find_model()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = (
        *(
            "",
            " ",
            "Hello world",
            "  two leading spaces",
            "trailing  ",
            "tabs\t\tand\n\n\nlines",
            "don't I'll WE'VE",
        ),
        *("12345 and 6 7.89", "x=10**3", "é漢字 naïve Ünïcödé", "🙂👩‍👩‍👧", "٣٤٥ १२", "１２", "a\u00a012"),
        *("<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", "<|im_start", "<file_sep><repo_name>"),
    )
    for text in texts:
        ids = smollm.tokenizer.encode(text).ids
        assert ids == reference(text)["input_ids"], text
        assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_equals_transformers(smollm):
    path = find_model()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    file = open_model(path)
    for prompt in ("What is the capital of France?", " two\n\nlines {{ 1 }}", "<b>&amp;</b> é漢"):
        messages = [{"role": "user", "content": prompt}]
        text = reference.apply_chat_template(
            messages, chat_template=file.chat_template, tokenize=False, add_generation_prompt=True
        )
        assert as_chat(file, prompt) == text
        assert text.endswith(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        # Each mark is one token, not the characters that spell it.
        assert file.tokenizer.encode(text).tokens.count("<|im_start|>") == 3


def test_every_digit_stands_alone(smollm):
    # `tokenizer.ggml.pre` is "smollm": digits are cut off before words are, as in SmolLM2's own tokenizer and
    # in llama.cpp. So two spaces before a digit are one token. transformers ignores the key and makes two.
    tokens = smollm.tokenizer.encode("x  12").tokens
    assert tokens == ["x", "ĠĠ", "1", "2"]


def test_fp8_cache_is_stored_in_bytes_and_still_finds_paris(smollm, prompt_ids):
    answers, session = generate(TorchLlama(smollm), prompt_ids[:1], 4, kv_cache_dtype="fp8")
    assert smollm.tokenizer.decode(answers[0]).startswith(" Paris")
    assert {cache.dtype for cache in session.cache.caches} == {torch.uint8}


# --- A small Llama with random weights ------------------------------------------------------------


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


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf")


@pytest.fixture(scope="module")
def small(small_file):
    return load_model(small_file)


@pytest.fixture(scope="module")
def small_twins(small):
    return {name: twin(small) for name, twin in TWINS.items()}


def some_prompts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize("variant", ["untied", "tied", "rope_freqs"])
def test_any_llama_equals_transformers_also_in_pieces(variant, tmp_path):
    # 600 tokens are more than one prefill call takes.
    divisors = np.linspace(1, 8, 8) if variant == "rope_freqs" else None
    path = write_gguf(tmp_path / "model.gguf", tied=variant == "tied", frequencies=divisors)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    if divisors is not None:  # transformers does not read them
        reference.model.rotary_emb.inv_freq /= torch.tensor(divisors, dtype=torch.float32)
    prompts = some_prompts(1, 16, 17, 600)
    wanted = [reference_greedy(reference, prompt, 20) for prompt in prompts]
    model = load_model(path)
    for twin in TWINS.values():
        assert generate(twin(model), prompts, 20)[0] == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("framework", TWINS)
def test_every_layout_gives_the_same_tokens(framework, layout, small_twins):
    llama = small_twins[framework]
    prompts = some_prompts(5, 33)
    answers, session = generate(llama, prompts, 12, layout=layout)
    assert answers == generate(llama, prompts, 12)[0]
    assert session.spec.layout.pattern.startswith("layer ")


@pytest.mark.parametrize(
    ("layout", "kv_cache_dtype", "granularity"),
    [
        ("NHD", "fp8", "head"),
        ("HEAD_MAJOR", "fp8_e5m2", "tensor"),
        ("PACKED_HND", "fp8_e4m3fnuz", "token_head"),
        ("HND", "int8", "token_head"),
        ("INTERLEAVED", "int4", "head"),
        ("KV_NHD", "nvfp4", "tensor"),
    ],
)
def test_quantised_twins_store_the_same_bytes(layout, kv_cache_dtype, granularity, small_twins):
    cache = {"layout": layout, "kv_cache_dtype": kv_cache_dtype, "granularity": granularity}
    stored, answers = [], []
    for llama in small_twins.values():
        answer, session = generate(llama, some_prompts(9, 3), 4, **cache)
        assert (session.spec.scale_layout is not None) == (granularity == "token_head")
        answers.append(answer)
        stored.append(cache_arrays(session))
    assert answers[0] == answers[1]
    for first, second in zip(*stored, strict=True):
        assert first.dtype == second.dtype == np.uint8
        assert first.any()
        # Keys and values come from different matrix products: now and then a neighbour is rounded to.
        assert np.mean(first != second) < 0.01


@pytest.mark.parametrize("framework", TWINS)
def test_calibration_sees_all_of_every_prompt_and_no_padding(framework, small_twins):
    llama, prompts = small_twins[framework], some_prompts(21, 6)

    def scales(prompts, granularity):
        batch = plan_batch(prompts, 1, context_length=1024)
        return np.array(llama.calibrate(batch, "int8", granularity), np.float32)

    together = scales(prompts, "head")
    assert together.shape == (2, 2, 2)  # layers, K and V, heads
    alone = [scales([prompt], "head") for prompt in prompts]
    np.testing.assert_allclose(together, np.maximum(*alone), rtol=1e-5)
    np.testing.assert_allclose(scales(prompts, "tensor"), together.max(axis=2), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("framework", TWINS)
def test_half_precision_runs(framework, dtype, small):
    answers, session = generate(TWINS[framework](small, dtype), some_prompts(7, 3), 5)
    assert [len(answer) for answer in answers] == [5, 5]
    assert session.spec.dtype == dtype


@pytest.mark.parametrize("framework", TWINS)
def test_chunks_change_nothing(framework, small_twins):
    prompts = some_prompts(4, 20)
    whole, _ = generate(small_twins[framework], prompts, 15)
    assert generate(small_twins[framework], prompts, 15, chunk=4)[0] == whole


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_steps_of_a_cuda_graph_equal_eager_ones(kv_cache_dtype, small_twins):
    answers = []
    for eager in (False, True):
        batch = plan_batch(some_prompts(1, 30), 40, context_length=1024)
        session, report = small_twins["torch"].session(batch, kv_cache_dtype=kv_cache_dtype), Report()
        if eager:
            session._take_step = session._step
        for _ in run(session, report, 8):
            pass
        answers.append(report.answers)
    assert answers[0] == answers[1]


# --- Sampling -------------------------------------------------------------------------------------


def gumbel(seed, positions, vocabulary):
    """What `session.Sampling` says, in NumPy."""

    def mix(h):
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))

    sequences, ids = (np.arange(n, dtype=np.uint32) for n in (len(positions), vocabulary))
    rows = mix(mix(mix(np.full(len(positions), seed, np.uint32)) + sequences) + np.array(positions, np.uint32))
    bits = mix(rows[:, None] + ids)
    return -np.log(-np.log((bits // 512).astype(np.float32) + np.float32(0.5)) + np.float32(23 * np.log(2)))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_draws_are_those_that_are_documented(seed):
    positions = [0, 5, 8191]
    wanted = gumbel(seed, positions, 500)
    in_jax = jax_model.gumbel(jnp.uint32(seed), jnp.array(positions), 500)
    in_torch = torch_model.gumbel(seed, torch.tensor(positions), 500)
    assert np.isfinite(wanted).all()
    for found in (np.asarray(in_jax), in_torch.numpy()):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("framework", TWINS)
def test_samples_follow_the_softmax(framework):
    # 20,000 draws of one token: each frequency is within five standard deviations of its probability.
    logits, count, temperature = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32), 20_000, 0.7
    if framework == "jax":
        draws = np.asarray(jax_model.gumbel(jnp.uint32(3), jnp.arange(count), 5))
    else:
        draws = torch_model.gumbel(3, torch.arange(count), 5).numpy()
    found = np.bincount((logits + temperature * draws).argmax(axis=1), minlength=5) / count
    wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert (np.abs(found - wanted) < 5 * np.sqrt(wanted / count)).all()


def test_sampled_twins_give_the_same_tokens_alike_in_chunks(small_twins):
    prompts, sampling = some_prompts(5, 33, 5), Sampling(1.3, 7)
    answers = [generate(llama, prompts, 12, sampling=sampling)[0] for llama in small_twins.values()]
    assert answers[0] == answers[1]
    for llama in small_twins.values():
        assert generate(llama, prompts, 12, sampling=sampling, chunk=5)[0] == answers[0]
        assert generate(llama, prompts, 12, sampling=Sampling(1.3, 8))[0] != answers[0]
        assert generate(llama, prompts, 12)[0] != answers[0]
        assert generate(llama, prompts, 12, sampling=Sampling(1e-6, 7))[0] == generate(llama, prompts, 12)[0]


def test_sequences_with_one_prompt_are_sampled_apart(small_twins):
    prompt = some_prompts(5)[0]
    for llama in small_twins.values():
        first, second = generate(llama, [prompt, prompt], 12, sampling=Sampling(1.0, 0))[0]
        assert first != second


def test_table_of_accuracy(small_file, tmp_path):
    path = tmp_path / "accuracy.json"
    options = ["--tokens", "300", "--sample", "40", "--new-tokens", "4", "--formats", "auto", "int8", "nvfp4"]
    accuracy.main([*options, "--model", str(small_file), "--json", str(path)])
    exact, bfloat16, *quantised = json.loads(path.read_text())["rows"]
    assert (exact["bits"], exact["agreement"], exact["prefix"], exact["Δ nll"]) == (32, 1, 4, 0)
    assert bfloat16["bits"] == 16
    assert [(row["kv_cache_dtype"], row["granularity"], row["bits"]) for row in quantised] == [
        *(("int8", "token_head", 8 + 32 / 16), ("int8", "tensor", 8), ("int8", "head", 8)),
        *(("nvfp4", "tensor", 4.5), ("nvfp4", "head", 4.5)),
    ]
    for row in (bfloat16, *quantised):
        assert row["± se"] > 0
        assert 0.3 < row["agreement"] <= 1  # of random weights, which are close to undecided
        assert row["perplexity"] == pytest.approx(exact["perplexity"], rel=0.2)


def test_documented_calibration():
    (block,) = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "accuracy.md").read_text(), re.DOTALL)
    exec(compile(block, "accuracy.md", "exec"), names := {})
    assert [(k.shape, v.shape) for k, v in names["scales"]] == [((8,), (8,))] * 4


# --- Paging ---------------------------------------------------------------------------------------


def test_blocks_are_scattered_and_belong_to_one_sequence():
    batch = plan_batch(some_prompts(100, 3, 50), 40, context_length=1024)
    needed = [-(-(length + 40) // BLOCK_SIZE) for length in (100, 3, 50)]
    owned = [row[:count].tolist() for row, count in zip(batch.block_tables, needed, strict=True)]
    together = list(chain.from_iterable(owned))
    assert len(set(together)) == len(together) == sum(needed)
    assert max(together) < batch.num_blocks
    assert not batch.block_tables[1, needed[1] :].any()
    neighbours = sum(b - a == 1 for blocks in owned for a, b in pairwise(blocks))
    assert neighbours <= 2


def test_allocator_takes_back_and_runs_out():
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(3)
    with pytest.raises(ValueError, match="count must be at most the 1 free blocks, got 2"):
        allocator.allocate(2)
    allocator.free(blocks[:1])
    assert sorted(allocator.allocate(2) + blocks[1:]) == [0, 1, 2, 3]


@pytest.mark.parametrize("framework", TWINS)
def test_only_owned_slots_are_written(framework, small_twins):
    llama, sentinel = small_twins[framework], 7.0
    prompts = some_prompts(20, 3)
    batch = plan_batch(prompts, 6, context_length=1024)
    session = llama.session(batch)
    if framework == "jax":
        poisoned = jax.tree.map(lambda cache: jnp.full_like(cache, sentinel), session.state.cache)
        session.state = session.state._replace(cache=poisoned)
    else:
        with torch.inference_mode():
            for cache in session.cache.caches:
                cache.fill_(sentinel)
    for _ in run(session, Report()):
        pass
    written = np.zeros((batch.num_blocks, BLOCK_SIZE), bool)
    for row, prompt in zip(batch.block_tables, prompts, strict=True):
        for position in range(len(prompt) + 6 - 1):  # the last token's keys are never needed
            written[row[position // BLOCK_SIZE], position % BLOCK_SIZE] = True
    for cache in cache_arrays(session):
        kept = (cache == sentinel).all(axis=(0, 3, 4))
        np.testing.assert_array_equal(kept, ~written)


def test_decode_is_in_place_and_one_program(small):
    # Blocks for 200,000 tokens: no temporary that depends on the batch comes near the size of the cache.
    batch = replace(plan_batch(some_prompts(4), 30, context_length=1024), num_blocks=200_000 // BLOCK_SIZE)
    for cache in (("NHD",), ("PACKED_HND",), ("NHD", "fp8", "token_head"), ("NHD", "int8", "head")):
        session = open_session(JaxLlama(small), batch, *cache)
        nbytes = session.spec.nbytes
        for program in (session.prefill_program, session.decode_program):
            memory = program.memory_analysis()
            assert memory.alias_size_in_bytes >= nbytes
            assert memory.temp_size_in_bytes < nbytes / 2
        session.prefill()
        before = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(session.state.cache)]
        session.decode(30)
        assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(session.state.cache)] == before


# --- Tokenizers of other Llamas -------------------------------------------------------------------


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁helo",
        "he",
        "ll",
        "hell",
        "▁hello",
    ]
    pieces += ["hello"]
    scores = [0.0] * (len(pieces) - 5) + [-1.0, -2.0, -3.0, -5.0, -4.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = build_tokenizer(meta)
    assert tokenizer.encode("hello hell").tokens == ["<s>", "▁hello", "▁", "hell"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for text in ("hello hell", "é", " hello"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_llama3_groups_digits_by_three_and_starts_with_its_token():
    tokens = [*sorted(_byte_alphabet()), "<|begin|>"]
    meta = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
    }
    tokenizer = build_tokenizer(meta)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 12345678")]
    assert words == ["ab", "Ġ", "123", "456", "78"]
    assert tokenizer.encode("a").tokens == ["<|begin|>", "a"]


def test_text_stream_holds_back_half_characters(smollm):
    prompt, answer = smollm.tokenizer.encode("Hi").ids, smollm.tokenizer.encode(" 🙂 漢!").ids
    stream = TextStream(smollm.tokenizer, prompt)
    pieces = [stream.more(answer[:count]) for count in range(len(answer) + 1)]
    assert "".join(pieces) == " 🙂 漢!"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    stream = TextStream(smollm.tokenizer, prompt)
    assert stream.more(smollm.tokenizer.encode(" \N{CUNEIFORM SIGN A}").ids[:-1]).strip() == ""
    assert stream.rest().endswith("\N{REPLACEMENT CHARACTER}")


# --- Command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cli():
    """examples/generate.py as a module. It finds its own `llama` beside it."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


def start(*arguments, tmp_path, **variables):
    """Starts the script in a process that at the end says which frameworks it imported."""
    program = (
        "import runpy, sys, atexit; "
        "loaded = lambda: [name for name in ('jax', 'torch') if name in sys.modules]; "
        "atexit.register(lambda: print('IMPORTED', *loaded(), file=sys.stderr)); "
        f"sys.argv[0] = {str(EXAMPLES / 'generate.py')!r}; sys.path.insert(0, {str(EXAMPLES)!r}); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments, tmp_path, input=None, **variables):
    """Runs the script to its end."""
    process = start(*arguments, tmp_path=tmp_path, **variables)
    out, err = process.communicate(input, timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_command_answers_a_question(tmp_path):
    done = command("What is the capital of France?", "--max-new-tokens", "16", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    for word in ("loading", "compiling", "compile", "prefill", "decode", "tokens/s", "MiB", "IMPORTED jax\n"):
        assert word in done.stderr
    assert done.stderr.index("compiling") < done.stderr.index("prefill")


def test_command_streams_real_text(tmp_path):
    done = command("--raw", PROMPTS[0], "--max-new-tokens", "5", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n\nThe\n"


def test_command_runs_torch_on_a_batch_without_jax(small_file, tmp_path):
    options = ("--framework", "torch", "--batch", "3", "--max-new-tokens", "5", "--layout", "kv-nhd")
    options += ("--kv-cache-dtype", "int4", "--granularity", "head")
    done = command("one", "another", *options, tmp_path=tmp_path, KV_MODEL=str(small_file))
    assert done.returncode == 0, done.stderr
    first, second, third = re.split(r"^\[\d\] ", done.stdout, flags=re.MULTILINE)[1:]
    assert first == third
    assert first.startswith("one")
    assert second.startswith("another")
    assert "of 16 slots, int4, 'layer kv block slot head dim'" in done.stderr
    assert "IMPORTED torch\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["x", ""], "a prompt must have at least one token, got an empty one"),
        (
            ["x" * 1000],
            "prompt and max_new_tokens must fit the model's context of 1024 tokens, got 1000 + 128",
        ),
        (
            ["x", "--kv-cache-dtype", "nvfp4", "--layout", "slot block dim head"],
            "layout must end with axis dim for kv_cache_dtype 'nvfp4', got 'layer slot block dim head'",
        ),
        (["x", "--model", "nowhere.gguf"], "model must be a GGUF file, got 'nowhere.gguf', which is no file"),
        (
            ["x", "--model", __file__],
            f'model must be a GGUF file, got {Path(__file__).name}, which starts with b\'"""T\'',
        ),
        (
            ["--prompts", "nowhere.txt"],
            "prompts must be a file that can be read, got 'nowhere.txt': No such file or directory",
        ),
    ],
)
def test_bad_requests_say_why_before_weights_are_read(arguments, message, cli, small_file, monkeypatch, capsys):
    monkeypatch.setenv("KV_MODEL", str(small_file))
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    monkeypatch.setattr(cli, "load_framework", None)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"generate.py: error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "y", "--batch", "1"], "argument --batch: must be at least the number of prompts, 2, got 1"),
        ([], "a PROMPT must be given, or --prompts a FILE that has one, got none"),
        (["x", "--temperature", "-1"], "argument --temperature: must be 0 or a finite number above, got -1"),
        (["x", "--temperature", "nan"], "argument --temperature: must be 0 or a finite number above, got nan"),
        (["x", "--seed", "4294967296"], "argument --seed: must be from 0 to 2^32 - 1, got 4294967296"),
        (["x", "--layout", "block slot head"], "must name exactly one of the axes dim, dim/x, k+v and latent"),
        (["x", "--layout", "nowhere"], "layout must be one of NHD, HND, "),
        (["x", "--layout", "mla"], "layout must have room for a Llama's values, got 'block slot latent'"),
        (["x", "--kv-cache-dtype", "fp8_ds_mla"], "invalid choice: 'fp8_ds_mla'"),
        (["x", "--granularity", "head"], "must be left out for --kv-cache-dtype auto, got head"),
        (
            ["x", "--kv-cache-dtype", "nvfp4", "--granularity", "token_head"],
            "argument --granularity: must be tensor or head for --kv-cache-dtype nvfp4, got token_head",
        ),
    ],
)
def test_bad_options_say_why(arguments, message, cli, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kv_cache_dtype", "granularity"),
    [("auto", None), ("int4", "token_head"), ("fp8", "token_head"), ("nvfp4", "tensor")],
)
def test_default_granularity(kv_cache_dtype, granularity, cli):
    assert cli.parse(["x", "--kv-cache-dtype", kv_cache_dtype]).granularity == granularity


def test_prompts_come_from_a_file(cli, small_file, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two é \r\nthree", encoding="utf-8")
    assert cli.parse(["--prompts", str(path)]).prompt == ["one", "  two é ", "three"]
    assert cli.parse(["zero", "--prompts", str(path)]).prompt == ["zero", "one", "  two é ", "three"]
    path.write_bytes(b"\xff")
    assert cli.main(["--prompts", str(path)]) == 2
    assert "prompts must be a file of text in UTF-8, got" in capsys.readouterr().err
    path.write_text("\n")
    with pytest.raises(SystemExit):
        cli.main(["--prompts", str(path)])


def test_prompts_come_from_standard_input(small_file, tmp_path):
    options = ("--framework", "torch", "--max-new-tokens", "2", "--temperature", "0.9", "--seed", "3")
    done = command("--prompts", "-", *options, tmp_path=tmp_path, input="he\nshe\n", KV_MODEL=str(small_file))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\[\d\] (he|she)", done.stdout, re.MULTILINE) == ["he", "she"]
    assert "small has no chat template: prompts are continued as they are" in done.stderr


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users') }}", "no users"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.pop() }}", "is unsafe"),
        ("{{ messages + 1 }}", 'can only concatenate list (not "int") to list'),
    ],
)
def test_a_template_that_does_not_work_is_refused(template, message, tmp_path, cli, capsys):
    path = write_gguf(tmp_path / "model.gguf", template=template)
    assert cli.main(["x", "--model", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("generate.py: error: model must have a chat template that works, got: ")
    assert message in line
    assert line.endswith("; --raw goes without")


def test_a_template_may_name_control_tokens_and_none_is_added_twice(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", template="{{ eos_token }}{{ messages[0].content }}{{ bos_token }}")
    assert as_chat(open_model(path), "hi") == "<|end|>hi"


@pytest.mark.parametrize("part", [0, 3, 4, 20, 0.01, 0.3, 0.6, 0.99])
def test_a_file_that_ends_early_is_refused(part, small_file, tmp_path, cli, capsys):
    whole = small_file.read_bytes()
    path = tmp_path / "part.gguf"
    path.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    assert cli.main(["x", "--model", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"generate.py: error: model must be a {'whole ' if part not in (0, 3) else ''}GGUF file, got part.gguf"
    )


@pytest.mark.parametrize("name", ["llama.context_length", "tokenizer.ggml.tokens"])
def test_metadata_that_is_missing_is_named(name, small_file, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file.read_bytes().replace(name.encode(), name.encode()[:-1] + b"_"))
    with pytest.raises(InputError, match=f"model must have the metadata {name}, got none in model.gguf"):
        load_model(path)


@pytest.mark.parametrize("framework", TWINS)
def test_a_batch_that_does_not_fit_is_one_line_before_weights_are_read(framework, cli, small_file, monkeypatch, capsys):
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    monkeypatch.setattr(cli, "free_host_memory", lambda: 2**30)
    arguments = ["x", "--model", str(small_file), "--framework", framework, "--batch", "20000"]
    assert cli.main(arguments) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"generate.py: error: out of memory: at least \d+\.\d GiB are needed and 1.0 GiB are free; "
        "smaller --batch, --max-new-tokens or --kv-cache-dtype take less",
        line,
    )


@pytest.mark.parametrize("framework", TWINS)
def test_what_the_frameworks_say_of_memory_is_one_line(framework, cli, small_file, monkeypatch, capsys):
    def fill(*_):
        if framework == "jax":
            return jnp.zeros((2**20, 2**24)).block_until_ready()
        return torch.empty(2**44)

    monkeypatch.setattr(cli, "open_model", fill)
    assert cli.main(["x", "--model", str(small_file)]) == 3
    assert re.fullmatch(r"generate.py: error: out of memory: .*", capsys.readouterr().err.splitlines()[-1])


def test_other_errors_keep_their_traceback(cli, small_file, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(cli, "open_model", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["x", "--model", str(small_file)])


def test_free_memory_is_the_least_of_host_and_container(tmp_path):
    assert free_host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_host_memory(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_host_memory(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("3000\n")
    assert free_host_memory(tmp_path) == 2000
    check_host_memory(2000, 2000)
    check_host_memory(2001, None)
    with pytest.raises(MemoryError) as caught:
        check_host_memory(2001, 2000)
    assert ran_out(caught.value)
    assert not ran_out(RuntimeError("fault"))


def test_interruption_is_one_line(small_file, tmp_path):
    # Sent while it compiles, in a process of its own.
    process = start("x", "--max-new-tokens", "900", "--batch", "64", tmp_path=tmp_path, KV_MODEL=str(small_file))
    assert process.stderr is not None
    for line in process.stderr:
        if "compiling" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "generate.py: interrupted\n" in rest


def test_a_reader_that_leaves_is_no_error(small_file, tmp_path):
    process = start("x", "--max-new-tokens", "400", tmp_path=tmp_path, KV_MODEL=str(small_file))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert "Traceback" not in process.stderr.read()


def test_a_gpu_without_jax_triton_is_one_line(cli, small_file, monkeypatch, capsys):
    def fail(*_):
        raise ModuleNotFoundError("jax-triton is not installed", name="jax_triton")

    monkeypatch.setattr(cli, "open_model", fail)
    assert cli.main(["x", "--model", str(small_file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "generate.py: error: jax-triton is not installed"


def test_help_lists_exit_codes(cli, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for code in (0, cli.REFUSED, cli.NO_MEMORY, cli.INTERRUPTED, cli.NO_READER):
        assert re.search(rf"^  {code} ", text, re.MULTILINE)


def test_script_and_project_ask_for_the_same():
    (header,) = re.findall(
        r"^# /// script\n(.*?)^# ///$", (EXAMPLES / "generate.py").read_text(), re.DOTALL | re.MULTILINE
    )
    script = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())
    assert script["dependencies"] == ["jaxkv[jax]", *project["dependency-groups"]["example"]]
    assert script["requires-python"] == project["project"]["requires-python"]
    assert script["tool"]["uv"]["dependency-metadata"] == project["tool"]["uv"]["dependency-metadata"]


def test_missing_framework_says_how(cli, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["x", "--framework", "torch"]) == 2
    assert "framework torch must be installed, got none: uv run --with torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "model must have the architecture 'llama', got 'qwen2' in model.gguf"),
        (
            {"pre": "tekken"},
            "tokenizer.ggml.pre must be one of 'default', 'gpt-2', 'smollm', .*, got 'tekken'",
        ),
        (
            {"without": "blk.1.ffn_up.weight"},
            "model must have the tensor blk.1.ffn_up.weight, got none",
        ),
        (
            {"extra": ["blk.0.attn_q.bias"]},
            "model must be a plain Llama, got tensors of other parts: blk.0.attn_q.bias",
        ),
    ],
)
def test_other_models_are_refused(changes, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(InputError, match=message):
        load_model(path)
