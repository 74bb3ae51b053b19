"""What a pool tells of itself."""

from typing import NamedTuple


class PoolStatistics(NamedTuple):
    """Where the blocks of a pool are, and what sharing has spared.

    Attributes:
        num_blocks: All blocks: used, cached and empty ones.
        used: Blocks that someone holds.
        cached: Free blocks that keep what they hold.
        empty: The other free blocks.
        evicted: Cached blocks that were taken for something else, so far.
        prompt_tokens: Tokens of all prompts, so far: counted when a `Sequence` is first appended to.
        shared_tokens: Of these, tokens that were there already.
        hit_rate: shared_tokens / prompt_tokens, or 0.
    """

    num_blocks: int
    used: int
    cached: int
    empty: int
    evicted: int
    prompt_tokens: int
    shared_tokens: int
    hit_rate: float
