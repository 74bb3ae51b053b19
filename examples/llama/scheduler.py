"""Continuous batching: which tokens of which requests the next step of a model runs. Plain Python on BlockPool.

A step has room for a fixed number of sequences and of tokens. Each sequence that runs gets a token at least, so that a
long prompt never stops those that decode: it takes what they leave, and goes on in the next step. Where blocks run out,
the youngest sequence is preempted: it gives its blocks back, and begins again when there is room, with all its tokens
as a prompt, most of whose blocks it may find as it left them.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvcore.pool import BlockPool, OutOfBlocks
from kvcore.sequence import Sequence as CachedSequence

Finish = Literal["stop", "length"]
"""Why an answer ended: the model said so, or it has as many tokens as were asked for."""


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        number: Of the request. Each has its own, and a later one is larger.
        prompt: Token ids, at least one.
        max_new_tokens: Tokens to make, at most.
        temperature: Of sampling, as `session.Sampling` has it; 0 takes the likeliest token.
        seed: Of sampling, from 0 to 2^32 - 1.
    """

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(eq=False)
class Job:
    """A request that is being answered.

    Attributes:
        request: What was asked.
        tokens: Its prompt, and what was made so far. The last one is not in the cache yet.
        sequence: Its blocks; None while it waits, and when it has ended.
        finish: Why it ended; None before.
        preemptions: How often it lost its blocks.
    """

    request: Request
    tokens: list[int]
    sequence: CachedSequence | None = None
    finish: Finish | None = None
    preemptions: int = 0

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


class Piece(NamedTuple):
    """What a step runs of one sequence: tokens in a row, to be written to the cache, then attended from."""

    job: Job
    sequence: CachedSequence  # its table is a row of block_tables, its length an entry of seq_lens
    tokens: list[int]  # at the last positions of the sequence
    slots: list[int]  # of each token
    ends: bool  # whether the last is the last that is known: the model's result there is the next


@dataclass
class Counts:
    """What a scheduler did."""

    steps: int = 0
    tokens: int = 0  # that were run
    made: int = 0
    preemptions: int = 0


@dataclass
class Scheduler:
    """Decides what each step runs, and keeps the books of blocks and tokens.

    A step is `schedule`, the model's call on what that gives, and `update`. Requests are served in the order in which
    they are added.

    Args:
        pool: The blocks of the cache. The scheduler need not be its only user, but must be able to get all but the
            watermark's in the end.
        num_seqs: Sequences of a step, at most.
        num_tokens: Tokens of a step, at most.
        context: Tokens of a sequence, at most.
        stop_ids: Tokens that end an answer.

    Raises:
        ValueError: a step has less room for tokens than for sequences, or for none.
    """

    pool: BlockPool
    num_seqs: int
    num_tokens: int
    context: int
    stop_ids: Collection[int] = ()
    waiting: deque[Job] = field(default_factory=deque)  # the next is first; all are younger than those that run
    running: list[Job] = field(default_factory=list)  # the oldest is first
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if self.num_seqs < 1:
            raise ValueError(f"num_seqs must be at least 1, got {self.num_seqs}")
        if self.num_tokens < self.num_seqs:
            raise ValueError(f"num_tokens must be at least num_seqs, {self.num_seqs}, got {self.num_tokens}")

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> Job:
        """Takes a request, which will be answered.

        Raises:
            ValueError: the prompt is empty, nothing is to be made, or both together are more than the context or the
                blocks of the pool hold.
        """
        prompt, new = len(request.prompt), request.max_new_tokens
        if not prompt:
            raise ValueError("a prompt must have at least one token, got an empty one")
        if new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {new}")
        slots = (self.pool.num_blocks - self.pool.watermark) * self.pool.block_size
        # The last token is never written: nothing is made after it.
        room, what = min((self.context, f"a context of {self.context} tokens"), (slots + 1, f"{slots} slots"))
        if prompt + new > room:
            raise ValueError(f"prompt and max_new_tokens must fit {what}, got {prompt} + {new}")
        job = Job(request, list(request.prompt))
        self.waiting.append(job)
        return job

    def schedule(self) -> list[Piece]:
        """What the next step runs; nothing only if there is nothing to do. Their slots are taken.

        No block is written that two sequences have, so that nothing is to be copied: none forks, and blocks that are
        found are full.
        """
        pieces: list[Piece] = []
        room, preempted = self.num_tokens, False
        while len(pieces) < len(self.running):
            job = self.running[len(pieces)]
            later = len(self.running) - len(pieces) - 1
            try:
                pieces.append(self._piece(job, room - later))
            except OutOfBlocks:
                self._preempt(self.running.pop())  # the youngest, maybe this one: it has no piece yet
                preempted = True
            else:
                room -= len(pieces[-1].tokens)
        while self.waiting and room and len(self.running) < self.num_seqs and not preempted:
            job = self.waiting[0]
            job.sequence = CachedSequence(self.pool, job.tokens)
            # Blocks for all its tokens, not for those of one step: else it would be preempted half-way.
            missing = -(-len(job.tokens) // self.pool.block_size) - len(job.sequence.table)
            if missing > self.pool.num_free - self.pool.watermark:
                job.sequence.free()
                job.sequence = None
                break
            pieces.append(self._piece(job, room))
            room -= len(pieces[-1].tokens)
            self.running.append(self.waiting.popleft())
        self.counts.steps += bool(pieces)
        self.counts.tokens += self.num_tokens - room
        return pieces

    def update(self, pieces: Sequence[Piece], new: Sequence[int]) -> list[Job]:
        """Takes what the model made of the pieces of `schedule`.

        Args:
            pieces: All of them, after the call that writes their tokens.
            new: The token after each piece; where it does not end at its job's last token, anything.

        Returns:
            Jobs that have one token more. Those that have ended have no blocks any more.
        """
        grown = []
        for piece, token in zip(pieces, new, strict=True):
            job = piece.job
            piece.sequence.commit(piece.tokens)
            if not piece.ends:
                continue
            job.tokens.append(token)
            grown.append(job)
            if token in self.stop_ids:
                job.finish = "stop"
            elif len(job.tokens) == len(job.request.prompt) + job.request.max_new_tokens:
                job.finish = "length"
            if job.finish:
                piece.sequence.free()
                job.sequence = None
        self.counts.made += len(grown)
        self.running = [job for job in self.running if not job.finish]
        return grown

    def _piece(self, job: Job, room: int) -> Piece:
        """The next tokens of a job, as many as there is room for. Raises OutOfBlocks; then nothing has changed."""
        sequence = job.sequence
        assert sequence is not None, "a job that runs has blocks"
        start = sequence.length
        stop = min(len(job.tokens), start + room)
        slots, copies = sequence.append(stop - start)
        assert not copies, "no sequence forks"
        return Piece(job, sequence, job.tokens[start:stop], slots, stop == len(job.tokens))

    def _preempt(self, job: Job) -> None:
        assert job.sequence is not None, "a job that runs has blocks"
        job.sequence.free()
        job.sequence = None
        job.preemptions += 1
        self.counts.preemptions += 1
        self.waiting.appendleft(job)
