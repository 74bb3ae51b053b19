"""The example: real text from a real model, in JAX and in torch, equal to transformers' on the same file."""

from dataclasses import replace
from itertools import chain, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.llama.chat import as_chat
from examples.llama.gguf_model import find_model, load_model, open_model
from examples.llama.jax_session import JaxLlama
from examples.llama.paging import BLOCK_SIZE, plan_batch
from examples.llama.session import Report, run
from examples.llama.torch_session import TorchLlama, TorchSession
from tests.cases.examples import NEW_TOKENS, TWINS, generate, open_session, some_prompts, write_gguf

LAYOUTS = (
    *("NHD", "HND", "HEAD_MAJOR", "PALLAS", "KV_NHD", "BLOCK_KV_NHD", "BLOCK_KV_HND"),
    *("PACKED_NHD", "PACKED_HND", "INTERLEAVED", "head slot dim block", "slot (kv head) block dim"),
)


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


@pytest.fixture(scope="module")
def usual_answers(small_twins):
    """By framework, to the prompts of the next test, with the default layout."""
    return {name: generate(llama, some_prompts(5, 33), 12)[0] for name, llama in small_twins.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("framework", TWINS)
def test_every_layout_gives_the_same_tokens(framework, layout, small_twins, usual_answers):
    answers, session = generate(small_twins[framework], some_prompts(5, 33), 12, layout=layout)
    assert answers == usual_answers[framework]
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
    assert together.shape == (2, 2, 2)  # K and V, layers, heads
    alone = [scales([prompt], "head") for prompt in prompts]
    np.testing.assert_allclose(together, np.maximum(*alone), rtol=1e-5)
    np.testing.assert_allclose(scales(prompts, "tensor"), together.max(axis=2, keepdims=True), rtol=1e-5)


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
