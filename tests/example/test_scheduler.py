"""The scheduler of continuous batching, with a model that is a hash: no framework takes part."""

import subprocess
import sys

import pytest

from examples.llama import scheduler as module
from examples.llama.scheduler import Request, Scheduler
from examples.llama.simulation import HashModel, alone, check_books, check_step, simulate
from kvcore.pool import BlockPool
from kvcore.sequence import Sequence
from tests.cases.processes import ROOT


def request(number, length, new=4, first=1):
    return Request(number, tuple(range(first, first + length)), new)


def start(num_blocks=32, num_seqs=4, num_tokens=8, context=64, watermark=0):
    """A scheduler of blocks of 4 slots, and its model."""
    pool = BlockPool(num_blocks, 4, watermark=watermark, seed=0)
    return Scheduler(pool, num_seqs, num_tokens, context), HashModel(pool)


def step(scheduler, model):
    """Runs a step; returns number and tokens of each piece."""
    pieces = scheduler.schedule()
    check_step(scheduler, pieces)
    scheduler.update(pieces, model.run(pieces))
    check_books(scheduler)
    return [(piece.job.request.number, len(piece.tokens)) for piece in pieces]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thousands_of_steps_keep_every_rule(seed):
    result = simulate(10_000, seed)
    assert result.steps >= 10_000
    assert min(result.preemptions, result.evicted) > 200
    assert result.hit_rate > 0.1


def test_prompts_come_in_chunks_beside_answers():
    scheduler, model = start()
    for number, length in enumerate((3, 20, 2)):
        scheduler.add(request(number, length, first=10 * number + 1))
    steps = [step(scheduler, model) for _ in range(4)]
    # Request 0 decodes on while the long prompt takes what it leaves; request 2 waits until there is room.
    assert steps == [[(0, 3), (1, 5)], [(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 1), (2, 2)]]
    assert scheduler.running[0].request.number == 1


def test_each_one_that_runs_has_a_token_in_each_step():
    scheduler, model = start(num_seqs=4, num_tokens=4)
    for number in range(4):
        scheduler.add(request(number, 6, new=8, first=10 * number + 1))
    assert [sum(count for _, count in step(scheduler, model)) for _ in range(8)] == [4] * 8
    assert len(scheduler.running) == 4
    assert step(scheduler, model) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_the_youngest_loses_its_blocks_and_goes_on_where_it_was():
    scheduler, model = start(num_blocks=6, num_seqs=3, num_tokens=16)
    jobs = [scheduler.add(request(number, 7, new=9, first=10 * number + 1)) for number in range(3)]
    while scheduler.busy:
        step(scheduler, model)
    assert [job.preemptions for job in jobs] == [0, 0, 1] or jobs[2].preemptions > jobs[1].preemptions >= 0
    assert scheduler.counts.preemptions == sum(job.preemptions for job in jobs) > 0
    assert [job.answer for job in jobs] == [alone(job.request) for job in jobs]
    assert scheduler.pool.statistics.shared_tokens > 0  # its own blocks, found again
    assert scheduler.pool.num_free == 6


@pytest.mark.parametrize("watermark", [0, 1])
def test_a_prompt_waits_until_all_of_it_fits(watermark):
    scheduler, model = start(num_blocks=8, watermark=watermark)
    scheduler.add(request(0, 8, new=5))
    scheduler.add(request(1, 20, first=50))  # 5 blocks, which are free while request 0 has 3
    steps = [step(scheduler, model) for _ in range(6)]
    if watermark:
        assert steps == [[(0, 8)], *[[(0, 1)]] * 4, [(1, 8)]]
    else:
        assert steps[:2] == [[(0, 8)], [(0, 1), (1, 7)]]


def test_prompts_that_begin_alike_share_blocks():
    scheduler, model = start(num_tokens=32)
    scheduler.add(request(0, 18))
    step(scheduler, model)
    scheduler.add(request(1, 18))
    assert step(scheduler, model) == [(0, 1), (1, 2)]
    first, second = (job.sequence.table for job in scheduler.running)
    assert first[:4] == second[:4]
    assert first[4] != second[4]


def test_an_answer_ends_where_the_model_says_so():
    scheduler, model = start()
    scheduler.stop_ids = (alone(request(0, 5, new=1))[0],)
    ended, whole = scheduler.add(request(0, 5, new=3)), scheduler.add(request(1, 3, new=1, first=30))
    step(scheduler, model)
    assert (ended.finish, len(ended.answer)) == ("stop", 1)
    assert (whole.finish, len(whole.answer)) == ("length", 1)
    assert not scheduler.busy
    assert scheduler.schedule() == []
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


@pytest.mark.parametrize(
    ("length", "new", "message"),
    [
        (0, 1, "a prompt must have at least one token, got an empty one"),
        (3, 0, "max_new_tokens must be at least 1, got 0"),
        (60, 5, r"prompt and max_new_tokens must fit a context of 64 tokens, got 60 \+ 5"),
    ],
)
def test_requests_that_cannot_be_answered(length, new, message):
    scheduler, _ = start()
    with pytest.raises(ValueError, match=message):
        scheduler.add(request(0, length, new))
    assert not scheduler.busy
    scheduler.add(request(0, 60, 4))


def test_requests_larger_than_the_pool():
    scheduler, model = start(num_blocks=4, watermark=1)
    with pytest.raises(ValueError, match=r"prompt and max_new_tokens must fit 12 slots, got 10 \+ 4"):
        scheduler.add(request(0, 10, 4))
    job = scheduler.add(request(0, 10, 3))  # the last token needs no slot
    while scheduler.busy:
        step(scheduler, model)
    assert len(job.answer) == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_seqs": 0}, "num_seqs must be at least 1, got 0"),
        ({"num_seqs": 9}, "num_tokens must be at least num_seqs, 9, got 8"),
    ],
)
def test_steps_without_room(sizes, message):
    with pytest.raises(ValueError, match=message):
        start(**sizes)


def wrong_commit(self, tokens):
    Sequence.commit(self, [token % 7 for token in tokens])


def wrong_append(self, n=1):
    slots, copies = Sequence.append(self, n)
    return [slot ^ 1 for slot in slots], copies


def wrong_free(self):
    self._pool.fork(self.table[:1])
    Sequence.free(self)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("commit", wrong_commit, "what is committed is what the job has"),
        ("append", wrong_append, "in place of"),
        ("free", wrong_free, "no block is lost"),
    ],
)
def test_the_simulation_sees_what_goes_wrong(method, wrong, message, monkeypatch):
    faulty = type("Faulty", (Sequence,), {method: wrong})
    monkeypatch.setattr(module, "CachedSequence", faulty)
    with pytest.raises(AssertionError, match=message):
        simulate(2000)


def test_it_needs_no_framework():
    program = (
        "import sys; from examples.llama.simulation import simulate; simulate(50); "
        "print(*{'jax', 'torch', 'numpy', 'jaxkv', 'torchkv'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("\n", "")
