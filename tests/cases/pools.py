"""A cache and its sequences, beside a BlockPool, as plain lists: what each slot holds, and who holds each block."""

from collections import Counter

import pytest

from kvcore.pool import BlockPool, OutOfBlocks
from kvcore.sequence import Sequence

POISON = -1


def remembered(pool, *texts):
    """Tables of texts that were written and given back, in this order. Each is of full blocks."""
    tables = []
    for text in texts:
        tables.append(pool.allocate(len(text) // pool.block_size))
        pool.remember(tables[-1], text)
    for table in tables:
        pool.free(table)
    return tables


class Texts:
    """A number for each text: what keys and values depend on, namely a token and all tokens before it."""

    def __init__(self):
        self.known = {}

    def of(self, salt, tokens):
        """The number of each beginning of a text."""
        text, found = ("salt", salt), []
        for token in tokens:
            text = self.known.setdefault((text, token), len(self.known))
            found.append(text)
        return found


class World:
    """Sequences of a pool, in a cache whose slots hold numbers of texts. Each method checks what its call did."""

    def __init__(self, num_blocks, block_size, watermark=0):
        self.pool = BlockPool(num_blocks, block_size, watermark=watermark, seed=0)
        self.slots = [POISON] * (num_blocks * block_size)
        self.texts = Texts()
        self.sequences, self.salts, self.raw = [], {}, []
        self.shared = self.copied = 0  # tokens that were there, and blocks that were copied

    # ---- what is done

    def start(self, prompt, salt):
        sequence = Sequence(self.pool, prompt, salt=salt)
        shared, size = sequence.num_shared, self.pool.block_size
        assert shared % size == 0
        assert shared <= max(0, len(prompt) - 1)
        assert sequence.tokens == prompt[:shared]
        self.add(sequence, salt)
        self.shared += shared

    def append(self, sequence, n):
        """Whether there were blocks for n more tokens."""
        before, out = self.state(), None
        try:
            slots, copies = sequence.append(n)
        except OutOfBlocks as error:
            out = error
        if out is not None:
            assert self.state() == before
            assert out.free == self.pool.num_free < out.asked + out.kept
            return False
        moved = [(d, self.of_block(s)) for s, d in copies]  # all are read before any is written
        for block, contents in moved:
            self.fill(block, contents)
        start = sequence.length - n
        assert slots == [self.slot(sequence, position) for position in range(start, start + n)]
        held = self.held()
        assert all(held[slot // self.pool.block_size] == 1 for slot in slots)
        self.copied += len(copies)
        return True

    def write(self, sequence, tokens):
        """Writes and commits as many of these tokens as have slots."""
        known = len(sequence.tokens)
        tokens = tokens[: sequence.length - known]
        texts = self.texts.of(self.salts[id(sequence)], [*sequence.tokens, *tokens])
        for position in range(known, known + len(tokens)):
            self.slots[self.slot(sequence, position)] = texts[position]
        sequence.commit(tokens)

    def go_on(self, sequence, tokens):
        """Appends and writes; where blocks run out, the oldest sequence is preempted."""
        if self.append(sequence, len(tokens)):
            self.write(sequence, tokens)
        else:
            self.free(self.sequences[0])

    def fork(self, sequence):
        child = sequence.fork()
        assert child.tokens == sequence.tokens
        assert child.tokens is not sequence.tokens
        self.add(child, self.salts[id(sequence)])

    def truncate(self, sequence, length):
        sequence.truncate(min(length, sequence.length))

    def free(self, sequence):
        sequence.free()
        self.sequences.remove(sequence)
        del self.salts[id(sequence)]

    def allocate(self, n):
        if n > max(0, self.pool.num_free - self.pool.watermark):
            before = self.state()
            with pytest.raises(OutOfBlocks) as error:
                self.pool.allocate(n)
            assert self.state() == before
            assert (error.value.asked, error.value.free) == (n, self.pool.num_free)
            return
        blocks = self.pool.allocate(n)
        assert len(blocks) == len(set(blocks)) == n
        held = self.held()
        for block in blocks:
            assert not held[block]
            self.fill(block, [POISON] * self.pool.block_size)
        self.raw.append(blocks)

    def allocate_or_give_back(self, n):
        if len(self.raw) < 2:
            self.allocate(n)
        else:
            self.give_back(self.raw[0])

    def give_back(self, blocks):
        self.pool.free(blocks)
        self.raw.remove(blocks)

    def free_wrongly(self, blocks):
        """Frees blocks of which the last is free, foreign, or given more often than it is held."""
        held, before = self.held(), self.state()
        wrong = [b for b in range(self.pool.num_blocks) if not held[b]] or [self.pool.num_blocks]
        for bad in ([*blocks, wrong[0]], [*blocks, -1], blocks + blocks[-1:] * held[blocks[-1]]):
            with pytest.raises(ValueError, match="must"):
                self.pool.free(bad)
            assert self.state() == before

    def forget(self):
        self.pool.forget()
        assert self.pool.statistics.cached == 0
        # As if written by another model: sequences that run keep what they have.
        for sequence in self.sequences:
            self.salts[id(sequence)] = ("old", self.salts[id(sequence)])
        self.slots = [POISON] * len(self.slots)
        for sequence in self.sequences:
            for position, text in enumerate(self.texts.of(self.salts[id(sequence)], sequence.tokens)):
                self.slots[self.slot(sequence, position)] = text

    # ---- what must hold

    def check(self):
        """No block is lost or in hands that do not share it, and each sequence has what it wrote, or shares."""
        held = self.held()
        now = self.pool.statistics
        assert now.used == len(held) == self.pool.num_blocks - self.pool.num_free
        assert (now.used + now.cached + now.empty, now.cached + now.empty) == (now.num_blocks, self.pool.num_free)
        for blocks in self.raw:
            assert all(held[block] == 1 for block in blocks)
        for sequence in self.sequences:
            texts = self.texts.of(self.salts[id(sequence)], sequence.tokens)
            assert texts == [self.slots[self.slot(sequence, p)] for p in range(len(texts))]
            assert len(sequence.table) == -(-sequence.length // self.pool.block_size)

    def end(self):
        """Gives all back, and takes all."""
        for sequence in list(self.sequences):
            self.free(sequence)
            self.check()
        for blocks in list(self.raw):
            self.give_back(blocks)
        assert self.pool.num_free == self.pool.num_blocks
        rest = self.pool.allocate(self.pool.num_blocks - self.pool.watermark)
        assert len(set(rest)) == len(rest)
        contents = self.pool._contents
        uses = Counter(id(content) for content in contents._of if content is not None)
        uses.update(id(content.parent) for content in contents._by_code.values())
        assert all(content.uses == uses[id(content)] > 0 for content in contents._by_code.values())

    # ---- how

    def add(self, sequence, salt):
        self.sequences.append(sequence)
        self.salts[id(sequence)] = salt

    def slot(self, sequence, position):
        size = self.pool.block_size
        return sequence.table[position // size] * size + position % size

    def held(self):
        """How many hold each block that anyone holds."""
        return Counter(b for table in [*self.raw, *(s.table for s in self.sequences)] for b in table)

    def state(self):
        tables = [(list(s.table), s.length, list(s.tokens), s.num_shared) for s in self.sequences]
        return tables, [list(blocks) for blocks in self.raw], self.pool.statistics

    def of_block(self, block):
        size = self.pool.block_size
        return self.slots[block * size : (block + 1) * size]

    def fill(self, block, contents):
        size = self.pool.block_size
        self.slots[block * size : (block + 1) * size] = contents
