"""The same requests, one at a time, as examples/generate.py answers them: what a batch is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv import PagedKVCache

from . import jax_model
from .gguf_model import LlamaConfig
from .jax_batching import scores
from .jax_session import JaxLlama
from .paging import BLOCK_SIZE, Batch, plan_batch, round_up
from .scheduler import Job, Request
from .session import Report, Sampling, cache_arguments, run

NEAR = 1e-4
"""Scores of two tokens, of which the largest is about 10, that differ by less are as good as equal in float32: sums are
rounded otherwise where a product has other rows beside it."""


@dataclass
class Comparison:
    """Answers of a batch beside those of each request alone."""

    tokens: int = 0  # made alone
    seconds: float = 0.0  # that these took, without compiling
    equal: int = 0  # answers that are the same
    near_ties: int = 0  # that differ from a token on whose score was as good as equal
    different: tuple[int, ...] = ()  # numbers of requests that differ for no such reason


def compare(llama: JaxLlama, jobs: Sequence[Job], context: int) -> Comparison:
    """Answers each request alone, and compares.

    Args:
        llama: The model.
        jobs: Requests that were answered.
        context: Tokens of a sequence, at most.
    """
    found = Comparison()
    for job in jobs:
        answer, seconds = answer_alone(llama, job.request, context)
        found.tokens += len(answer)
        found.seconds += seconds
        if answer == job.answer:
            found.equal += 1
        elif is_near_tie(llama, job.request, answer, job.answer, context):
            found.near_ties += 1
        else:
            found.different += (job.request.number,)
    return found


def answer_alone(llama: JaxLlama, request: Request, context: int) -> tuple[list[int], float]:
    """The answer, and the seconds that its prefill and the decode loop, which is one program, took."""
    batch = plan_batch([request.prompt], request.max_new_tokens, context_length=context)
    sampling = Sampling(request.temperature, request.seed) if request.temperature else None
    report = Report()
    for _ in run(llama.session(widen(batch, context), sampling=sampling), report):
        pass
    return report.answers[0], report.prefill_seconds + report.decode_seconds


def widen(batch: Batch, context: int) -> Batch:
    """The batch in arrays of a whole context, so that all have the same programs."""
    context = round_up(context, BLOCK_SIZE)
    tokens = np.zeros((1, context), np.int32)
    tokens[:, : batch.context] = batch.tokens[:, :context]
    tables = np.zeros((1, context // BLOCK_SIZE), np.int32)
    tables[:, : batch.block_tables.shape[1]] = batch.block_tables[:, : tables.shape[1]]
    return replace(batch, tokens=tokens, block_tables=tables, num_blocks=max(batch.num_blocks, tables.shape[1]))


def is_near_tie(llama: JaxLlama, request: Request, first: list[int], second: list[int], context: int) -> bool:
    """Whether two answers differ from a token on that the model does not prefer to the other.

    False where one is the beginning of the other.
    """
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if same is None:
        return False
    known = [*request.prompt, *first[:same]]
    found = scores_after(llama, known, request, context)
    return abs(float(found[first[same]] - found[second[same]])) < NEAR * max(1.0, float(jnp.abs(found).max()))


def scores_after(llama: JaxLlama, tokens: list[int], request: Request, context: int) -> Array:
    """The score of each token after some, all computed at once: float32 [vocabulary]."""
    context = round_up(context, BLOCK_SIZE)
    cache = PagedKVCache.create(
        **cache_arguments(llama.model.config, context // BLOCK_SIZE, llama.dtype, "NHD", "auto")
    )
    weights = llama.weights | {"cos_sin": jnp.asarray(llama.model.rope_table(context)), "scales": None}
    padded = np.zeros(context, np.int32)
    padded[: len(tokens)] = tokens
    length, temperature = np.array([len(tokens)], np.int32), np.array([request.temperature], np.float32)
    arguments = weights, padded, length, temperature, np.array([request.seed], np.uint32), cache
    return llama.program(_score, *arguments)(*arguments)[0]


def _score(
    config: LlamaConfig,
    weights: jax_model.Weights,
    tokens: Array,  # int32 [context]
    length: Array,  # int32 [1]: how many of them there are
    temperature: Array,
    seed: Array,
    state: PagedKVCache,
) -> tuple[Array, PagedKVCache]:
    positions = jnp.arange(len(tokens))  # which are their slots, too
    table, end = (positions[::BLOCK_SIZE] // BLOCK_SIZE)[None], jnp.array([len(tokens)])
    starts = jnp.array([0, len(tokens)])
    x, cache = jax_model.run_layers(config, weights, state, tokens, positions, positions, table, end, starts)
    return scores(jax_model.logits(config, weights, x[length - 1]), temperature, seed, length)[0], cache
