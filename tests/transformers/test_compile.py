"""Decoding in compiled code: one graph, whatever the length."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from tests.cases.tiny_models import GREEDY, prompts, reference
from torchkv.integrations.transformers import PagedCache, UnsupportedError


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(backend="aot_eager"):
    """As on a GPU, where generate compiles by itself. aot_eager compiles no C++, which takes minutes."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def fixed(model, **options):
    return PagedCache.for_model(
        model, **{"max_tokens": 48, "batch_size": 3, "block_size": 4, "compileable": True, **options}
    )


@pytest.mark.parametrize(("name", "padded"), [("llama", False), ("llama", True), ("gemma3", True), ("gpt_oss", False)])
def test_generate_compiles_one_graph(models, name, padded):
    model = reference(models(name), name)
    ids, mask = prompts() if padded else prompts((9, 9, 9))
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    cache = fixed(model)
    for _ in range(2):
        cache.reset()
        got = model.generate(ids, attention_mask=mask, cache=cache, compile_config=compiled(), **GREEDY)
        assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert int(cache.get_seq_length()) == want.shape[1] - 1


def test_other_batches_after_reset_are_compiled_once_each(models):
    model, (ids, mask) = reference(models("llama"), "llama"), prompts()
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    cache = fixed(model)
    for batch in (3, 2, 3, 2):
        cache.reset()
        options = {"attention_mask": mask[:batch], "cache": cache, "compile_config": compiled(), **GREEDY}
        assert torch.equal(model.generate(ids[:batch], **options), want[:batch])
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_forward_without_generate(models):
    model = reference(models("gemma3"), "gemma3")
    ids, _ = prompts((9, 9, 9))
    want = model.generate(ids, **GREEDY)
    cache = fixed(model, kv_cache_dtype="auto")
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        token = model(ids, cache=cache).logits[:, -1:].argmax(-1)
        made = [token]
        for position in range(ids.shape[1], want.shape[1] - 1):
            positions = torch.full((3, 1), position)
            token = step(token, cache=cache, position_ids=positions).logits[:, -1:].argmax(-1)
            made.append(token)
    assert torch.equal(torch.cat(made, 1), want[:, ids.shape[1] :])
    assert counters["stats"]["unique_graphs"] == 1


def test_what_compiled_code_cannot_hold_is_an_error_there(models):
    model = reference(models("llama"), "llama")
    ids, mask = prompts((9, 9, 9))
    cache = fixed(model, max_tokens=16)
    with pytest.raises(RuntimeError, match="max_tokens must be at least the tokens of each sequence, got 16"):
        model.generate(ids, attention_mask=mask, cache=cache, compile_config=compiled(), **GREEDY)


def test_beam_search_and_crop_in_fixed_blocks(models):
    model, (ids, mask) = reference(models("llama"), "llama"), prompts()
    want = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, cache=fixed(model, batch_size=9), num_beams=3, **GREEDY), want
    )
    reference(model, "llama")
    torch.manual_seed(2)
    ids = torch.randint(2, 200, (1, 7)).repeat(1, 3)
    want = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache=fixed(model), prompt_lookup_num_tokens=4, **GREEDY), want)


def test_padding_elsewhere_than_on_the_left_is_refused(models):
    model, (ids, mask) = reference(models("llama"), "llama"), prompts(padding="right")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="padding on the left only, with compileable=True"):
        model(ids, attention_mask=mask, cache=fixed(model))
