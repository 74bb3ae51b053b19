"""transformers' continuous batching over torchkv's caches: the texts that `generate` makes of each prompt alone."""

import pytest
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, Llama4ForCausalLM, Llama4TextConfig
from transformers.generation.continuous_batching import PagedAttentionCache, continuous_api

from tests.cases.tiny_models import GREEDY, MODELS, VOCABULARY, WINDOW, prompts, reference, tiny
from torchkv.integrations.transformers import CONTINUOUS, PagedCache, UnsupportedError, continuous_batching

LENGTHS = (21, 14, 8, 3, 17)
SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"  # what transformers calls it
QUANTISED = {
    "int8": {"kv_cache_dtype": "int8", "per_token_head": True},
    "fp8": {"kv_cache_dtype": "fp8"},
    "int4": {"kv_cache_dtype": "int4", "per_token_head": True},
    "int8, scales of layers": {
        "kv_cache_dtype": "int8",
        "k_scale": torch.tensor([[0.08, 0.1], [0.1, 0.12]]),
        "v_scale": torch.tensor([[0.08, 0.1], [0.1, 0.12]]),
    },
}


def rows(lengths=LENGTHS):
    """Prompts as lists, and as a padded batch with its mask."""
    ids, mask = prompts(lengths)
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)], ids, mask


def room(block_size=4, **options):
    return ContinuousBatchingConfig(**{SIZE: block_size, "num_blocks": 48, "max_batch_tokens": 16, **options})


def settings(**options):
    return GenerationConfig(**{**GREEDY, "eos_token_id": -1, "pad_token_id": 0, **options})


def answers(model, inputs, config=None, **options):
    """What generate_batch makes of each prompt."""
    found = model.generate_batch(inputs, settings(**options), continuous_batching_config=config or room())
    assert [answer.error for answer in found.values()] == [None] * len(found)
    return [answer.generated_tokens for answer in found.values()]


def alone(model, inputs, **options):
    """What generate makes of each prompt alone."""
    made = []
    for row in inputs:
        ids = torch.tensor([row])
        made.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)[0, len(row) :].tolist()
        )
    return made


class Held:
    """A manager that runs, of which the cache can be seen."""

    def __init__(self, model, config, **options):
        self.arguments = {"generation_config": settings(**options), "continuous_batching_config": config}
        self.model = model

    def __enter__(self):
        self.context = self.model.continuous_batching_context_manager(**self.arguments, block=True)
        self.manager = self.context.__enter__()
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def answers(self, inputs):
        names = self.manager.add_requests(inputs, max_new_tokens=GREEDY["max_new_tokens"])
        found = {}
        while len(found) < len(names):
            answer = self.manager.get_result(timeout=60)
            assert answer is not None
            assert answer.error is None
            if answer.is_finished():
                found[answer.request_id] = answer.generated_tokens
        return [found[name] for name in names]

    @property
    def cache(self):
        return self.manager.batch_processor.cache


def free(cache):
    """The part of a cache that nobody holds, once nothing is kept for prompts to come."""
    if hasattr(cache, "evict_cached_blocks"):
        cache.evict_cached_blocks()
        return cache.compute_free_capacity()
    return cache.get_num_free_blocks() / cache.num_blocks


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_equal_those_of_each_prompt_alone(models, name):
    """Prompts in chunks of 16 tokens, and texts beyond what a layer with a window keeps."""
    model, (inputs, *_) = reference(models(name), name), rows()
    want = alone(model, inputs)
    before = model.config._attn_implementation
    with continuous_batching(model):
        assert answers(model, inputs) == want
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("block_size", [5, 16])
@pytest.mark.parametrize("max_batch_tokens", [7, 64])
def test_windows_and_blocks_of_other_sizes(models, block_size, max_batch_tokens):
    model, (inputs, *_) = reference(models("gemma3"), "gemma3"), rows()
    config = room(block_size, max_batch_tokens=max_batch_tokens)
    with continuous_batching(model):
        assert answers(model, inputs, config) == alone(model, inputs)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("options", QUANTISED.values(), ids=QUANTISED)
def test_quantised_texts_equal_those_of_a_paged_cache(models, name, options):
    model, (inputs, ids, mask) = reference(models(name), name), rows()
    exact = alone(model, inputs)
    with continuous_batching(model, **options):
        got = answers(model, inputs)
    cache = PagedCache.for_model(model, max_tokens=48, batch_size=len(LENGTHS), **options)
    want = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY)[:, ids.shape[1] :].tolist()
    assert got == want
    if options["kv_cache_dtype"] == "int4":
        assert got != exact  # rounding is seen


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("options", [{}, QUANTISED["int8"]], ids=["float32", "int8"])
def test_no_block_is_lost(models, name, options):
    model, (inputs, *_) = reference(models(name), name), rows()
    want = alone(model, inputs)
    with continuous_batching(model, **options), Held(model, room()) as held:
        for _ in range(2):
            got = held.answers(inputs)
            assert options or got == want
            assert all(not group.tables for group in held.cache.torchkv_groups)
            assert free(held.cache) == 1


@pytest.mark.parametrize("options", [{}, QUANTISED["int8"]], ids=["float32", "int8"])
def test_shared_prefixes(models, options):
    model, (inputs, *_) = reference(models("llama"), "llama"), rows()
    inputs = [inputs[0] + row for row in inputs[1:]]
    with continuous_batching(model, **options):
        want = [answers(model, [row], room(max_batch_tokens=64))[0] for row in inputs]
        with Held(model, room(allow_block_sharing=True)) as held:
            assert held.answers(inputs[:1]) == want[:1]
            assert held.cache.search_prefix_match("nobody", inputs[1]) == 20  # five blocks of four
            held.cache.free_blocks("nobody")
            assert held.answers(inputs) == want
            assert free(held.cache) == 1
    assert options or want == alone(model, inputs)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("sharing", [False, True], ids=["copied", "shared"])
def test_several_answers_begin_with_copies_of_one_cache(models, name, sharing):
    model, (inputs, *_) = reference(models(name), name), rows()
    for options in ({}, QUANTISED["int8"]):
        with continuous_batching(model, **options):
            want = answers(model, inputs)
            config = room(num_blocks=96, allow_block_sharing=sharing)
            greedy = settings()
            greedy.num_return_sequences = 2  # which it does not take with greedy texts, that can be compared
            context = {"generation_config": greedy, "continuous_batching_config": config}
            with model.continuous_batching_context_manager(**context, block=True) as manager:
                manager.add_requests(inputs, max_new_tokens=GREEDY["max_new_tokens"])
                got = {}
                while len(got) < 2 * len(inputs):
                    answer = manager.get_result(timeout=60)
                    assert answer is not None
                    assert answer.error is None
                    if answer.is_finished():
                        got[answer.request_id] = answer.generated_tokens
        assert sorted(got.values()) == sorted(want + want)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, QUANTISED["int8"]], ids=["float32", "int8"])
def test_requests_wait_and_begin_anew_where_blocks_are_few(models, name, options):
    model, (inputs, *_) = reference(models(name), name), rows()
    with continuous_batching(model, **options):
        want = answers(model, inputs)
        kinds = 1 if SIZE == "page_size" else len(set(getattr(model.config, "layer_types", [""])))
        with Held(model, room(num_blocks=14 * kinds, max_batch_tokens=32)) as held:  # 5.17 counts those of each kind
            assert held.answers(inputs) == want
            assert free(held.cache) == 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_padded_as_for_cuda_graphs(models, name, monkeypatch):
    """Where a GPU captures graphs, rows and sequences are added that are none."""
    model, (inputs, *_) = reference(models(name), name), rows()
    create = continuous_api.ContinuousBatchProcessor.__init__
    padded = []

    def pad(processor, *args, **options):
        create(processor, *args, **options)
        runner = processor.model_runner
        runner.pad_inputs = True
        padded.append(runner)
        runner.inputs_and_outputs.use_cuda_graph_varlen = True

    monkeypatch.setattr(continuous_api.ContinuousBatchProcessor, "__init__", pad)
    with continuous_batching(model):
        config = room(num_blocks=64, q_padding_interval_size=8, kv_padding_interval_size=32)
        assert answers(model, inputs, config) == alone(model, inputs)
    assert padded


def test_a_layer_with_a_window_keeps_the_window_and_one_step(models):
    model, (inputs, *_) = reference(models("mistral"), "mistral"), rows()
    with continuous_batching(model), Held(model, room()) as held:
        held.answers(inputs[:1])
        (ring,) = {group.ring for group in held.cache.torchkv_groups}
        assert ring * 4 < len(inputs[0]) + GREEDY["max_new_tokens"]  # so blocks were taken again
        assert ring * 4 >= WINDOW - 1 + 16 + 3


def test_quantised_blocks_are_small(models):
    """int8 with float32 scales of heads of 16 elements: 20 bytes in the place of 64."""
    model, (inputs, *_) = reference(models("llama"), "llama"), rows()

    def nbytes(**options):
        with continuous_batching(model, **options), Held(model, room()) as held:
            held.answers(inputs[:1])
            return {store.nbytes / store.num_blocks for store in held.cache.torchkv_stores}, memory(held.cache)

    (plain,), whole = nbytes()
    (small,), part = nbytes(**QUANTISED["int8"])
    assert plain == 4 * 2 * 2 * 64
    assert small == 4 * 2 * 2 * 20
    assert part < whole / 3


def test_memory_has_room_for_more_quantised_blocks(models):
    model, (inputs, *_) = reference(models("llama"), "llama"), rows()
    config = dict(num_blocks=None, max_memory_percent=0.0002, max_requests_per_batch=8)

    def blocks(**options):
        with continuous_batching(model, **options), Held(model, room(**config)) as held:
            assert held.answers(inputs[:1])
            return held.cache.num_blocks

    assert 1.5 < blocks(**QUANTISED["int8"]) / blocks() < 3.2  # 20 bytes in the place of 64, and 8 beside either


def memory(cache):
    if hasattr(cache, "key_cache"):
        return sum(store.nbytes for store in cache.torchkv_stores)
    return cache.cache_tensor.numel()


def test_undone_all_is_transformers_own(models):
    model, (inputs, *_) = reference(models("llama"), "llama"), rows()
    names = dict(vars(continuous_api))
    undo = continuous_batching(model)
    inner = continuous_batching(model, kv_cache_dtype="fp8")
    manager = model.init_continuous_batching(settings(), room())
    assert manager.torchkv_kind.kv_cache_dtype == "fp8"
    assert model.config._attn_implementation == CONTINUOUS
    inner.close()
    assert model.init_continuous_batching(settings(), room()).torchkv_kind.kv_cache_dtype == "auto"
    undo.close()
    assert "init_continuous_batching" not in vars(model)
    assert dict(vars(continuous_api)) == names
    reference(model, "llama")
    with Held(model, room()) as held:
        assert held.answers(inputs) == alone(reference(tiny("llama"), "llama"), inputs)
        assert type(held.cache) is PagedAttentionCache


def test_undone_in_another_order(models):
    model = reference(models("llama"), "llama")
    first = continuous_batching(model)
    second = continuous_batching(model, kv_cache_dtype="fp8")
    first.close()
    assert model.init_continuous_batching(settings(), room()).torchkv_kind.kv_cache_dtype == "fp8"
    second.close()
    assert "init_continuous_batching" not in vars(model)


def test_a_manager_that_is_kept_ends_with_the_undoing(models):
    model, (inputs, *_) = reference(models("llama"), "llama"), rows()
    with continuous_batching(model):
        for _ in range(2):
            found = model.generate_batch(inputs, settings(), continuous_batching_config=room(), persistent_manager=True)
            assert [a.generated_tokens for a in found.values()] == alone(reference(models("llama"), "llama"), inputs)
        assert model._cached_continuous_batching_manager.torchkv_kind is not None
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_other_models_stay_as_they_are(models):
    one, other = reference(models("llama"), "llama"), reference(tiny("llama"), "llama")
    inputs, *_ = rows()
    with continuous_batching(one), Held(one, room()) as ours, Held(other, room()) as theirs:
        assert ours.answers(inputs) == theirs.answers(inputs)
        assert type(theirs.cache) is PagedAttentionCache
        assert type(ours.cache) is not PagedAttentionCache


def test_what_is_refused(models):
    model = reference(models("llama"), "llama")
    with pytest.raises(ValueError, match="kv_cache_dtype must be"):
        continuous_batching(model, kv_cache_dtype="int9")
    with pytest.raises(ValueError, match="per_token_head needs kv_cache_dtype"):
        continuous_batching(model, per_token_head=True)
    with pytest.raises(ValueError, match="k_scale must be None with per_token_head"):
        continuous_batching(model, **QUANTISED["int8"], k_scale=0.1)
    with pytest.raises(ValueError, match="k_scale must"):
        continuous_batching(model, kv_cache_dtype="fp8", k_scale=torch.ones(3))
    assert "init_continuous_batching" not in vars(model)
    sizes = dict(hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2)
    chunked = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, attention_chunk_size=8))
    with pytest.raises(UnsupportedError, match="layer_types must be"):
        continuous_batching(chunked)
    model.set_attn_implementation(CONTINUOUS)
    with pytest.raises(UnsupportedError, match="must be used within continuous batching"):
        model(torch.randint(0, VOCABULARY, (1, 3)))
    reference(model, "llama")


@pytest.mark.skipif(transformers.__version__ >= "5.18", reason="transformers swaps whole blocks, with their scales")
def test_scales_would_not_be_swapped(models):
    model = reference(models("llama"), "llama")
    inputs, *_ = rows()
    with (
        continuous_batching(model, **QUANTISED["int8"]),
        pytest.raises(UnsupportedError, match="cpu_offload_space must be 0 with per_token_head"),
    ):
        model.generate_batch(inputs, settings(), continuous_batching_config=room(cpu_offload_space=0.1))
    reference(model, "llama")


def test_another_version_of_transformers_is_named(models, monkeypatch):
    model = reference(models("llama"), "llama")
    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "_create_batch_processor", lambda self: None)
    with pytest.raises(UnsupportedError, match=f"got {transformers.__version__}: .*PagedAttentionCache"):
        continuous_batching(model)
    monkeypatch.delattr(continuous_api.ContinuousBatchingManager, "_create_batch_processor")
    with pytest.raises(UnsupportedError, match=f"got {transformers.__version__}: .*_create_batch_processor"):
        continuous_batching(model)
    assert "init_continuous_batching" not in vars(model)
