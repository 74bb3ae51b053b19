"""Sequence: the blocks of one sequence, and which slots its next tokens have."""

from array import array
from collections.abc import Hashable, Iterable

from kvcore.integers import integer, integers
from kvcore.pool import BlockPool


class Sequence:
    """A sequence of tokens in a cache: its row of block_tables, its seq_len, and the slots of its next tokens.

    A step of a model is `append`, which gives slots; the copies that it asks for; the call that writes the tokens to
    their slots; and `commit`, which says what the tokens were. Blocks that are full then are found by sequences that
    begin with the same tokens, so commit once the call is made that writes them, and make later ones read after it.

    Args:
        pool: Whose blocks it takes, and gives back with `free`.
        prompt: Tokens that it will begin with. Blocks that hold a beginning of them become its own, too: it has
            `num_shared` tokens, and the others are still to be appended. That is the last one at least, since a model
            makes the next token from its output. It holds these blocks from now on, until `free`.
        salt: What else keys and values depend on, as an adapter's name: only sequences with an equal one share blocks.

    Attributes:
        table: Its blocks, in order: a row of block_tables. To be read only, as are the others.
        length: Tokens that have a slot.
        tokens: Of these, the ones that were committed.
        num_shared: Of these, the ones at the beginning that were in the cache already.

    Raises:
        TypeError: pool is none, prompt holds no integers, or salt cannot be hashed.

    Example:
        >>> pool, prompt = BlockPool(num_blocks=8, block_size=4), [5, 3, 8, 1, 2, 9]
        >>> first = Sequence(pool, prompt)
        >>> first.append(6)  # slots, and blocks to be copied
        ([0, 1, 2, 3, 4, 5], [])
        >>> first.commit(prompt)  # written
        >>> second = Sequence(pool, prompt)
        >>> second.num_shared, second.append(2)
        (4, ([8, 9], []))
        >>> third = first.fork()
        >>> third.append(1)  # to the block that both have: it goes on in a copy of block 1
        ([14], [(1, 3)])
        >>> first.table, second.table, third.table
        ([0, 1], [0, 2], [0, 3])
    """

    def __init__(self, pool: BlockPool, prompt: Iterable[int] = (), *, salt: Hashable = None) -> None:
        if not isinstance(pool, BlockPool):
            raise TypeError(f"pool must be a BlockPool, got {pool!r}")
        known = integers("prompt", prompt)
        try:
            hash(salt)
        except TypeError as error:
            raise TypeError(f"salt must be hashable, got {salt!r}") from error
        self._pool, self._salt, self._generation = pool, salt, pool.generation
        self._prompt_tokens: int | None = len(known)  # until they are counted
        self._freed, self._size = False, pool.block_size
        self.table = pool.match(known[:-1], salt)
        self.num_shared = self.length = len(self.table) * self._size
        self.tokens = known[: self.length]
        self._packed: array[int] = array("i")
        self._packed_from: list[int] = []

    def append(self, n: int = 1) -> tuple[list[int], list[tuple[int, int]]]:
        """Takes slots for the next n tokens, which may be unknown yet.

        With the first call the sequence begins to run: it leaves the pool's watermark, and its prompt counts for the
        hit rate.

        Returns:
            The slots, for slot_mapping; and source and destination of each block that is to be copied first, because
            another sequence has it, too: for `copy_blocks`.

        Raises:
            OutOfBlocks: too few blocks are free. The call has changed nothing: what the sequence had before, it has
                still, also blocks that it found when it was made. `free` it if it will not be tried again.
            ValueError: n is negative, or the sequence is freed.
            TypeError: n is no integer.
        """
        self._check()
        start, admit = self.length, self._prompt_tokens is not None
        copies = self._pool.append(self.table, start, n, admit=admit)
        if self._prompt_tokens is not None:
            self._pool.count_prompt(self._prompt_tokens, self.num_shared)
            self._prompt_tokens = None
        self.length = start + int(n)
        if n == 1:
            return [self.table[-1] * self._size + start % self._size], copies
        return self._slots(start, self.length), copies

    def commit(self, tokens: Iterable[int]) -> None:
        """Says what the first tokens were that have slots and were not committed before.

        Raises:
            ValueError: there are more tokens than such slots, or the sequence is freed. Nothing has changed.
            TypeError: tokens holds no integers.
        """
        self._check()
        new, known = integers("tokens", tokens), len(self.tokens)
        if known + len(new) > self.length:
            raise ValueError(f"tokens must be at most {self.length - known}, which have slots, got {len(new)}")
        self.tokens += new
        start = known // self._size
        if start < len(self.tokens) // self._size and self._generation == self._pool.generation:
            self._pool.remember(self.table, self.tokens, start, self._salt)

    def slots(self, start: int = 0, stop: int | None = None) -> list[int]:
        """The slots of its positions from start to stop; None: to its length.

        Raises:
            ValueError: start or stop is none of its positions, or they are in the wrong order.
            TypeError: they are no integers.
        """
        stop = self.length if stop is None else integer("stop", stop, 0)
        start = integer("start", start, 0)
        if stop > self.length:
            raise ValueError(f"stop must be at most {self.length}, the sequence's length, got {stop}")
        if start > stop:
            raise ValueError(f"start must be at most stop, {stop}, got {start}")
        return self._slots(start, stop)

    def fork(self) -> "Sequence":
        """Another sequence with the committed tokens of this one, in the same blocks.

        Which of the two goes on first in a block that is not full does so in a copy; `append` says so.

        Raises:
            ValueError: the sequence is freed.
        """
        self._check()
        new = Sequence(self._pool, salt=self._salt)
        new.tokens, new.length = list(self.tokens), len(self.tokens)
        new.num_shared, new._generation, new._prompt_tokens = new.length, self._generation, None
        new.table = self._pool.fork(self.table[: -(-new.length // self._size)])
        return new

    def truncate(self, length: int) -> None:
        """Drops all tokens but the first, as draft tokens that were rejected. Blocks that are left empty are freed.

        Raises:
            ValueError: it is longer than the sequence, or negative, or the sequence is freed.
            TypeError: length is no integer.
        """
        self._check()
        length = integer("length", length, 0)
        if length > self.length:
            raise ValueError(f"length must be at most {self.length}, the sequence's, got {length}")
        count = -(-length // self._size)
        if count < len(self.table):
            self._pool.free(self.table[count:])
            del self.table[count:]
        del self.tokens[length:]
        self.length, self.num_shared = length, min(self.num_shared, length)

    def free(self) -> None:
        """Gives all blocks back. Of the sequence, `tokens` are left: a prompt with which another can go on.

        A token that was sampled and not yet committed is not among them: append it to that prompt.

        Raises:
            ValueError: the sequence is freed already.
        """
        self._check()
        self._pool.free(self.table)
        self.table, self.length, self.num_shared, self._freed = [], 0, 0, True

    def _packed_table(self) -> array[int]:
        """The table as integers of 32 bits, for `ragged_batch`; to be read only, and before the next call.

        Kept, as a step of decoding changes few blocks of many: only those that are new since the last call are packed.
        """
        table, packed, known = self.table, self._packed, self._packed_from
        if table != known:
            same = len(known) if table[: len(known)] == known else 0
            del packed[same:]
            packed.extend(table[same:])
            self._packed_from = list(table)
        return packed

    def _slots(self, start: int, stop: int) -> list[int]:
        size, table, found = self._size, self.table, []
        while start < stop:
            place = start % size
            slot, count = table[start // size] * size + place, min(size - place, stop - start)
            found += range(slot, slot + count)
            start += count
        return found

    def _check(self) -> None:
        if self._freed:
            raise ValueError("sequence must not be freed, got one that is")

    def __repr__(self) -> str:
        return f"Sequence({self.length} tokens, {self.num_shared} of them shared, blocks {self.table})"
