"""What both twins offer to generate a batch, and the loop that drives either."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvcore.cache_spec import CacheSpec
from kvcore.formats import KV_CACHE_DTYPES, PER_TOKEN_HEAD
from kvcore.layout import CacheLayout

from .gguf_model import InputError, LlamaConfig
from .paging import BLOCK_SIZE, Batch

FORMATS = tuple(name for name in KV_CACHE_DTYPES if name != "fp8_ds_mla")
"""What the cache may hold. That one is for latent attention, which no Llama has."""

_PIECE = 512
"""Most tokens of each prompt that one prefill call takes, which bounds the activations it holds."""

Scales = tuple[Any, Any]
"""Static k_scale and v_scale of all layers: float32 [num_layers, 1] or [num_layers, num_kv_heads], of the twin's
framework."""


class Sampling(NamedTuple):
    """How the next token is chosen where the likeliest is not what is wanted.

    It is the one with the largest logit + temperature * g, where each g is drawn from Gumbel's distribution: a draw
    from softmax(logits / temperature). The same seed gives the same draws in both twins, in any batch size and in any
    order of computing, because g depends on the seed, the sequence's number in its batch, the position of the new
    token, and the token's id only:

        mix(h) = murmur3's finaliser, uint32 → uint32
        bits   = mix(mix(mix(mix(seed) + sequence) + position) + id), modulo 2^32
        g      = -log(-log((bits // 512 + 1/2) / 2^23)), in float32

    Attributes:
        temperature: Above 0.
        seed: From 0 to 2^32 - 1.
    """

    temperature: float
    seed: int


class Progress(NamedTuple):
    """Where a batch stands, on the host."""

    tokens: np.ndarray  # int32 [num_sequences, context]: prompt, then what was made
    lengths: np.ndarray  # int32 [num_sequences]: how many of them are valid
    finished: bool  # every sequence has ended


class Session(Protocol):
    """A batch being generated. The cache and the block tables live on the device."""

    batch: Batch
    spec: CacheSpec
    compile_seconds: float

    def prefill(self) -> Progress:
        """Runs the prompts and makes each sequence's first token."""
        ...

    def decode(self, until: int) -> Progress:
        """Goes on until `until` new tokens are made, or all sequences have ended."""
        ...


@dataclass
class Report:
    """Counts and seconds of one generation. Filled while it runs."""

    compile_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    answers: list[list[int]] = field(default_factory=list)  # new tokens of each sequence


def cache_arguments(
    config: LlamaConfig,
    num_blocks: int,
    dtype: str,
    layout: str | CacheLayout,
    kv_cache_dtype: str,
    static: bool = False,
) -> dict[str, Any]:
    """A cache, as either `PagedKVCache.create` takes it, without its scales; `static` says if it has such.

    Raises:
        InputError: the format does not fit the layout or the model's heads.
    """
    arguments = {
        "num_blocks": num_blocks,
        "block_size": BLOCK_SIZE,
        "num_heads": config.num_kv_heads,
        "head_size": config.head_size,
        "num_layers": config.num_layers,
        "head_size_v": config.head_size,
        "dtype": dtype,
        "layout": layout,
        "kv_cache_dtype": kv_cache_dtype,
        "per_token_head": kv_cache_dtype != "auto" and not static,
    }
    try:
        CacheSpec.create(**arguments)
    except ValueError as error:
        raise InputError(str(error)) from error
    return arguments


def granularities(kv_cache_dtype: str) -> tuple[str, ...]:
    """What may have a scale of its own, a default first: each token's head, a layer's K and its V, a head of them."""
    if kv_cache_dtype == "auto":
        return ()
    return ("token_head", "tensor", "head") if kv_cache_dtype in PER_TOKEN_HEAD else ("tensor", "head")


def piece_length(batch: Batch) -> int:
    """Tokens of each prompt that one prefill call takes: a power of two from 16 to 512."""
    longest = int(batch.lengths.max())
    return min(_PIECE, max(16, 1 << (longest - 1).bit_length()))


def run(session: Session, report: Report, chunk: int | None = None) -> Iterator[list[list[int]]]:
    """Generates a batch and yields each sequence's new tokens so far, after every `chunk` steps.

    Args:
        session: A fresh session.
        report: Filled while running.
        chunk: Steps between looks at the result; None runs the whole decode loop as one program.
    """
    batch = session.batch
    report.compile_seconds = session.compile_seconds
    report.prefill_tokens = int(batch.lengths.sum())
    started = time.perf_counter()
    progress = session.prefill()
    report.prefill_seconds = time.perf_counter() - started
    made = 1
    first = int((progress.lengths - batch.lengths).sum())
    report.answers = _answers(batch, progress)
    yield report.answers
    while made < batch.max_new_tokens and not progress.finished:
        made = min(batch.max_new_tokens, made + (chunk or batch.max_new_tokens))
        started = time.perf_counter()
        progress = session.decode(made)
        report.decode_seconds += time.perf_counter() - started
        report.decode_tokens = int((progress.lengths - batch.lengths).sum()) - first
        report.answers = _answers(batch, progress)
        yield report.answers


def _answers(batch: Batch, progress: Progress) -> list[list[int]]:
    return [
        row[start:stop].tolist()
        for row, start, stop in zip(progress.tokens, batch.lengths, progress.lengths, strict=True)
    ]
