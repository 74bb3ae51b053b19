"""Quantised caches: what a model makes of keys and values that torch rounds as the format says."""

import pytest
import torch
from transformers import DynamicCache

from tests.cases.tiny_models import prompts, reference
from torchkv.integrations.transformers import PagedCache

SCALES = torch.tensor([[0.08, 0.1], [0.1, 0.12]])  # of two layers, two heads


def absmax(x):
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1)  # torch's attention makes zeros of padding


def int8(x, scale=None):
    scale = absmax(x) / 127 if scale is None else scale
    return (x / scale).round().clamp(-127, 127) * scale


def fp8(x, scale=None):
    scale = absmax(x) / 448 if scale is None else scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


CASES = {
    "int8": ({"kv_cache_dtype": "int8", "per_token_head": True}, lambda x, layer: int8(x)),
    "fp8": ({"kv_cache_dtype": "fp8", "per_token_head": True}, lambda x, layer: fp8(x)),
    "fp8, scale 1": ({"kv_cache_dtype": "fp8"}, lambda x, layer: fp8(x, 1)),
    "int8, scales of layers": (
        {"kv_cache_dtype": "int8", "k_scale": SCALES, "v_scale": SCALES},
        lambda x, layer: int8(x, SCALES[layer][:, None, None]),
    ),
}


class Rounded(DynamicCache):
    def __init__(self, config, rounding):
        super().__init__(config=config)
        self.rounding = rounding

    def update(self, key, value, layer_idx, *args, **kwargs):
        key, value = (self.rounding(x, layer_idx) for x in (key, value))
        return super().update(key, value, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("compileable", [False, True], ids=["growing", "fixed"])
def test_logits_are_those_of_rounded_keys_and_values(models, name, case, compileable):
    model, (ids, mask) = reference(models(name), name), prompts()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options, rounding = case

    def run(cache):
        parts = []
        with torch.no_grad():
            for part in (slice(0, 14), slice(14, 15), slice(15, 21)):
                seen = mask[:, : part.stop]
                out = model(ids[:, part], attention_mask=seen, position_ids=positions[:, part], cache=cache)
                parts.append(out.logits)
        return torch.cat(parts, 1)[mask.bool()]

    exact, want = run(DynamicCache(config=model.config)), run(Rounded(model.config, rounding))
    got = run(
        PagedCache.for_model(model, max_tokens=32, batch_size=3, block_size=4, compileable=compileable, **options)
    )
    error = (got - want).abs().mean()
    assert error < 1e-3 * want.std()
    assert error < 0.1 * (want - exact).abs().mean()  # rounding is seen
