"""On a GPU, transformers' models over a PagedCache: small ones of random weights, padded, quantised and compiled."""

import pytest
import torch
import transformers

from tests.cases.gpu import DEVICE, params
from tests.cases.tiny_models import GREEDY, MODELS, prompts, reference, tiny
from torchkv.integrations.transformers import PagedCache

pytestmark = pytest.mark.gpu
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"  # what transformers calls it


def paged(model, **options):
    return PagedCache.for_model(model, **{"max_tokens": 64, "batch_size": 3, **options})


def forced(model, cache):
    """Logits of the last tokens of a padded batch: a prompt, one token, several."""
    ids, mask = prompts(device=DEVICE)
    positions, parts = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        for part in (slice(0, 14), slice(14, 15), slice(15, 21)):
            options = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            out = model(ids[:, part], **{CACHE: cache}, **options)
            cache = out[CACHE]
            parts.append(out.logits)
    return torch.cat(parts, 1)[mask.bool()].float()


@pytest.mark.parametrize("name", params([(name,) for name in MODELS], smoke=[("gemma3",)]))
@pytest.mark.parametrize("compileable", [False, True], ids=["growing", "fixed"])
def test_logits(name, compileable):
    """float32, of whose products tensor cores keep 11 bits where they may."""
    model = reference(tiny(name, DEVICE), name)
    want = forced(model, None)
    got = forced(model, paged(model, compileable=compileable))
    assert (got - want).square().mean().sqrt() < 0.02 * want.std()


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_cache_dtype": "int8", "per_token_head": True}, {"kv_cache_dtype": "fp8"}],
    ids=["bfloat16", "int8", "fp8"],
)
def test_generate_in_bfloat16(options):
    model = reference(tiny("llama", DEVICE, torch.bfloat16), "llama")
    ids, mask = prompts(device=DEVICE)
    cache = paged(model, **options)
    text = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY)
    cache.reset()
    assert torch.equal(model.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY), text)
    assert cache.get_seq_length() == text.shape[1] - 1


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_compiles_by_itself(name, padded):
    """With CUDA graphs, as transformers does for a StaticCache: the text is that of eager code."""
    model = reference(tiny(name, DEVICE), name)
    ids, mask = prompts(device=DEVICE) if padded else prompts((9, 9, 9), device=DEVICE)
    want = model.generate(ids, attention_mask=mask, **{CACHE: paged(model)}, **GREEDY)
    cache = paged(model, compileable=True)
    for _ in range(2):
        cache.reset()
        assert torch.equal(model.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY), want)


def test_beams_share_blocks():
    model = reference(tiny("llama", DEVICE), "llama")
    ids, mask = prompts(device=DEVICE)
    options = {"attention_mask": mask, "num_beams": 3, **GREEDY}
    want = model.generate(ids, **{CACHE: paged(model, batch_size=9, compileable=True, block_size=4)}, **options)
    assert torch.equal(model.generate(ids, **{CACHE: paged(model, batch_size=9, block_size=4)}, **options), want)
