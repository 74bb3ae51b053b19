"""What a quantised cache costs in accuracy: SmolLM2-135M over each format, beside a cache of float32.

`uv run python -m benchmarks accuracy [--json FILE]`. The text ships with Python (`pydoc_data.topics`); static scales
are calibrated on another part of it, for each layer. "one" means k_scale = v_scale = 1, which needs no calibration.
Weights and activations are float32, so that the cache alone makes the difference.

    perplexity    of the text, run in chunks as in a server's prefill: a chunk is written to the cache, then attends to
                  what the cache holds of it and of all before
    Δ nll, ± se   mean difference of a token's negative log-likelihood from the float32 cache's, in nats, and its
                  standard error, tokens taken as independent
    agreement     share of positions, in the same run, where the likeliest token is the float32 cache's
    prefix        tokens of a greedy generation before the first that differs from the float32 cache's, mean of prompts
    bits          of the cache for each element, scales included
"""

import argparse
import hashlib
import math
import pydoc_data.topics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from benchmarks import report
from examples.llama import torch_model
from examples.llama.gguf_model import find_model, load_model
from examples.llama.paging import Batch, plan_batch
from examples.llama.session import FORMATS, Report, Scales, cache_arguments, granularities, run
from examples.llama.torch_session import TorchLlama
from kvcore.choices import ScaledDtype
from torchkv import PagedKVCache

TEXT, SAMPLE = "specialnames", "compound"
"""Topics: the one that is judged, and the one on which static scales are calibrated."""

CHUNK = 256
PROMPTS, PROMPT_LENGTH = 16, 32
COLUMNS = {
    "kv_cache_dtype": "s",
    "granularity": "s",
    "bits": ".2f",
    "perplexity": ".3f",
    "Δ nll": "+.4f",
    "± se": ".4f",
    "agreement": ".4f",
    "prefix": ".1f",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text that is judged")
    parser.add_argument("--sample", type=int, default=512, metavar="N", help="tokens that scales are calibrated on")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of each greedy generation; 0: none")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[f for f in FORMATS if f != "fp8"])
    parser.add_argument("--model", metavar="FILE.gguf")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)

    model = load_model(find_model(options.model))
    llama = TorchLlama(replace(model, config=replace(model.config, stop_ids=())))
    ids, sample = (model.tokenizer.encode(pydoc_data.topics.topics[topic]).ids for topic in (TEXT, SAMPLE))
    ids = ids[: options.tokens]
    calibration = batch_of(llama, [sample[: options.sample]])
    step = (len(ids) - PROMPT_LENGTH) // PROMPTS
    prompts = [ids[i * step :][:PROMPT_LENGTH] for i in range(PROMPTS)]

    rows, reference = [], None
    started = time.perf_counter()
    for kv_cache_dtype, granularity, dtype in cases(options.formats):
        scales = None
        if granularity == "one":
            one = torch.ones((), device=llama.torch_device)
            scales = one, one
        elif granularity in ("tensor", "head"):
            scales = llama.calibrate(calibration, cast("ScaledDtype", kv_cache_dtype), granularity)
        nll, best, bits = judge(llama, ids, kv_cache_dtype, scales, dtype)
        answers = []
        if options.new_tokens and dtype == llama.dtype:
            answers = generate(llama, prompts, options.new_tokens, kv_cache_dtype, scales)
        if reference is None:
            reference = nll, best, answers
        off = nll - reference[0]
        rows.append(
            {
                "kv_cache_dtype": dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
                "granularity": granularity,
                "bits": bits,
                "perplexity": math.exp(nll.mean()),
                "Δ nll": off.mean().item(),
                "± se": off.std().item() / len(off) ** 0.5,
                "agreement": (best == reference[1]).float().mean().item(),
                "prefix": sum(map(common, answers, reference[2])) / PROMPTS if answers else None,
            }
        )
        print(f"{time.perf_counter() - started:4.0f} s", *list(rows[-1].values())[:4], flush=True)
    print(f"\n{report.table(rows, COLUMNS)}")
    text = "".join(pydoc_data.topics.topics[topic] for topic in (TEXT, SAMPLE))
    report.save(
        options.json,
        rows,
        what=f"accuracy over {options.tokens} tokens, scales calibrated on {options.sample}, "
        f"{PROMPTS} prompts of {PROMPT_LENGTH} tokens and {options.new_tokens} new ones",
        model=model.name,
        text={"judged": TEXT, "sample": SAMPLE, "sha256": hashlib.sha256(text.encode()).hexdigest()},
    )


def cases(formats: list[str]) -> Iterator[tuple[str, str | None, str]]:
    """kv_cache_dtype, granularity and the float dtype of the cache. The first is what the others are compared with."""
    yield "auto", None, "float32"
    for name in formats:
        if name == "auto":
            yield name, None, "bfloat16"
        if name.startswith("fp8"):
            yield name, "one", "float32"
        for granularity in granularities(name):
            yield name, granularity, "float32"


def batch_of(llama: TorchLlama, prompts: list[list[int]], new_tokens: int = 1) -> Batch:
    return plan_batch(prompts, new_tokens, context_length=llama.model.config.context_length)


@torch.inference_mode()
def judge(
    llama: TorchLlama, ids: list[int], kv_cache_dtype: str, scales: Scales | None, dtype: str
) -> tuple[Tensor, Tensor, float]:
    """Runs a text, chunk by chunk.

    Returns:
        Negative log-likelihood of each token but the first, the likeliest tokens in their places, and the cache's bits
        for each element.
    """
    config, device, batch = llama.model.config, llama.torch_device, batch_of(llama, [ids])
    k_scale, v_scale = scales or (None, None)
    arguments = cache_arguments(config, batch.num_blocks, dtype, "NHD", kv_cache_dtype, scales is not None)
    cache = PagedKVCache.create(**arguments, k_scale=k_scale, v_scale=v_scale, device=device)
    tokens, tables = (torch.from_numpy(x).to(device) for x in (batch.tokens, batch.block_tables))
    cos_sin = torch.from_numpy(llama.model.rope_table(batch.context)).to(device)
    nll, best = [], []
    for start in range(0, len(ids), CHUNK):
        positions = torch.arange(start, min(start + CHUNK, len(ids)), device=device)[None]
        written = torch.ones_like(positions, dtype=torch.bool)
        x = torch_model.forward(config, llama.weights, cos_sin, cache, tokens[0, positions], positions, written, tables)
        predicted = torch_model.logits(config, llama.weights, x[0]).log_softmax(-1)
        nll.append(-predicted.gather(1, tokens[0, positions[0] + 1, None].long())[:, 0])
        best.append(predicted.argmax(-1))
    elements = 2 * config.head_size * config.num_kv_heads * config.num_layers
    bits = 8 * cache.nbytes / (batch.num_blocks * cache.spec.block_size * elements)
    return torch.cat(nll)[:-1].cpu(), torch.cat(best)[:-1].cpu(), bits  # the last token has none after it


def generate(
    llama: TorchLlama, prompts: list[list[int]], new_tokens: int, kv_cache_dtype: str, scales: Scales | None
) -> list[list[int]]:
    """The example's own generation, greedy."""
    done = Report()
    for _ in run(llama.session(batch_of(llama, prompts, new_tokens), "NHD", kv_cache_dtype, scales), done):
        pass
    return done.answers


def common(answer: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b), len(answer))
