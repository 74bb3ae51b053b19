"""What the host's side costs: blocks handed out, shared, copied and evicted, by BlockPool and Sequence.

`uv run python -m benchmarks pool [--json FILE]`. Plain Python on one core, in seconds of CPU time; the cache itself is
not there. An operation is a block that is handed out, shared or given back; or a call that moves none, as in decoding.

    allocate, free      64 blocks at a time, of a pool that is half full
    decode              256 sequences, a token each: append, commit; at 528 tokens another takes a sequence's place
    prompts             2,048 tokens, of which 1,024 are one of 64 beginnings: start, append, commit, and free, when the
                        pool is full; what nobody holds any more is evicted
    forks               4 of a sequence of 1,000 tokens: fork, append (a copy on write), commit, free
    drafts              256 sequences, 5 tokens each of which 3 are accepted: append, commit, truncate
"""

import argparse
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator

from benchmarks import report
from benchmarks.common import BLOCK_SIZE
from kvcore.pool import BlockPool
from kvcore.sequence import Sequence

COLUMNS = {"case": "s", "operations": "d", "seconds": ".2f", "ns/operation": ".0f", "hit_rate": ".2f", "evicted": "d"}
NUM_BLOCKS = 2**16
SEQUENCES = 256


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=10**6, metavar="N", help="of each case")
    parser.add_argument("--num-blocks", type=int, default=NUM_BLOCKS, metavar="N", help="of the pool")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    rows = [measure(name, options.operations, options.num_blocks) for name in CASES]
    print(report.table(rows, COLUMNS))
    report.save(
        options.json,
        rows,
        benchmark="pool",
        what=f"{options.operations} operations on {options.num_blocks} blocks of {BLOCK_SIZE} slots",
    )


def measure(name: str, operations: int, num_blocks: int) -> dict[str, str | int | float]:
    """Steps of a case until so many operations are done, once the pool is as full as it will be."""
    pool = BlockPool(num_blocks, BLOCK_SIZE, seed=0)
    steps = CASES[name](pool, random.Random(0))
    next(steps)  # to begin with
    done, start = 0, time.process_time()
    while done < operations:
        done += next(steps)
    seconds = time.process_time() - start
    now = pool.statistics
    return {
        "case": name, "operations": done, "seconds": seconds, "ns/operation": seconds / done * 1e9,
        "hit_rate": now.hit_rate, "evicted": now.evicted,
    }  # fmt: skip


def allocate_and_free(pool: BlockPool, chance: random.Random) -> Iterator[int]:
    count = min(64, pool.num_blocks // 8)
    held = deque(pool.allocate(count) for _ in range(pool.num_blocks // 2 // count))
    chance.shuffle(held)
    yield 0
    while True:
        pool.free(held.popleft())
        held.append(pool.allocate(count))
        yield 2 * count


def decode(pool: BlockPool, chance: random.Random) -> Iterator[int]:
    sequences = [written(pool, tokens(chance, 16 + 2 * i)) for i in range(count_of(pool, 600))]
    yield 0
    while True:
        for i, sequence in enumerate(sequences):
            if sequence.length >= 528:
                yield len(sequence.table) + 2
                sequence.free()
                sequences[i] = written(pool, tokens(chance, 16))
            else:
                sequence.append()
                sequence.commit((i,))
                yield 2


def prompts(pool: BlockPool, chance: random.Random) -> Iterator[int]:
    beginnings = [tokens(chance, 1024) for _ in range(64)]
    ends = [tokens(chance, 1024) for _ in range(64)]
    running = deque[Sequence]()
    for number in itertools.count():
        # A text of its own from the middle on, which is made quickly: making it is measured, too.
        prompt = [*chance.choice(beginnings), number, *ends[number % 64][1:]]
        freed = 0
        while pool.num_free < 128:
            freed += len(running[0].table)
            running.popleft().free()
        running.append(written(pool, prompt))
        filled = pool.num_blocks // 64
        if number >= filled:
            yield 0 if number == filled else freed + 128


def forks(pool: BlockPool, chance: random.Random) -> Iterator[int]:
    sequence = written(pool, tokens(chance, 1000))
    yield 0
    while True:
        children = [sequence.fork() for _ in range(4)]
        for i, child in enumerate(children):
            child.append()
            child.commit((i,))
        for child in children:
            child.free()
        yield 4 * (2 * len(sequence.table) + 2)


def drafts(pool: BlockPool, chance: random.Random) -> Iterator[int]:
    sequences = [written(pool, tokens(chance, 100)) for _ in range(count_of(pool, 600))]
    yield 0
    while True:
        for i, sequence in enumerate(sequences):
            if sequence.length >= 520:
                sequence.truncate(100)
            sequence.append(5)
            sequence.commit((i, 1, 2))
            sequence.truncate(len(sequence.tokens))
            yield 3


CASES: dict[str, Callable[[BlockPool, random.Random], Iterator[int]]] = {
    "allocate, free": allocate_and_free,
    "decode": decode,
    "prompts": prompts,
    "forks": forks,
    "drafts": drafts,
}


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(128_000) for _ in range(count)]


def count_of(pool: BlockPool, length: int) -> int:
    """How many sequences of so many tokens run: 256, or as many as fit."""
    return min(SEQUENCES, pool.num_blocks * BLOCK_SIZE // length)


def written(pool: BlockPool, prompt: list[int]) -> Sequence:
    sequence = Sequence(pool, prompt)
    sequence.append(len(prompt) - sequence.length)
    sequence.commit(prompt[sequence.num_shared :])
    return sequence
