"""BlockPool: which blocks of a cache are free, which are held, by how many, and which hold what. On the host only.

A block is

    held        by one or several sequences, or by whoever allocated it
    cached      by nobody, but it keeps the keys and values of a known text, for sequences that begin with it
    empty       by nobody, and nothing in it can be found

Cached and empty blocks are free: `allocate` takes empty ones first, then the cached one that was given back first.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from secrets import randbits

from kvcore.contents import Contents
from kvcore.integers import integer
from kvcore.pool_statistics import PoolStatistics


class OutOfBlocks(RuntimeError):  # noqa: N818, what a server expects, then waits or preempts
    """Fewer blocks are free than were asked for. The call has changed nothing, and freed nothing.

    Attributes:
        asked: Blocks that were asked for.
        free: Blocks that are free.
        kept: Of these, blocks that the watermark keeps; 0 for sequences that run already.
        hint: What the message ends with, from who knows how many blocks there are and why.
    """

    hint = ""

    def __init__(self, asked: int, free: int, kept: int = 0) -> None:
        super().__init__(asked, free, kept)
        self.asked, self.free, self.kept = asked, free, kept

    def __str__(self) -> str:
        kept = f", {self.kept} of them kept by the watermark" if self.kept else ""
        asked = "1 block was" if self.asked == 1 else f"{self.asked} blocks were"
        return f"{asked} asked for, {self.free} {'is' if self.free == 1 else 'are'} free{kept}{self.hint}"


class BlockPool:
    """The blocks of a cache, handed out and taken back. Knows numbers only: the cache itself is never touched.

    Each operation takes the same time for a block however many there are. Not for several threads at once.

    Args:
        num_blocks: Blocks of the cache, per layer.
        block_size: Slots per block.
        watermark: Blocks that `allocate`, and the first `append` of a `Sequence`, leave free, so that sequences that
            run already can grow.
        seed: Where hashes of contents begin. None: a new one, which nobody can foresee.
        prefix_caching: Whether blocks keep what they hold, for others to share. Forks share blocks either way.

    Raises:
        ValueError: a number is too small, or the watermark leaves no block.
        TypeError: a number is no integer.

    Example:
        >>> pool = BlockPool(num_blocks=8, block_size=16)
        >>> blocks = pool.allocate(3)
        >>> blocks, pool.num_free
        ([0, 1, 2], 5)
        >>> pool.free(blocks)
        >>> pool.num_free
        8
        >>> pool.allocate(9)
        Traceback (most recent call last):
        kvcore.pool.OutOfBlocks: 9 blocks were asked for, 8 are free
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        watermark: int = 0,
        seed: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.num_blocks = integer("num_blocks", num_blocks, 1)
        self.block_size = integer("block_size", block_size, 1)
        self.watermark = integer("watermark", watermark, 0)
        if self.watermark >= self.num_blocks:
            raise ValueError(f"watermark must be below {self.num_blocks}, the number of blocks, got {self.watermark}")
        self.prefix_caching = prefix_caching
        self.generation = 0
        seed = randbits(62) if seed is None else integer("seed", seed)
        self._contents = Contents(self.num_blocks, self.block_size, seed)
        self._holders = [0] * self.num_blocks
        self._empty = list(range(self.num_blocks - 1, -1, -1))  # the next is last
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted is first
        self._evicted = self._prompt_tokens = self._shared_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return len(self._empty) + len(self._cached)

    @property
    def statistics(self) -> PoolStatistics:
        """Where the blocks are now, and what was shared so far."""
        cached, empty, asked, shared = len(self._cached), len(self._empty), self._prompt_tokens, self._shared_tokens
        used = self.num_blocks - cached - empty
        return PoolStatistics(
            self.num_blocks, used, cached, empty, self._evicted, asked, shared, shared / asked if asked else 0.0
        )

    def allocate(self, n: int) -> list[int]:
        """Takes n free blocks. Nothing is in them that anyone may rely on.

        Raises:
            OutOfBlocks: fewer are free, the watermark's left out. Nothing has changed.
            ValueError: n is negative.
            TypeError: n is no integer.
        """
        return self._take(integer("n", n, 0), self.watermark)

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back, the last first: of a table, the first blocks are kept longest, which most others share.

        A block that others hold, too, stays with them.

        Raises:
            ValueError: a block is none of the pool, or is not held, or is given more often than it is held. Nothing
                has changed.
            TypeError: a block is no integer.
        """
        blocks, holders = self._check_held("blocks", blocks), self._holders
        if len(set(blocks)) < len(blocks):
            for block, times in Counter(blocks).items():
                if times > holders[block]:
                    raise ValueError(f"blocks must have block {block} at most {holders[block]} times, got {times}")
        for block in reversed(blocks):
            holders[block] -= 1
            if not holders[block]:
                self._give_back(block)

    def fork(self, blocks: Iterable[int]) -> list[int]:
        """Makes the caller another holder of blocks, and returns them. Who writes to one next gets a copy, by `append`.

        Raises:
            ValueError: a block is none of the pool, or nobody holds it. Nothing has changed.
            TypeError: a block is no integer.
        """
        blocks = self._check_held("blocks", blocks)
        for block in blocks:
            self._holders[block] += 1
        return blocks

    def append(self, table: list[int], length: int, n: int = 1, *, admit: bool = False) -> list[tuple[int, int]]:
        """Has a table hold n tokens more than the `length` that are in it, in blocks that nobody else sees.

        Blocks are added at its end. A block of it that will be written to and has other holders is replaced.

        Args:
            table: Blocks of a sequence, in its order, changed in place.
            length: Tokens that it has.
            n: Tokens to come.
            admit: Whether the sequence is a new one, for which the watermark counts.

        Returns:
            Source and destination of each block that is to be copied before anything is written: for `copy_blocks`.

        Raises:
            OutOfBlocks: too few are free. Nothing has changed.
            ValueError: a number is negative, length more than the table holds, or a block to be written is not held.
            TypeError: a number is no integer.
        """
        size, holders = self.block_size, self._holders
        if type(length) is not int or type(n) is not int or length < 0 or n < 0:
            length, n = integer("length", length, 0), integer("n", n, 0)
        if length > len(table) * size:
            raise ValueError(f"length must be at most {len(table) * size}, the slots of the table, got {length}")
        if not n:
            return []
        first, stop = length // size, -(-(length + n) // size)
        if stop == first + 1 == len(table):  # in the last block, as most steps of decoding
            block = table[first]
            if type(block) is int and 0 <= block < self.num_blocks and holders[block] == 1:
                self._contents.drop(block)
                return []
        written = self._check_held("table", table[first:stop], first) if first < len(table) else []
        shared = [first + i for i, block in enumerate(written) if holders[block] > 1]
        needed = len(shared) + max(0, stop - len(table))
        new = self._take(needed, self.watermark if admit else 0) if needed else []
        for block in written:
            if holders[block] == 1:  # the caller's own, which is overwritten
                self._contents.drop(block)
        copies = []
        for i, block in zip(shared, new, strict=False):
            copies.append((table[i], block))
            holders[table[i]] -= 1
            table[i] = block
        table += new[len(shared) :]
        return copies

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> list[int]:
        """The blocks that hold the beginning of a text already, of which the caller becomes another holder.

        Args:
            tokens: The text, from its first token on.
            salt: What else the contents depend on. Only what was remembered with an equal one is found.

        Returns:
            Blocks of its first tokens, in order: full ones, as many as are found without a gap.
        """
        blocks = self._contents.match(tokens, salt)
        for block in blocks:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1
        return blocks

    def remember(self, table: Sequence[int], tokens: Sequence[int], start: int = 0, salt: Hashable = None) -> None:
        """Says what the full blocks of a table hold, so that others share them: `match` finds them from now on.

        Of two blocks with one content, one is found; the other stays its holder's.

        Args:
            table: Blocks of a sequence, in its order.
            tokens: All its tokens. Those that do not fill a block are left out.
            start: How many blocks at the beginning were remembered before.
            salt: What else the contents depend on.

        Raises:
            ValueError: the table has fewer slots than there are tokens, or a block is not held.
        """
        slots = len(table) * self.block_size
        if len(tokens) > slots:
            raise ValueError(f"tokens must be at most {slots}, the slots of the table, got {len(tokens)}")
        self._check_held("table", table[start : len(tokens) // self.block_size], start)
        if self.prefix_caching:
            self._contents.remember(table, tokens, start, salt)

    def forget(self) -> None:
        """Has nothing found any more that was written so far, as after a change of the model's weights.

        Sequences keep their blocks, which are not shared with new ones.
        """
        self.generation += 1
        self._contents.clear()
        self._empty.extend(reversed(self._cached))
        self._cached.clear()

    def count_prompt(self, tokens: int, shared: int) -> None:
        """Counts a prompt for the hit rate: its tokens, and those of them that were there."""
        self._prompt_tokens += tokens
        self._shared_tokens += shared

    def _take(self, n: int, kept: int) -> list[int]:
        """Takes n free blocks, empty ones first; `kept` is what must stay free."""
        empty, cached = self._empty, self._cached
        free = len(empty) + len(cached)
        if n > max(0, free - kept):
            raise OutOfBlocks(n, free, min(kept, free))
        first = max(0, len(empty) - n)
        taken = empty[first:]
        del empty[first:]
        taken.reverse()
        self._evicted += n - len(taken)
        for _ in range(n - len(taken)):
            block, _ = cached.popitem(last=False)
            self._contents.drop(block)
            taken.append(block)
        for block in taken:
            self._holders[block] = 1
        return taken

    def _give_back(self, block: int) -> None:
        """Frees a block that nobody holds any more."""
        if self._contents.keep(block):
            self._cached[block] = None
        else:
            self._empty.append(block)

    def _check_held(self, name: str, blocks: Iterable[int], first: int = 0) -> list[int]:
        """Blocks as Python's integers; `first` is the index of the first of them in what errors call `name`.

        Raises:
            ValueError: one is none of the pool, or nobody holds it.
            TypeError: one is no integer.
        """
        checked, holders, num_blocks = [], self._holders, self.num_blocks
        for i, block in enumerate(blocks, first):
            if type(block) is not int:
                block = integer(f"{name}[{i}]", block)
            if not 0 <= block < num_blocks:
                raise ValueError(f"{name}[{i}] must be at least 0 and below {num_blocks}, got {block}")
            if not holders[block]:
                raise ValueError(f"{name}[{i}] must be a block that is held, got {block}, which is free")
            checked.append(block)
        return checked

    def __repr__(self) -> str:
        now = self.statistics
        return (
            f"BlockPool({self.num_blocks} blocks × {self.block_size} slots, {now.used} used, {now.cached} cached, "
            f"hit rate {now.hit_rate:.2f})"
        )
