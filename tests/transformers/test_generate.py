"""`generate` with a PagedCache: the texts that transformers makes with its own cache."""

import pytest
import torch

from tests.cases.tiny_models import GREEDY, MODELS, VOCABULARY, prompts, reference
from torchkv.integrations.transformers import PagedCache

LENGTHS = (21, 14, 8)


def text(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})


def paged(model, batch_size=3, **options):
    return PagedCache.for_model(model, **{"max_tokens": 48, "batch_size": batch_size, "block_size": 4, **options})


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_equal_those_of_a_dynamic_cache(models, name):
    model, (ids, mask) = reference(models(name), name), prompts(LENGTHS)
    want = text(model, ids, mask)
    alone = text(model, ids[:1])
    assert torch.equal(alone[0], want[0])
    assert len(want[:, ids.shape[1] :].unique()) > 10  # a text, not one token again and again
    cache = paged(model)
    assert torch.equal(text(model, ids, mask, cache=cache), want)
    assert cache.get_seq_length() == want.shape[1] - 1
    for row, length, whole in zip(ids, LENGTHS, want, strict=True):
        cache.reset()
        assert cache.blocks_in_use == 0
        got = text(model, row[None, -length:], cache=cache)
        assert torch.equal(got[0, length:], whole[ids.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [5, 7])
def test_prefill_in_chunks(models, name, chunk):
    model, (ids, mask) = reference(models(name), name), prompts(LENGTHS)
    want = text(model, ids, mask)
    assert torch.equal(text(model, ids, mask, cache=paged(model), prefill_chunk_size=chunk), want)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beam_search(models, name):
    model, (ids, mask) = reference(models(name), name), prompts(LENGTHS)
    options = dict(num_beams=3, num_return_sequences=3)
    want = text(model, ids, mask, **options)
    cache = paged(model, batch_size=9, num_blocks=60)
    got = text(model, ids, mask, cache=cache, **options)
    assert torch.equal(got, want)
    assert len(want.unique(dim=0)) == 9
    assert cache.blocks_in_use < 9 * 10  # the beams share their prompts


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_prompt_lookup_crops_what_was_rejected(models, name):
    model = reference(models(name), name)
    torch.manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (1, 7)).repeat(1, 3)
    want = text(model, ids)
    cache = paged(model)
    assert torch.equal(text(model, ids, cache=cache, prompt_lookup_num_tokens=4), want)
    assert cache.get_seq_length() <= want.shape[1]
    assert cache.blocks_in_use == -(-cache.get_seq_length() // 4)


def test_assistant_model(models):
    model, assistant = reference(models("llama"), "llama"), reference(models("qwen3"), "qwen3")
    ids, _ = prompts((13,))
    want = text(model, ids)
    assert torch.equal(text(model, ids, cache=paged(model), assistant_model=assistant), want)


def test_sampling_several_answers(models):
    model, (ids, mask) = reference(models("llama"), "llama"), prompts(LENGTHS)
    options = dict(do_sample=True, num_return_sequences=2)
    torch.manual_seed(3)
    want = text(model, ids, mask, **options)
    cache = paged(model, batch_size=6)
    torch.manual_seed(3)
    assert torch.equal(text(model, ids, mask, cache=cache, **options), want)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_conversation_goes_on_in_the_same_cache(models, name):
    model, (ids, mask) = reference(models(name), name), prompts(LENGTHS)
    cache = paged(model, max_tokens=80)
    first = text(model, ids, mask, cache=cache)
    longer = torch.cat((first, prompts((6, 6, 6))[0]), 1)
    longer_mask = torch.cat((mask, torch.ones(3, longer.shape[1] - mask.shape[1], dtype=torch.long)), 1)
    got = text(model, longer, longer_mask, cache=cache)
    assert torch.equal(got, text(reference(model, name), longer, longer_mask))


@pytest.mark.parametrize("options", [{}, {"compileable": True}, {"kv_cache_dtype": "int8", "per_token_head": True}])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss"])
def test_under_autocast(models, name, options):
    """Where keys are rotated in float32, and values come in bfloat16."""
    model, (ids, mask) = reference(models(name), name), prompts(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        want = model(ids, attention_mask=mask).logits[:, -1]
        got = model(ids, attention_mask=mask, cache=paged(model, **options)).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1 * want.abs().max().item())


def test_two_caches_at_once(models):
    model = reference(models("llama"), "llama")
    ids, _ = prompts((9, 9))
    want = text(model, ids)
    first, second = paged(model), paged(model, kv_cache_dtype="int8", per_token_head=True)
    with torch.no_grad():
        for column in range(8):
            model(ids[:1, column : column + 1], cache=first)
            model(ids[1:, column : column + 1], cache=second)
    assert torch.equal(text(model, ids[:1], cache=first), want[:1])
    assert second.get_seq_length() == 8


def test_blocks_are_taken_by_need(models):
    model, (ids, mask) = reference(models("llama"), "llama"), prompts(LENGTHS)
    cache = paged(model, num_blocks=26)
    text(model, ids, mask, cache=cache)
    assert cache.blocks_in_use == sum(-(-(n + GREEDY["max_new_tokens"] - 1) // 4) for n in LENGTHS) == 26
