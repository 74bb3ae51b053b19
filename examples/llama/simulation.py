"""The scheduler with a model that is a hash, so that millions of steps can be checked.

The model writes to each slot a number that stands for all tokens up to it, makes the next token of it, and looks, at
each step, whether all slots of a sequence hold what they must: a block that two sequences write, that was evicted too
early, or that was found for another text, is seen at once.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass

from kvcore.pool import BlockPool

from .scheduler import Job, Piece, Request, Scheduler

STOP = 0
VOCABULARY = 50


@dataclass
class Result:
    """Of a simulation that went well."""

    steps: int
    requests: int
    made: int
    preemptions: int
    evicted: int
    hit_rate: float
    seconds: float


class HashModel:
    """Keys and values of this model are numbers that stand for a text.

    Args:
        pool: Whose slots it has.
    """

    def __init__(self, pool: BlockPool):
        self.size = pool.block_size
        self.blocks = [[-1] * self.size for _ in range(pool.num_blocks)]
        self.states: dict[Job, list[int]] = {}  # of each position of a job's tokens

    def states_of(self, job: Job) -> list[int]:
        states = self.states.setdefault(job, [])
        for token in job.tokens[len(states) :]:
            states.append(after(states[-1] if states else 0, token))
        return states

    def run(self, pieces: list[Piece]) -> list[int]:
        """Writes all tokens, then attends: the token after each piece. Raises AssertionError where a slot is wrong."""
        for job, sequence, tokens, slots, _ in pieces:
            states = self.states_of(job)[sequence.length - len(tokens) : sequence.length]
            for slot, state in zip(slots, states, strict=True):
                self.blocks[slot // self.size][slot % self.size] = state
        new = []
        for job, sequence, *_ in pieces:
            states = self.states_of(job)[: sequence.length]
            for i, block in enumerate(sequence.table):
                wanted = states[i * self.size : (i + 1) * self.size]
                found = self.blocks[block][: len(wanted)]
                assert found == wanted, f"request {job.request.number}, block {i}: {found} in place of {wanted}"
            new.append(states[-1] % VOCABULARY)
        return new


def after(state: int, token: int) -> int:
    """What stands for a text and one token more."""
    return (state * 6364136223846793005 + token * 2 + 1442695040888963407) % 2**61


def alone(request: Request) -> list[int]:
    """The answer of the model to one request, without any cache."""
    state, answer = 0, []
    for token in request.prompt:
        state = after(state, token)
    while len(answer) < request.max_new_tokens and STOP not in answer:
        answer.append(state % VOCABULARY)
        state = after(state, answer[-1])
    return answer


def simulate(steps: int, seed: int = 0, num_blocks: int = 24, block_size: int = 4) -> Result:
    """Runs a scheduler under a random load, and checks it after each step.

    Requests come in waves, so that blocks run out and all is idle at times; half of them begin with one of a few
    prefixes.

    Args:
        steps: To run before no more requests are added.
        seed: Of the load.
        num_blocks: Of the pool.
        block_size: Slots of a block.

    Raises:
        AssertionError: something is wrong.
    """
    chance = random.Random(seed)
    pool = BlockPool(num_blocks, block_size, watermark=chance.randrange(3), seed=seed)
    scheduler = Scheduler(pool, num_seqs=6, num_tokens=16, context=60, stop_ids=(STOP,))
    model = HashModel(pool)
    prefixes = [[chance.randrange(1, VOCABULARY) for _ in range(length)] for length in (4, 9, 16, 23)]
    number, started = 0, time.process_time()
    while scheduler.counts.steps < steps or scheduler.busy:
        if scheduler.counts.steps < steps and chance.random() < (0.6 if scheduler.counts.steps // 100 % 2 else 0.05):
            prompt = chance.choice(prefixes) if chance.random() < 0.5 else []
            prompt = [*prompt, *(chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(1, 20)))]
            scheduler.add(Request(number, tuple(prompt), chance.randrange(1, 18)))
            number += 1
        pieces = scheduler.schedule()
        check_step(scheduler, pieces)
        for job in scheduler.update(pieces, model.run(pieces)):
            if job.finish:
                assert job.answer == alone(job.request), f"request {job.request.number} has another answer"
                del model.states[job]
        check_books(scheduler)
    assert pool.num_free == num_blocks, f"{num_blocks - pool.num_free} blocks are lost"
    assert not model.states, "requests are lost"
    counts, now = scheduler.counts, pool.statistics
    seconds = time.process_time() - started
    return Result(counts.steps, number, counts.made, counts.preemptions, now.evicted, now.hit_rate, seconds)


def check_step(scheduler: Scheduler, pieces: list[Piece]) -> None:
    """What holds of each step. Raises AssertionError."""
    assert [piece.job for piece in pieces] == scheduler.running, "each one that runs has a piece"
    assert bool(pieces) == scheduler.busy, "a step does something if there is anything to do"
    assert len(pieces) <= scheduler.num_seqs
    assert sum(len(piece.tokens) for piece in pieces) <= scheduler.num_tokens
    assert all(piece.tokens for piece in pieces)
    slots = [slot for piece in pieces for slot in piece.slots]
    assert len(slots) == len(set(slots)), "a slot is written once"
    holders = Counter(block for piece in pieces for block in piece.sequence.table)
    written = {slot // scheduler.pool.block_size for slot in slots}
    assert all(holders[block] == 1 for block in written), "what is written has one holder"


def check_books(scheduler: Scheduler) -> None:
    """What holds between steps. Raises AssertionError."""
    pool, running = scheduler.pool, scheduler.running
    numbers = [job.request.number for job in (*running, *scheduler.waiting)]
    assert numbers == sorted(numbers), "the younger ones wait"
    held = set()
    for job in running:
        assert job.sequence is not None
        assert job.sequence.length < len(job.tokens)
        assert job.sequence.tokens == job.tokens[: job.sequence.length], "what is committed is what the job has"
        assert len(job.sequence.table) == -(-job.sequence.length // pool.block_size)
        held.update(job.sequence.table)
    assert len(held) + pool.num_free == pool.num_blocks, "no block is lost, none is in two hands"
    assert all(job.sequence is None for job in scheduler.waiting)
