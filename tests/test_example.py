"""The example: real text from a real model, in JAX and in torch, equal to transformers' on the same file."""

import importlib.util
import json
import os
import re
import subprocess
import sys
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
from examples.llama.gguf_model import ArrayReader, InputError, find_model, load_model
from examples.llama.jax_session import JaxLlama
from examples.llama.paging import BLOCK_SIZE, BlockAllocator, plan_batch
from examples.llama.session import Report, run
from examples.llama.text import TextStream
from examples.llama.tokenizer import build_tokenizer
from examples.llama.torch_session import TorchLlama, TorchSession

EXAMPLES = Path(__file__).parents[1] / "examples"
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


def open_session(llama, batch, layout="NHD", kv_cache_dtype="auto", granularity=None):
    """A session whose static scales are calibrated on its own prompts."""
    static = granularity in ("tensor", "head")
    scales = llama.calibrate(batch, kv_cache_dtype, granularity) if static else None
    return llama.session(batch, layout, kv_cache_dtype, scales)


def generate(llama, prompts, new_tokens=NEW_TOKENS, *, chunk=None, **cache):
    """New tokens of each prompt, and the session that made them."""
    batch = plan_batch(prompts, new_tokens, context_length=llama.model.config.context_length)
    session, report = open_session(llama, batch, **cache), Report()
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


def write_gguf(path, *, architecture="llama", pre="smollm", tied=False, frequencies=None, extra=(), without=None):
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


def command(*arguments, tmp_path, **variables):
    """Runs the script in a process that at the end says which frameworks it imported."""
    program = (
        "import runpy, sys, atexit; "
        "loaded = lambda: [name for name in ('jax', 'torch') if name in sys.modules]; "
        "atexit.register(lambda: print('IMPORTED', *loaded(), file=sys.stderr)); "
        f"sys.argv[0] = {str(EXAMPLES / 'generate.py')!r}; sys.path.insert(0, {str(EXAMPLES)!r}); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | variables
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_streams_real_text(tmp_path):
    done = command(PROMPTS[0], "--max-new-tokens", "5", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n\nThe\n"
    for word in ("compile", "prefill", "decode", "tokens/s", "MiB", "IMPORTED jax\n"):
        assert word in done.stderr


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
        ([""], "a prompt must have at least one token, got an empty one"),
        (
            ["x" * 1000],
            "prompt and max_new_tokens must fit the model's context of 1024 tokens, got 1000 + 128",
        ),
        (
            ["x", "--kv-cache-dtype", "nvfp4", "--layout", "slot block dim head"],
            "layout must end with axis dim for kv_cache_dtype 'nvfp4', got 'layer slot block dim head'",
        ),
        (["x", "--model", "nowhere.gguf"], "model must be a GGUF file, got 'nowhere.gguf', which is no file"),
    ],
)
def test_bad_requests_say_why(arguments, message, cli, small_file, monkeypatch, capsys):
    monkeypatch.setenv("KV_MODEL", str(small_file))
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"generate.py: error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "y", "--batch", "1"], "argument --batch: must be at least the number of prompts, 2, got 1"),
        (["x", "--layout", "block slot head"], "must name exactly one of the axes dim, dim/x and k+v"),
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
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kv_cache_dtype", "granularity"),
    [("auto", None), ("int4", "token_head"), ("fp8", "token_head"), ("nvfp4", "tensor")],
)
def test_default_granularity(kv_cache_dtype, granularity, cli):
    assert cli.parse(["x", "--kv-cache-dtype", kv_cache_dtype]).granularity == granularity


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
