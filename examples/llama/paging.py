"""Pages: which blocks of the cache a sequence owns, and how a batch of prompts is laid out on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcore.pool import BlockPool

from .gguf_model import InputError

BLOCK_SIZE = 16
"""Slots per block."""

_CONTEXT_STEP = 128
"""Context lengths are rounded up to a multiple of this many tokens, so that few need compiling anew."""


@dataclass(frozen=True)
class Batch:
    """Prompts of different lengths, padded to one array, and the blocks reserved for prompt and answer."""

    tokens: np.ndarray  # int32 [num_sequences, context]: the prompts, then room for the answers
    lengths: np.ndarray  # int32 [num_sequences]: prompt lengths
    block_tables: np.ndarray  # int32 [num_sequences, context / block_size]; 0 beyond the reserved blocks
    num_blocks: int  # of the cache that holds them all
    max_new_tokens: int

    @property
    def context(self) -> int:
        return self.tokens.shape[1]


def plan_batch(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    context_length: int,
    block_size: int = BLOCK_SIZE,
    seed: int = 0,
) -> Batch:
    """Reserves blocks for each prompt and `max_new_tokens` more, and no block beyond.

    Args:
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens to make, at most, for each prompt.
        context_length: What the model can attend to, in tokens.
        block_size: Slots per block.
        seed: Of the order of the blocks.

    Raises:
        InputError: an empty prompt, or one that leaves too little of the context length.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for prompt in prompts:
        if not prompt:
            raise InputError("a prompt must have at least one token, got an empty one")
        if len(prompt) + max_new_tokens > context_length:
            raise InputError(
                f"prompt and max_new_tokens must fit the model's context of {context_length} tokens, "
                f"got {len(prompt)} + {max_new_tokens}"
            )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    context = round_up(int(lengths.max()) + max_new_tokens, _CONTEXT_STEP)
    tokens = np.zeros((len(prompts), context), np.int32)
    needed = [round_up(length + max_new_tokens, block_size) // block_size for length in lengths.tolist()]
    num_blocks = round_up(sum(needed), _CONTEXT_STEP // block_size)
    pool = BlockPool(num_blocks, block_size)
    # Scattered, as after hours of serving: never neighbours on purpose.
    pool.free(np.random.default_rng(seed).permutation(pool.allocate(num_blocks)).tolist())
    tables = np.zeros((len(prompts), context // block_size), np.int32)
    for row, (prompt, count) in enumerate(zip(prompts, needed, strict=True)):
        tokens[row, : len(prompt)] = prompt
        tables[row, :count] = pool.allocate(count)
    return Batch(tokens, lengths, tables, num_blocks, max_new_tokens)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
