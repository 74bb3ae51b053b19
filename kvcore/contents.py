"""What the full blocks of a cache hold: found by hash, so that sequences with the same beginning share it.

What a block holds depends on its own tokens and on all before them, so that contents are a tree, and the path to a node
is the text. A content is found by its hash, which covers its parent's; then parent and tokens are compared, and of two
contents with one hash only the first is kept. So nothing wrong is ever shared, whatever collides.
"""

from collections.abc import Hashable, Sequence
from weakref import WeakValueDictionary


class Content:
    """What a full block holds: its tokens, after those of its parent. Lives while a block has it, or a child.

    Attributes:
        parent: What the block before holds; None for a root, of which there is one for each salt.
        tokens: Of the block; a root's salt.
        code: The hash.
        block: The block in which it is found; None where that was taken for something else.
    """

    __slots__ = ("__weakref__", "block", "code", "parent", "tokens")

    def __init__(self, parent: "Content | None", tokens: tuple[Hashable, ...], code: int) -> None:
        self.parent, self.tokens, self.code = parent, tokens, code
        self.block: int | None = None


class Contents:
    """Which block holds what, and in which block a text is found.

    Args:
        num_blocks: Blocks of the cache.
        block_size: Slots per block.
        seed: Where hashes begin.
    """

    def __init__(self, num_blocks: int, block_size: int, seed: int) -> None:
        self._block_size, self._seed = block_size, seed
        self._of: list[Content | None] = [None] * num_blocks
        self._by_code: WeakValueDictionary[int, Content] = WeakValueDictionary()

    def match(self, tokens: Sequence[int], salt: Hashable) -> list[int]:
        """Blocks that hold the first tokens of a text, in order: full ones, as many as are found without a gap."""
        size, blocks = self._block_size, []
        content = self._find(None, (salt,))
        for start in range(0, len(tokens) - size + 1, size):
            if content is not None:
                content = self._find(content, tuple(tokens[start : start + size]))
            if content is None or content.block is None:
                break
            blocks.append(content.block)
        return blocks

    def remember(self, table: Sequence[int], tokens: Sequence[int], start: int, salt: Hashable) -> None:
        """Says what the blocks of a table hold, from the one with index `start` on to the last full one."""
        size = self._block_size
        content = self._of[table[start - 1]] if start else self._find(None, (salt,), create=True)
        for i in range(start, len(tokens) // size):
            if content is not None:  # else what comes before cannot be found
                content = self._find(content, tuple(tokens[i * size : (i + 1) * size]), create=True)
            if content is None:
                return
            block = table[i]
            if self._of[block] is not content:
                self.drop(block)
                self._of[block] = content
            if content.block is None:
                content.block = block

    def keep(self, block: int) -> bool:
        """Whether a block that nobody holds any more is one in which something is found."""
        content = self._of[block]
        if content is None:
            return False
        if content.block is None:  # the one in which it was found is gone
            content.block = block
        if content.block != block:
            self._of[block] = None
        return content.block == block

    def drop(self, block: int) -> None:
        """Has nobody find what a block holds."""
        content = self._of[block]
        if content is not None:
            self._of[block] = None
            if content.block == block:
                content.block = None

    def clear(self) -> None:
        """Has nobody find anything."""
        self._of = [None] * len(self._of)
        self._by_code.clear()

    def _find(self, parent: Content | None, tokens: tuple[Hashable, ...], create: bool = False) -> Content | None:
        """The content of these tokens after the parent's; None where there is none, or where another has its hash."""
        code = hash((self._seed if parent is None else parent.code, tokens))
        found = self._by_code.get(code)
        if found is None:
            if create:
                found = self._by_code[code] = Content(parent, tokens, code)
            return found
        return found if found.parent is parent and found.tokens == tokens else None
