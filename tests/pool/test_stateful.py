"""Anything that sequences may do, in any order, beside a plain dictionary of what each slot holds."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcore import contents
from tests.cases.pools import World

TOKENS = st.lists(st.integers(0, 1), max_size=9)
PICK = st.integers(0, 11)
running = precondition(lambda self: self.world.sequences)


class Machine(RuleBasedStateMachine):
    """Few tokens, small blocks and few of them, so that all of it meets."""

    @initialize(num_blocks=st.integers(6, 20), block_size=st.integers(1, 3), watermark=st.integers(0, 2))
    def begin(self, num_blocks, block_size, watermark):
        self.world = World(num_blocks, block_size, watermark)

    def pick(self, number):
        return self.world.sequences[number % len(self.world.sequences)]

    @rule(prompt=TOKENS, salt=st.sampled_from([None, None, 1]))
    def start(self, prompt, salt):
        self.world.start(prompt, salt)

    @running
    @rule(number=PICK, n=st.integers(0, 5))
    def append(self, number, n):
        self.world.append(self.pick(number), n)

    @running
    @rule(number=PICK, tokens=TOKENS)
    def write(self, number, tokens):
        self.world.write(self.pick(number), tokens)

    @running
    @rule(number=PICK, tokens=TOKENS)
    def go_on(self, number, tokens):
        self.world.go_on(self.pick(number), tokens)

    @running
    @rule(number=PICK)
    def fork(self, number):
        self.world.fork(self.pick(number))

    @running
    @rule(number=PICK, length=st.integers(0, 9))
    def truncate(self, number, length):
        self.world.truncate(self.pick(number), length)

    @running
    @rule(number=PICK)
    def free(self, number):
        self.world.free(self.pick(number))

    @rule(n=st.integers(0, 3))
    def allocate_or_give_back(self, n):
        self.world.allocate_or_give_back(n)

    @precondition(lambda self: any(s.table for s in self.world.sequences))
    @rule()
    def free_wrongly(self):
        self.world.free_wrongly(next(list(s.table) for s in self.world.sequences if s.table))

    @precondition(lambda self: len(self.world.texts.known) > 20)
    @rule()
    def forget(self):
        self.world.forget()

    @invariant()
    def check(self):
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.end()


def collide(monkeypatch, codes):
    """Has contents share a few hashes."""
    if codes is not None:
        monkeypatch.setattr(contents, "hash", lambda value: hash(value) % codes, raising=False)


@pytest.mark.parametrize("codes", [None, 3])
def test_sequences_of_a_pool(codes, monkeypatch):
    collide(monkeypatch, codes)
    options = settings(max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=options)


def a_day(world, steps, chance):
    """Steps of a server that is always full: prompts that begin alike, forks, drafts that are rejected, preemption."""
    prompts = [[chance.randrange(3) for _ in range(12)] for _ in range(4)]
    for _ in range(steps):
        some = chance.choice(world.sequences) if world.sequences else None
        tokens = [chance.randrange(3) for _ in range(chance.randrange(6))]
        match chance.choices(range(9), (24, 30, 10, 10, 10, 8, 6, 2, 0.1))[0]:
            case 0:
                prompt = chance.choice(prompts)[: chance.randrange(13)] + tokens
                world.start(prompt, chance.choice((None, None, 1)))
                world.go_on(world.sequences[-1], prompt[world.sequences[-1].num_shared :])
            case 1 if some:
                world.go_on(some, tokens)
            case 2 if some:
                world.append(some, len(tokens))
            case 3 if some:
                world.write(some, tokens)
            case 4 if some:
                world.fork(some)
                world.go_on(some, tokens)
            case 5 if some:
                world.truncate(some, max(0, some.length - 1 - len(tokens)))
                world.go_on(some, [chance.randrange(3) for _ in range(3)])
            case 6:
                world.allocate_or_give_back(chance.randrange(4))
            case 7 if some and some.table:
                world.free_wrongly(list(some.table))
            case 8:
                world.forget()
        world.check()


@pytest.mark.parametrize("codes", [None, 7])
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("num_blocks", [8, 32])
def test_a_server_that_is_always_full(num_blocks, block_size, codes, monkeypatch):
    collide(monkeypatch, codes)
    world = World(num_blocks, block_size, watermark=num_blocks // 16)
    a_day(world, 8000, random.Random(num_blocks + block_size))
    assert world.pool.statistics.evicted > 100
    assert world.copied > 50 or block_size == 1  # where each block is full
    assert world.shared > 100
    world.end()
