"""What is refused, each time before anything is computed from it."""

import gc
import re
import weakref

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, T5Config

from tests.cases.tiny_models import COMMON, GREEDY, prompts, reference, tiny
from torchkv import OutOfBlocks
from torchkv.integrations.transformers import (
    PagedCache,
    UnsupportedError,
    continuous_batching,
    paged_attention_forward,
    paged_mask,
)
from torchkv.integrations.transformers.versions import check_version


def paged(model, **options):
    return PagedCache.for_model(model, **{"max_tokens": 48, "batch_size": 3, "block_size": 4, **options})


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def llama(models):
    return reference(models("llama"), "llama")


def test_it_is_registered():
    assert AttentionInterface()["torchkv"] is paged_attention_forward
    assert AttentionMaskInterface()["torchkv"] is paged_mask


def test_another_attention(llama):
    cache = paged(llama)
    llama.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match=r'attn_implementation must be "torchkv" .*, got "sdpa"; call model'):
        llama.generate(prompts((5,))[0], cache=cache, **GREEDY)


def test_the_attention_of_another_model(llama):
    cache = paged(tiny("llama"))  # whose attention is torchkv's, as the cache sees
    with pytest.raises(UnsupportedError, match='must be "torchkv" with a PagedCache: layer 0 attended without it'):
        llama(prompts((5,))[0], cache=cache)


def test_another_cache(llama):
    paged(llama)
    for options in ({}, {"use_cache": False}):
        with pytest.raises(UnsupportedError, match='"torchkv" must be used with a torchkv PagedCache'):
            llama(prompts((5,))[0], **options)


def test_keys_changed_after_the_cache(llama, monkeypatch):
    cache = paged(llama)
    update = PagedCache.update
    monkeypatch.setattr(PagedCache, "update", lambda *a, **k: tuple(t * 1 for t in update(*a, **k)))
    with pytest.raises(UnsupportedError, match="changes keys between its cache and its attention"):
        llama(prompts((5,))[0], cache=cache)


@pytest.mark.parametrize("kwargs", [None, {}], ids=["before 5.24", "from 5.24 on"])
def test_attention_finds_its_cache(llama, kwargs):
    cache, module = paged(llama), llama.model.layers[0].self_attn
    key, value, query = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 4, 3, 16)
    options = {} if kwargs is None else {"kwargs": kwargs}
    new_key, new_value = cache.update(key, value, 0, **options)
    out, weights = paged_attention_forward(module, query, new_key, new_value, None, **(kwargs or {}))
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))
    assert weights is None


def test_the_layer_keeps_no_keys(llama):
    key = torch.randn(1, 2, 3, 16)
    gone = weakref.ref(key)
    paged(llama).update(key, key, 0)
    gc.disable()  # a circle would be found
    try:
        del key
        assert gone() is None
    finally:
        gc.enable()


def test_weights(llama):
    cache = paged(llama)
    with pytest.raises(UnsupportedError, match="output_attentions must be False, got True"):
        llama(prompts((5,))[0], cache=cache, output_attentions=True)
    cache.reset()
    llama(prompts((5,))[0], cache=cache)  # goes on


def test_gradients(llama):
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="is not differentiable"):
        llama(prompts((5,))[0], cache=paged(llama))


ATTENTION = {
    "dropout": ({"dropout": 0.1}, "dropout must be 0 with a paged cache, got 0.1"),
    "is_causal": ({"is_causal": False}, "is_causal must be True with a paged cache, got False"),
    "window": ({"sliding_window": 5}, "sliding_window must be None in layer 0, as in the config, got 5"),
    "bias": ({"position_bias": torch.zeros(1)}, "position_bias must be None with a paged cache, got Tensor"),
    "packed": ({"cu_seq_lens_q": torch.zeros(1)}, "cu_seq_lens_q must be None with a paged cache, got Tensor"),
}


@pytest.mark.parametrize(("options", "message"), ATTENTION.values(), ids=ATTENTION)
def test_arguments_of_attention(llama, options, message):
    key = torch.ones(1, 2, 3, 16)
    kwargs = {}
    cache = paged(llama)
    cache.update(key, key, 0, kwargs=kwargs)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        paged_attention_forward(
            llama.model.layers[0].self_attn, torch.ones(1, 4, 3, 16), key, key, None, **kwargs, **options
        )


def test_more_tokens_than_there_is_room_for(llama):
    ids = prompts((9, 9, 9))[0]
    cache = paged(llama, max_tokens=8)
    with pytest.raises(
        ValueError, match="max_tokens must be at least the tokens of each sequence, got 8, for 9 tokens"
    ):
        llama(ids, cache=cache)
    cache = paged(llama, num_blocks=8)
    with pytest.raises(OutOfBlocks, match="9 blocks were asked for, 8 are free"):
        llama(ids, cache=cache)
    assert cache.get_seq_length() == cache.blocks_in_use == 0
    llama(ids[:2], cache=cache)
    with pytest.raises(OutOfBlocks, match="24 blocks were asked for, 8 are free"):
        llama(ids[:2], cache=paged(llama, num_blocks=8, compileable=True))


@pytest.mark.parametrize("options", [{}, {"compileable": True}])
def test_a_batch_larger_than_batch_size(llama, options):
    cache = paged(llama, max_tokens=8, batch_size=1, **options)
    with pytest.raises(OutOfBlocks) as error:
        llama(prompts((8, 8))[0], cache=cache)
    assert str(error.value) == (
        "4 blocks were asked for, 2 are free; num_blocks is 2 (by default batch_size * ceil(max_tokens / block_size)), "
        "for 2 sequences of up to 2 blocks: give a larger batch_size, which is prompts times beams, or num_blocks"
    )
    assert (error.value.asked, error.value.free) == (4, 2)


def test_another_text_without_reset(llama):
    cache, (ids, mask) = paged(llama), prompts((5, 9))
    llama.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    with pytest.raises(UnsupportedError) as error:
        llama.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    assert str(error.value) == (
        "attention_mask must have a column for each token so far and each new one, got 9 columns; call cache.reset() "
        "before another text"
    )


@pytest.mark.parametrize("compileable", [False, True])
def test_another_batch(llama, compileable):
    ids, _ = prompts((5, 5, 5))
    want = llama(ids).logits
    cache = paged(llama, compileable=compileable)
    llama(ids[:2], cache=cache)
    with pytest.raises(ValueError, match=r"batch must be 2, as in the cache, got 1; cache.reset\(\) begins anew"):
        llama(ids[:1], cache=cache)
    for batch in (1, 3, 2):
        cache.reset()
        torch.testing.assert_close(llama(ids[:batch], cache=cache).logits, want[:batch])
        assert cache.batch_size == batch
    cache.reset()
    with pytest.raises(OutOfBlocks, match="num_blocks is 36"):
        llama(ids.repeat(8, 1) if compileable else ids.repeat(13, 1), cache=cache)


def test_a_forward_that_was_broken_off(llama, monkeypatch):
    cache, (ids, _) = paged(llama), prompts((5,))
    with monkeypatch.context() as patch:
        patch.setitem(llama.model.layers[0]._modules, "mlp", torch.nn.Linear(3, 3))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            llama(ids, cache=cache)
    with pytest.raises(UnsupportedError, match=r"did not get to its last layer; call cache.reset\(\)"):
        llama(ids, cache=cache)
    cache.reset()
    llama(ids, cache=cache)


CONFIGS = {
    "encoder": (T5Config(), "config must be that of a decoder"),
    "chunked": (LlamaConfig(**COMMON, attention_chunk_size=4), "layer_types must be .*, got chunked_attention"),
    "linear": (LlamaConfig(**COMMON, layer_types=["linear_attention"] * 2), "layer_types .*, got linear_attention"),
    "shared": (LlamaConfig(**COMMON, num_kv_shared_layers=1), "whose layers have keys of their own, got shared ones"),
    "both ways": (LlamaConfig(**COMMON, is_causal=False), "causal attention, got a bidirectional one"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs(config, message):
    with pytest.raises(UnsupportedError, match=message):
        PagedCache(config, max_tokens=8)


@pytest.mark.parametrize("name", ["max_tokens", "batch_size", "num_blocks", "block_size"])
def test_numbers(llama, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PagedCache(llama.config, **{"max_tokens": 8, name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "int9"}, "kv_cache_dtype must be"),
        ({"layout": "HDN"}, "HDN"),
        ({"per_token_head": True}, "per_token_head needs kv_cache_dtype"),
        ({"kv_cache_dtype": "int8", "per_token_head": True, "k_scale": 0.1}, "k_scale must be None with per_token"),
        ({"backend": "tritn"}, "backend must be None, 'triton', 'torch' or 'interpret', got 'tritn'"),
    ],
)
def test_choices_that_do_not_fit(llama, options, message):
    """The model's attention stays as it is."""
    with pytest.raises(ValueError, match=message):
        paged(llama, **options)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_of_other_layers(llama, name, rows):
    scales = {name: torch.ones(rows, 1)}
    message = re.escape(f"{name} must have a row for each of the 2 layers, got shape ({rows}, 1)")
    with pytest.raises(ValueError, match=message):
        PagedCache(llama.config, max_tokens=8, kv_cache_dtype="int8", **scales)
    with pytest.raises(ValueError, match=message):
        continuous_batching(llama, kv_cache_dtype="int8", **scales)


def test_a_crop_beyond_padding_changes_nothing(llama):
    cache, (ids, mask) = paged(llama), prompts((9, 6), padding="right")
    llama(ids, attention_mask=mask, cache=cache)
    with pytest.raises(UnsupportedError, match="crop must drop at most 0 tokens, which follow padding, got 2"):
        cache.crop(-2)
    more = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    got = llama(ids[:, :1], attention_mask=more, cache=cache).logits
    other = paged(llama)
    llama(ids, attention_mask=mask, cache=other)
    assert torch.equal(got, llama(ids[:, :1], attention_mask=more, cache=other).logits)


def test_a_reorder_that_cannot_be_changes_nothing(llama):
    cache, (ids, _) = paged(llama), prompts((9, 9))
    llama(ids, cache=cache)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 2]))
    cache.reset()
    assert cache.blocks_in_use == 0


def test_crop_forward(llama):
    with pytest.raises(ValueError, match="tokens_to_remove must be negative, or 0, got 3"):
        paged(llama).crop(3)


def test_versions():
    check_version("5.17.0")
    check_version("6.0.0.dev0")
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer, got 5\.9\.0"):
        check_version("5.9.0")
