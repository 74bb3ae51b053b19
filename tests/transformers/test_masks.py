"""Which tokens of a batch are real: padding anywhere, and masks that are refused."""

import pytest
import torch

from tests.cases.tiny_models import prompts, reference
from torchkv.integrations.transformers import PagedCache, UnsupportedError, paged_mask


def paged(model, **options):
    return PagedCache.for_model(model, **{"max_tokens": 48, "batch_size": 3, "block_size": 4, **options})


def forwards(model, pieces, cache=None):
    """Logits of real tokens, where pieces of a text, with their masks, come one after the other."""
    logits, mask = [], torch.zeros(pieces[0][0].shape[0], 0, dtype=torch.long)
    positions = torch.zeros(pieces[0][0].shape[0], 1, dtype=torch.long)
    for ids, piece in pieces:
        mask = torch.cat((mask, piece), 1)
        position_ids = (positions + piece.cumsum(1) - 1).clamp(min=0)
        positions = positions + piece.sum(1, keepdim=True)
        out = model(ids, attention_mask=mask, position_ids=position_ids, cache=cache)
        cache = out.cache
        logits.append(out.logits[piece.bool()])
    return torch.cat(logits)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def piece(*rows):
    mask = torch.tensor(rows)
    torch.manual_seed(mask.numel())
    return torch.randint(2, 200, mask.shape) * mask, mask


PIECES = {
    "left": [prompts(), piece([1], [1], [1])],
    "right": [prompts(padding="right"), piece([1], [1], [1])],
    "both": [piece([0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]), piece([1, 0], [1, 1], [0, 0]), piece([1], [1], [1])],
    "within": [piece([1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]), piece([0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1])],
    "a second turn": [prompts(), piece([0, 1, 1], [1, 1, 1], [0, 0, 1]), piece([1], [1], [1])],
    "an empty row": [piece([0, 0], [1, 1], [0, 1]), piece([0], [1], [1]), piece([1, 1], [1, 1], [1, 0])],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_padding_has_no_effect(models, pieces):
    model = reference(models("qwen3"), "qwen3")
    want = forwards(model, pieces)
    torch.testing.assert_close(forwards(model, pieces, paged(model)), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pieces", [PIECES["left"], PIECES["both"]], ids=["left", "within the window"])
def test_padding_with_a_window(models, pieces):
    model = reference(models("gemma3"), "gemma3")
    want = forwards(model, pieces)
    torch.testing.assert_close(forwards(model, pieces, paged(model)), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pieces", [PIECES["right"], PIECES["a second turn"]], ids=["right", "a second turn"])
def test_padding_that_transformers_counts_as_a_part_of_a_window_is_refused(models, pieces):
    model = models("gemma3")
    with pytest.raises(UnsupportedError, match="padding on the left only, in a model with a window of 8"):
        forwards(model, pieces, paged(model))


def test_a_mask_that_hides_what_was_written_is_refused(models):
    model, (ids, mask) = models("llama"), prompts()
    cache = paged(model)
    model(ids, attention_mask=mask, cache=cache)
    other = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
    other[0, 3] = 0
    with pytest.raises(UnsupportedError, match="attention_mask must say of tokens in the cache what it said when"):
        model(ids[:, :1], attention_mask=other, cache=cache)


def test_a_mask_is_needed_after_padding(models):
    model, (ids, mask) = models("llama"), prompts()
    cache = paged(model)
    model(ids, attention_mask=mask, cache=cache)
    with pytest.raises(UnsupportedError, match="attention_mask must be given, as the cache holds padding, got None"):
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("columns", [20, 22])
def test_a_mask_of_another_length_is_refused(models, columns):
    model, (ids, _) = models("llama"), prompts()
    with pytest.raises(UnsupportedError, match=f"a column for each token so far and each new one, got {columns}"):
        model(ids, attention_mask=torch.ones(3, columns), cache=paged(model))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_axes_are_refused(models, dtype):
    model, (ids, _) = models("llama"), prompts()
    with pytest.raises(UnsupportedError, match=r"masks of other shapes cannot be read .*, got \(3, 1, 21, 21\) of"):
        model(ids, attention_mask=torch.ones(3, 1, 21, 21, dtype=dtype), cache=paged(model))


def test_other_patterns_are_refused():
    from transformers import masking_utils as masks

    window = masks.sliding_window_causal_mask_function
    with pytest.raises(UnsupportedError, match=r"must be causal, with or without a sliding window: .* got and_masks"):
        paged_mask(1, 4, 4, mask_function=window(5), local_size=4)
    paged_mask(1, 4, 4, mask_function=window(4), local_size=4)
    for function in (
        masks.bidirectional_mask_function,
        masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(torch.zeros(1, 4))),
        window(4),
    ):
        with pytest.raises(UnsupportedError, match="must be causal, with or without a sliding window"):
            paged_mask(1, 4, 4, mask_function=function)
    with pytest.raises(UnsupportedError, match="must be causal, with or without a sliding window"):
        paged_mask(1, 4, 4, use_vmap=True)


def test_the_mask_says_how_many_tokens_are_real():
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    got = paged_mask(2, 2, 5, q_offset=3, attention_mask=mask)
    assert got.dtype == torch.int32
    assert got[:, 0, 0].tolist() == [[3, 1, 1, 0], [5, 2, 1, 1]]
    assert paged_mask(2, 2, 5) is None
