"""Decode speed of the example in JAX and in torch, beside `transformers.generate`, on the same weights.

`uv run python -m benchmarks generate [--json FILE]`. The three take turns in one process, so that all see the
same machine; each one's best round counts. Every sequence makes exactly `--new-tokens` tokens: end of text
does not stop it. Only decoding is timed, without loading, compiling and prefill. For transformers, that is
the time of a whole generation less the time of one that makes a single token.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from examples.llama.gguf_model import LlamaModel, find_model, load_model
from examples.llama.jax_session import JaxLlama
from examples.llama.paging import plan_batch
from examples.llama.session import Report, run
from examples.llama.torch_session import TorchLlama

PROMPTS = (
    "The capital of France is",
    "The weather in the north of Canada is usually",
    "Once upon a time",
    "def fibonacci(n):",
)
COLUMNS = {
    "batch": "d",
    "jax": ".1f",
    "torch": ".1f",
    "transformers": ".1f",
    "jax/transformers": ".2f",
    "torch/transformers": ".2f",
}

Decode = Callable[[], float]
"""Generates a batch once and returns the seconds that its decode steps took."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks generate", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], metavar="N", help="batch sizes")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--model", metavar="FILE.gguf")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)

    path = find_model(options.model)
    model = load_model(path)
    model = replace(model, config=replace(model.config, stop_ids=()))
    twins = JaxLlama(model), TorchLlama(model)
    reference = Transformers(path)
    rows = []
    for size in options.batch:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(size)]
        best = take_turns(
            {
                "jax": twin_decode(twins[0], prompts, options.new_tokens),
                "torch": twin_decode(twins[1], prompts, options.new_tokens),
                "transformers": reference.decode(prompts, options.new_tokens),
            },
            options.rounds,
        )
        rates: dict[str, Any] = {name: size * (options.new_tokens - 1) / seconds for name, seconds in best.items()}
        ratios = {f"{name}/transformers": rates[name] / rates["transformers"] for name in ("jax", "torch")}
        rows.append({"batch": size} | rates | ratios)
    what = f"decode, tokens/s, float32, {options.new_tokens} new tokens, best of {options.rounds} rounds"
    print(f"{model.name}: {what}\n\n{report.table(rows, COLUMNS)}")
    report.save(options.json, rows, what=what, model=model.name)


def take_turns(decodes: dict[str, Decode], rounds: int) -> dict[str, float]:
    """The best time of each, in seconds, after a round that does not count."""
    times = {name: [] for name in decodes}
    for _ in range(rounds + 1):
        for name, decode in decodes.items():
            times[name].append(decode())
    return {name: min(measured[1:]) for name, measured in times.items()}


def twin_decode(llama: JaxLlama | TorchLlama, prompts: list[str], new_tokens: int) -> Decode:
    """The example itself: the cache in NHD blocks of float32, the decode loop in one call."""
    model: LlamaModel = llama.model
    ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    batch = plan_batch(ids, new_tokens, context_length=model.config.context_length)

    def decode() -> float:
        done = Report()
        for _ in run(llama.session(batch), done):
            pass
        assert done.decode_tokens == len(prompts) * (new_tokens - 1)
        return done.decode_seconds

    return decode


class Transformers:
    """`AutoModelForCausalLM.generate` with its defaults, on torch's CUDA device or the CPU."""

    def __init__(self, path: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        self.model = model.to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(**source, padding_side="left")

    def decode(self, prompts: list[str], new_tokens: int) -> Decode:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)

        def seconds(count: int) -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                out = self.model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count)
            out.cpu()
            return time.perf_counter() - started

        return lambda: seconds(new_tokens) - seconds(1)
