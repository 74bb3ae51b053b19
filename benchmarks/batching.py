"""Continuous batching of examples/batching.py beside the same requests one at a time, and what its scheduler costs.

`uv run python -m benchmarks batching [--json FILE]`. Requests come all at once: a prompt of 64 tokens with which all
begin and 16 of its own, and 64 tokens to make, greedy, in float32. "batch" is tokens made a second in the batch, the
scheduler's time with the model's, without text; "alone" the same for one request after another in the session of
examples/generate.py, whose prefill is one call, and whose decode loop is one program. Neither counts compiling. Both
take turns in one process; each one's best round counts. All answers are compared: "near_ties" are those that differ
from a token on that the model does not prefer to the other. "host" is the part of the time that is not the model's.

The model is one of random weights, or a GGUF file. The last row's pool has room for half of the sequences: they are
preempted, and computed again.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from benchmarks import report
from examples.llama.alone import Comparison, compare
from examples.llama.gguf_model import Layer, LlamaConfig, LlamaModel, load_model
from examples.llama.jax_batching import JaxBatcher
from examples.llama.jax_session import JaxLlama
from examples.llama.paging import BLOCK_SIZE
from examples.llama.scheduler import Job, Request, Scheduler
from examples.llama.session import cache_arguments
from examples.llama.simulation import simulate
from kvcore.cache_spec import CacheSpec

COLUMNS = {
    "num_seqs": "d", "blocks": "d", "requests": "d", "steps": "d", "preemptions": "d", "hit_rate": ".2f",
    "batch": ".0f", "alone": ".0f", "batch/alone": ".2f", "host": ".2f", "equal": "d", "near_ties": "d",
}  # fmt: skip
PREFIX, OWN = 64, 16


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks batching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="of a step")
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="of a step")
    parser.add_argument("--requests", type=int, default=32, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--model", metavar="FILE.gguf", help="in place of random weights")
    parser.add_argument("--small", action="store_true", help="fewer random weights, which a processor's cache holds")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="of the scheduler alone, checked")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    model = random_model(options.small) if options.model is None else load_model(options.model)
    model = replace(model, config=replace(model.config, stop_ids=()))
    llama = JaxLlama(model)
    requests = some_requests(options.requests, options.new_tokens, len(model.embedding))
    sizes = [*((num_seqs, False) for num_seqs in options.num_seqs), (options.num_seqs[-1], True)]
    rows = [measure(llama, requests, *size, options.num_tokens, options.rounds) for size in sizes]
    what = f"{PREFIX} + {OWN} prompt tokens, {options.new_tokens} new ones, tokens/s, best of {options.rounds} rounds"
    print(f"{model.name}: {what}\n\n{report.table(rows, COLUMNS)}")
    extra: dict[str, Any] = {"benchmark": "batching", "what": what, "model": model.name}
    if options.steps:
        result = simulate(options.steps)
        extra["simulation"] = vars(result)
        print(f"\nscheduler alone: {result}")
    report.save(options.json, rows, **extra)


def measure(
    llama: JaxLlama, requests: list[Request], num_seqs: int, scarce: bool, num_tokens: int, rounds: int
) -> dict[str, Any]:
    """A row: requests in a batch of so many, and one at a time."""
    length = len(requests[0].prompt) + requests[0].max_new_tokens
    config, context = llama.model.config, -(-length // BLOCK_SIZE) * BLOCK_SIZE
    blocks = num_seqs * context // BLOCK_SIZE
    blocks = blocks // 2 if scarce else 2 * blocks
    spec = CacheSpec.create(**cache_arguments(config, blocks, llama.dtype, "NHD", "auto"))
    batcher = JaxBatcher(llama, memory=spec.nbytes, num_seqs=num_seqs, num_tokens=num_tokens, context=context)
    batch, alone, compared = 0.0, 0.0, Comparison()
    row: dict[str, Any] = {}
    for turn in range(rounds + 1):
        batcher.pool.forget()
        batcher.seconds = 0.0
        scheduler = Scheduler(batcher.pool, num_seqs, num_tokens, context)
        shared = batcher.pool.statistics
        started = time.perf_counter()
        jobs = answer(scheduler, batcher, requests)
        seconds = time.perf_counter() - started
        compared = compare(llama, jobs, context)
        if compared.different:
            raise ValueError(f"requests {compared.different} have other answers than alone")
        if batcher.pool.num_free != batcher.pool.num_blocks:
            raise ValueError(f"all {batcher.pool.num_blocks} blocks must be free, got {batcher.pool.num_free}")
        if not turn:  # does not count
            continue
        alone = max(alone, compared.tokens / compared.seconds)
        if (rate := scheduler.counts.made / seconds) > batch:
            now, batch = batcher.pool.statistics, rate
            row = {
                "steps": scheduler.counts.steps, "preemptions": scheduler.counts.preemptions, "batch": batch,
                "hit_rate": (now.shared_tokens - shared.shared_tokens) / (now.prompt_tokens - shared.prompt_tokens),
                "host": 1 - batcher.seconds / seconds,
            }  # fmt: skip
    return row | {
        "num_seqs": num_seqs, "num_tokens": num_tokens, "blocks": blocks, "requests": len(requests),
        "alone": alone, "batch/alone": batch / alone, "equal": compared.equal, "near_ties": compared.near_ties,
    }  # fmt: skip


def answer(scheduler: Scheduler, batcher: JaxBatcher, requests: list[Request]) -> list[Job]:
    jobs = [scheduler.add(request) for request in requests]
    while scheduler.busy:
        pieces = scheduler.schedule()
        scheduler.update(pieces, batcher.run(pieces))
    return jobs


def some_requests(count: int, new_tokens: int, vocabulary: int) -> list[Request]:
    chance = np.random.default_rng(0)
    prefix = chance.integers(0, vocabulary, PREFIX).tolist()
    return [Request(i, (*prefix, *chance.integers(0, vocabulary, OWN).tolist()), new_tokens) for i in range(count)]


def random_model(small: bool = False) -> LlamaModel:
    """4 layers of 512, 8 query heads and 2 KV heads of 64, an MLP of 1408, 4096 tokens: 15 million weights.

    A small one: of 128, 4 and 2 heads of 32, 352, 512: 1 million weights, which a cache of the processor holds.
    """
    chance = np.random.default_rng(0)
    hidden, heads, kv_heads, size, mlp, vocabulary = (128, 4, 2, 32, 352, 512) if small else (512, 8, 2, 64, 1408, 4096)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (chance.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    norm = np.ones(hidden, np.float32)
    layers = tuple(
        Layer(
            norm, matrix((heads + 2 * kv_heads) * size, hidden), matrix(hidden, heads * size),
            norm, matrix(2 * mlp, hidden), matrix(hidden, mlp),
        )
        for _ in range(4)
    )  # fmt: skip
    return LlamaModel(
        name=f"{'few ' if small else ''}random weights",
        config=LlamaConfig(4, hidden, heads, kv_heads, size, 1e-5, 4096, ()),
        tokenizer=Tokenizer(BPE()),
        embedding=matrix(vocabulary, hidden),
        layers=layers,
        final_norm=norm,
        head=matrix(vocabulary, hidden),
        inverse_frequencies=(1e4 ** -(np.arange(0, size, 2) / size)).astype(np.float32),
    )
