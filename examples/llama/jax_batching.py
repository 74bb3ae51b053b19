"""One step of continuous batching in JAX: a program of fixed shape for any mix of prefill and decode."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.stages import Compiled

from jaxkv import BlockPool, CacheLayout, PagedKVCache, blocks_that_fit, check_tables, ragged_batch, slot_mapping
from kvcore.nbytes import bytes_of

from . import jax_model
from .gguf_model import InputError, LlamaConfig
from .jax_session import JaxLlama
from .paging import BLOCK_SIZE, round_up
from .scheduler import Piece
from .session import cache_arguments


class Step(NamedTuple):
    """What a step is told, in arrays of NumPy, or of JAX in the program. Padding is -1, 0 or empty."""

    tokens: Any  # int32 [num_tokens]: of all sequences, one after another
    block_tables: Any  # int32 [num_seqs, max_blocks]
    seq_lens: Any  # int32 [num_seqs], these tokens among them
    query_start_loc: Any  # int32 [num_seqs + 1]; None: one token each, all decode
    positions: Any  # int32 [num_tokens]
    temperatures: Any  # float32 [num_seqs]
    seeds: Any  # uint32 [num_seqs]


def run_step(
    config: LlamaConfig, weights: jax_model.Weights, step: Step, state: PagedKVCache
) -> tuple[Array, Array, PagedKVCache]:
    """Writes all tokens to the cache, attends, and chooses the token after each sequence's last.

    Returns:
        The new tokens, int32 [num_seqs], the slots of the old ones, int32 [num_tokens], and the cache.
    """
    tokens, tables, seq_lens, starts, positions, temperatures, seeds = step
    slots = slot_mapping(tables, starts, seq_lens, state.spec.block_size, len(tokens))
    last = jnp.arange(len(seq_lens)) if starts is None else jnp.maximum(starts[1:] - 1, 0)
    x, cache = jax_model.run_layers(config, weights, state, tokens, positions, slots, tables, seq_lens, starts)
    return choose(jax_model.logits(config, weights, x[last]), temperatures, seeds, seq_lens), slots, cache


def choose(logits: Array, temperatures: Array, seeds: Array, positions: Array) -> Array:
    """The token of each row for its position: the likeliest, or what the request alone would draw. int32 [num_seqs]."""
    return jnp.argmax(scores(logits, temperatures, seeds, positions), axis=-1).astype(jnp.int32)


def scores(logits: Array, temperatures: Array, seeds: Array, positions: Array) -> Array:
    """What is largest for the token that is chosen: float32 [num_seqs, vocabulary].

    Each row is sampled as if it were the first of its batch, so that no draw depends on what else runs.
    """
    logits = logits.astype(jnp.float32)

    def draw() -> Array:
        noise = jax_model.gumbel(seeds, positions, logits.shape[1], jnp.zeros_like(seeds))
        return logits + temperatures[:, None] * noise

    return lax.cond(jnp.any(temperatures > 0), draw, lambda: logits)


def memory_of(memory: int | str) -> int:
    """Bytes that text such as "256MiB" says. Raises InputError where it says none."""
    try:
        return bytes_of("memory", memory)
    except ValueError as error:
        raise InputError(str(error)) from error


class JaxBatcher:
    """A cache, and the few programs that work on it.

    One is for steps that only decode, the others have room for a quarter of `num_tokens` and for all: a program takes
    as long for padding as for tokens.

    Args:
        llama: The model.
        memory: Of the cache: bytes, or text such as "256MiB".
        num_seqs: Sequences of a step, at most.
        num_tokens: Tokens of a step, at most.
        context: Tokens of a sequence, at most.
        layout: Of the cache.
        kv_cache_dtype: What the cache holds; if it is quantised, each token's head has a scale of its own.
        check: Whether each step is looked at by `check_tables`.

    Attributes:
        pool: The blocks of the cache, for a scheduler.
        seconds: Of all steps.

    Raises:
        InputError: the cache cannot be as it is asked for.
    """

    def __init__(
        self,
        llama: JaxLlama,
        *,
        memory: int | str,
        num_seqs: int,
        num_tokens: int,
        context: int,
        layout: str | CacheLayout = "NHD",
        kv_cache_dtype: str = "auto",
        check: bool = False,
    ):
        self.llama, self.num_seqs, self.num_tokens, self.check = llama, num_seqs, num_tokens, check
        self.max_blocks = round_up(context, BLOCK_SIZE) // BLOCK_SIZE
        arguments = cache_arguments(llama.model.config, 1, llama.dtype, layout, kv_cache_dtype)
        shape = {name: value for name, value in arguments.items() if name != "num_blocks"}
        num_blocks = blocks_that_fit(memory_of(memory), **shape)
        if not num_blocks:
            raise InputError(f"memory must hold a block of {BLOCK_SIZE} slots of all layers, got {memory}")
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        arguments["num_blocks"] = num_blocks
        self.cache = PagedKVCache.create(**arguments)
        rope_table = jnp.asarray(llama.model.rope_table(self.max_blocks * BLOCK_SIZE))
        self.weights = llama.weights | {"cos_sin": rope_table}
        self.seconds, started = 0.0, time.perf_counter()
        self._programs: dict[int | None, Compiled] = {}
        self._rooms = sorted({max(num_seqs, num_tokens // 4), num_tokens})
        for room in (None, *self._rooms):
            arrays = self._arrays([], room)
            self._programs[room] = llama.program(run_step, self.weights, arrays, self.cache)
            _, _, self.cache = self._programs[room](self.weights, arrays, self.cache)  # once, with nothing to do
        self.compile_seconds = time.perf_counter() - started

    def run(self, pieces: Sequence[Piece]) -> list[int]:
        """Runs a step. Returns the token after each piece.

        Raises:
            ValueError: the step is checked, and its tables, lengths, starts or slots do not agree.
        """
        started = time.perf_counter()
        wanted = [slot for piece in pieces for slot in piece.slots]
        count = sum(len(piece.tokens) for piece in pieces)
        room = None if count == len(pieces) else next(room for room in self._rooms if room >= count)
        arrays = self._arrays(pieces, room)
        if self.check:
            padded = wanted + [-1] * (len(arrays.tokens) - len(wanted))
            sizes = {"num_blocks": self.pool.num_blocks, "block_size": BLOCK_SIZE}
            check_tables(arrays.block_tables, arrays.seq_lens, padded, arrays.query_start_loc, **sizes)
        new, slots, self.cache = self._programs[room](self.weights, arrays, self.cache)
        if self.check and slots[: len(wanted)].tolist() != wanted:
            raise ValueError(f"slot_mapping must give the pool's slots, {wanted}, got {slots.tolist()}")
        found = np.asarray(new)[: len(pieces)].tolist()  # waits for the device
        self.seconds += time.perf_counter() - started
        return found

    def _arrays(self, pieces: Sequence[Piece], room: int | None) -> Step:
        """A step with room for so many tokens; None: for one of each sequence."""
        rows, new = self.num_seqs, [token for piece in pieces for token in piece.tokens]
        tables, starts, seq_lens, positions = ragged_batch(
            [piece.sequence for piece in pieces], [len(piece.tokens) for piece in pieces],
            num_seqs=rows, max_blocks=self.max_blocks, num_tokens=room or rows,
        )  # fmt: skip
        tokens = np.zeros(room or rows, np.int32)
        tokens[: len(new)] = new
        temperatures, seeds = np.zeros(rows, np.float32), np.zeros(rows, np.uint32)
        for row, piece in enumerate(pieces):
            temperatures[row], seeds[row] = piece.job.request.temperature, piece.job.request.seed
        return Step(tokens, tables, seq_lens, None if room is None else starts, positions, temperatures, seeds)
