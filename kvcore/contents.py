"""What the full blocks of a cache hold: found by hash, so that sequences with the same beginning share it.

What a block holds depends on its own tokens and on all before them, so that contents are a tree, and the path to a node
is the text. A content is found by its hash, which covers its parent's; then parent and tokens are compared, and of two
contents with one hash only the first is kept. So nothing wrong is ever shared, whatever collides.
"""

from collections.abc import Hashable, Sequence


class Content:
    """What a full block holds: its tokens, after those of its parent. Known while a block has it, or a child.

    Attributes:
        parent: What the block before holds; None for a root, of which there is one for each salt.
        tokens: Of the block; a root's salt.
        code: The hash.
        block: The block in which it is found; None where that was taken for something else.
        uses: Blocks that have it, and children.
    """

    __slots__ = ("block", "code", "parent", "tokens", "uses")

    def __init__(self, parent: "Content | None", tokens: tuple[Hashable, ...], code: int) -> None:
        self.parent, self.tokens, self.code = parent, tokens, code
        self.block: int | None = None
        self.uses = 0


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
        self._by_code: dict[int, Content] = {}

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
        size, of = self._block_size, self._of
        stop = len(tokens) // size
        if start >= stop:
            return
        parent = of[table[start - 1]] if start else self._find(None, (salt,), create=True)
        for i in range(start, stop):
            if parent is None:  # what comes before cannot be found
                return
            content = self._find(parent, tuple(tokens[i * size : (i + 1) * size]), create=True)
            if content is None:
                self._release(parent, 0)  # a root that was made for nothing
                return
            block = table[i]
            if of[block] is not content:
                self.drop(block)
                of[block] = content
                content.uses += 1
            if content.block is None:
                content.block = block
            parent = content

    def keep(self, block: int) -> bool:
        """Whether a block that nobody holds any more is one in which something is found."""
        content = self._of[block]
        if content is None:
            return False
        if content.block is None:  # the one in which it was found is gone
            content.block = block
        if content.block == block:
            return True
        self._of[block] = None
        self._release(content)
        return False

    def drop(self, block: int) -> None:
        """Has nobody find what a block holds."""
        content = self._of[block]
        if content is not None:
            self._of[block] = None
            if content.block == block:
                content.block = None
            self._release(content)

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
                if parent is not None:
                    parent.uses += 1
            return found
        return found if found.parent is parent and found.tokens == tokens else None

    def _release(self, content: Content | None, uses: int = 1) -> None:
        """Takes uses from a content, which ends with the last of them, as its parent may then."""
        while content is not None:
            content.uses -= uses
            if content.uses:
                return
            del self._by_code[content.code]
            content, uses = content.parent, 1
