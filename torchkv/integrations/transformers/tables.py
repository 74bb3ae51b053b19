"""Whose blocks are whose: block tables that grow with the sequences, and fixed ones for compiled code."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcore.choices import TorchBackend
from kvcore.pool import BlockPool, OutOfBlocks
from torchkv.integrations.transformers.handle import UnsupportedError
from torchkv.integrations.transformers.masks import COUNTS, require
from torchkv.integrations.transformers.steps import Step, make_step

PADDED = "attention_mask must be given, as the cache holds padding, got None"
TOO_FEW = (
    "; num_blocks is {num_blocks} (by default batch_size * ceil(max_tokens / block_size)), for {batch} sequences of up "
    "to {width} blocks: give a larger batch_size, which is prompts times beams, or num_blocks"
)
CHANGED = (
    "attention_mask must say of tokens in the cache what it said when they were written: a token cannot be hidden "
    "from, or shown to, later ones"
)


class Tables:
    """What both kinds have: sizes, and the step of the forward that is under way.

    Attributes:
        num_blocks: Blocks of the cache, of each layer.
        width: Blocks that a sequence may have.
        pending: The layer whose keys wait for their attention; None: no layer.
    """

    def __init__(self, num_blocks: int, block_size: int, max_tokens: int, backend: TorchBackend | None) -> None:
        self.num_blocks, self.block_size, self.max_tokens = num_blocks, block_size, max_tokens
        self.backend: TorchBackend | None = backend
        self.width = -(-max_tokens // block_size)
        self.pending: int | None = None
        self._steps: dict[torch.device, Step] = {}

    def step(self, device: torch.device) -> Step:
        """The step of the forward that is under way, on a device."""
        if not self._steps:
            raise UnsupportedError("layers must be called in their order, from the first on")
        if device not in self._steps:
            self._steps[device] = next(iter(self._steps.values())).to(device)
        return self._steps[device]

    def check_ended(self) -> None:
        """Raises an UnsupportedError where the forward before did not get to its end: it wrote some layers only."""
        if self._steps:
            raise UnsupportedError("the forward before this one did not get to its last layer; call cache.reset()")

    def end(self) -> None:
        """Ends a forward."""
        self._steps = {}

    def _check_batch(self, batch: int, expected: int) -> None:
        if batch != expected:
            raise ValueError(f"batch must be {expected}, as in the cache, got {batch}; cache.reset() begins anew")

    def _out_of_blocks(self, asked: int, free: int, batch: int) -> OutOfBlocks:
        error = OutOfBlocks(asked, free)
        error.hint = TOO_FEW.format(num_blocks=self.num_blocks, batch=batch, width=self.width)
        return error

    def _too_long(self) -> str:
        return f"max_tokens must be at least the tokens of each sequence, got {self.max_tokens}"


class GrowingTables(Tables):
    """Sequences take blocks as they need them, and share those that they have in common, as the beams of a search.

    The host knows each length, and waits for the mask of a padded batch once in a forward.
    """

    def __init__(self, num_blocks: int, block_size: int, max_tokens: int, backend: TorchBackend | None) -> None:
        super().__init__(num_blocks, block_size, max_tokens, backend)
        self._pool = BlockPool(num_blocks, block_size, prefix_caching=False)
        self.length = 0
        self._rows: list[list[int]] = []
        self._lengths: list[int] = []  # real tokens
        self._unbroken: list[int] = []  # of these, the last ones without padding between or after them
        self._device_tables: Tensor | None = None  # None: to be made anew

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first step."""
        return len(self._rows)

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences have; one that several share counts once."""
        return self.num_blocks - self._pool.num_free

    def prepare(self, batch: int, device: torch.device) -> None:
        """Nothing: blocks are taken when they are needed."""

    def begin(self, mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Step:
        """Takes blocks for the next tokens."""
        self.check_ended()
        self._check_batch(batch, len(self._rows) or batch)
        before, order = self._lengths or [0] * batch, None
        if mask is None:
            if any(length != self.length for length in self._lengths):
                raise UnsupportedError(PADDED)
            lengths, new = [self.length + tokens] * batch, [tokens] * batch
            unbroken = lengths
        else:
            (lengths, new, *columns) = zip(*mask[:, 0, 0].tolist(), strict=True)
            real = list(zip(*columns, strict=True))
            if any(0 in row[tokens - n :] for row, n in zip(real, new, strict=True)):
                order = mask[:, 0, 0, COUNTS:].argsort(dim=1, stable=True)
            unbroken = [
                past + tokens if 0 not in row else row[::-1].index(0)
                for past, row in zip(self._unbroken or [0] * batch, real, strict=True)
            ]
        if any(length - n != past for length, n, past in zip(lengths, new, before, strict=True)):
            raise UnsupportedError(CHANGED)
        if max(lengths) > self.max_tokens:
            raise ValueError(f"{self._too_long()}, for {max(lengths)} tokens")
        rows = self._rows or [[] for _ in range(batch)]
        pairs = self._append(rows, before, new)
        self._rows = rows
        self._lengths, self._unbroken, self.length = list(lengths), list(unbroken), self.length + tokens
        if self._device_tables is None:
            padded = [row + [-1] * (self.width - len(row)) for row in self._rows]
            self._device_tables = torch.tensor(padded, dtype=torch.int32).to(device)
        if mask is None:
            seq_lens = torch.full((batch,), self.length, dtype=torch.int32, device=device)
        else:
            seq_lens = mask[:, 0, 0, 0].contiguous()
        copied = torch.tensor(pairs, dtype=torch.int32).to(device) if pairs else None
        step = make_step(
            self._device_tables, seq_lens, mask, tokens, self.block_size, order=order, pairs=copied,
            backend=self.backend,
        )  # fmt: skip
        self._steps = {device: step}
        return step

    def crop(self, count: int) -> None:
        """Drops the last tokens of each sequence."""
        for length, unbroken in zip(self._lengths, self._unbroken, strict=True):  # all, before any is cropped
            if count > unbroken != length:
                raise UnsupportedError(f"crop must drop at most {unbroken} tokens, which follow padding, got {count}")
        for b, (row, length, unbroken) in enumerate(zip(self._rows, self._lengths, self._unbroken, strict=True)):
            self._lengths[b], self._unbroken[b] = max(0, length - count), max(0, unbroken - count)
            kept = -(-self._lengths[b] // self.block_size)
            if kept < len(row):
                self._pool.free(row[kept:])
                del row[kept:]
                self._device_tables = None
        self.length = max(0, self.length - count)

    def reorder(self, indices: Sequence[int]) -> None:
        """Has sequence i go on from what sequence indices[i] is, in the same blocks."""
        chosen = [self._rows[i] for i in indices]  # all, before any is forked
        rows = [self._pool.fork(row) for row in chosen]
        for row in self._rows:
            self._pool.free(row)
        self._rows, self._device_tables = rows, None
        self._lengths = [self._lengths[i] for i in indices]
        self._unbroken = [self._unbroken[i] for i in indices]

    def reset(self) -> None:
        """Gives all blocks back."""
        for row in self._rows:
            self._pool.free(row)
        self._rows, self._lengths, self._unbroken, self.length = [], [], [], 0
        self._device_tables, self._steps, self.pending = None, {}, None

    def _append(self, rows: list[list[int]], lengths: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
        """Blocks for new tokens, all or none; source and destination of those that are copied."""
        size, needed, writers = self.block_size, 0, Counter[int]()
        for row, length, n in zip(rows, lengths, new, strict=True):
            needed += max(0, -(-(length + n) // size) - len(row))
            if n and length % size:
                writers[row[length // size]] += 1
        held = Counter(block for row in rows for block in row[-1:])
        needed += sum(min(n, held[block] - 1) for block, n in writers.items())
        if needed > self._pool.num_free:
            raise self._out_of_blocks(needed, self._pool.num_free, len(rows))
        pairs = []
        for row, length, n in zip(rows, lengths, new, strict=True):
            before = len(row)
            copies = self._pool.append(row, length, n)
            if copies or len(row) != before:
                self._device_tables = None
            pairs += copies
        return pairs


class FixedTables(Tables):
    """Each sequence has its blocks from the first step on, and lengths live on the device: nothing waits for it.

    What cannot be checked on the host is asserted on the device. Padding is on the left only.
    """

    def __init__(self, num_blocks: int, block_size: int, max_tokens: int, backend: TorchBackend | None) -> None:
        super().__init__(num_blocks, block_size, max_tokens, backend)
        self.length: int | Tensor = 0
        self.batch = 0
        self._begun = False  # whether there are tokens: if not, another batch may come
        self._lengths = self._block_tables = torch.empty(0)

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences have."""
        return self.batch * self.width

    def prepare(self, batch: int, device: torch.device) -> None:
        """Gives each sequence its blocks, which it keeps where the batch before had as many."""
        if self._begun or self.batch == batch:
            return
        if batch * self.width > self.num_blocks:
            raise self._out_of_blocks(batch * self.width, self.num_blocks, batch)
        self.batch = batch
        blocks = torch.arange(batch * self.width, dtype=torch.int32, device=device)
        self._block_tables = blocks.view(batch, self.width)
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():
            for tensor in (self._block_tables, self._lengths, self.length):
                torch._dynamo.mark_static_address(tensor)

    def begin(self, mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Step:
        """Has all sequences grow."""
        self.check_ended()
        self.prepare(batch, device)
        self._check_batch(batch, self.batch)
        assert isinstance(self.length, Tensor)
        if mask is None:
            require((self._lengths == self.length).all(), PADDED)
            seq_lens = self._lengths + tokens
        else:
            seq_lens, new = mask[:, 0, 0, 0], mask[:, 0, 0, 1]
            rows = torch.arange(tokens, dtype=torch.int32, device=device)
            left = (mask[:, 0, 0, COUNTS:] == (rows >= tokens - new[:, None])).all()
            left = left & ((new == tokens) | (self._lengths == 0)).all()
            require(left, "attention_mask must have padding on the left only, with compileable=True")
            require((seq_lens - new == self._lengths).all(), CHANGED)
        require((seq_lens <= self.max_tokens).all(), self._too_long(), ValueError)
        self._begun = True
        self._lengths.copy_(seq_lens)
        self.length.add_(tokens)
        step = make_step(self._block_tables, seq_lens.contiguous(), mask, tokens, self.block_size, backend=self.backend)
        self._steps = {device: step}
        return step

    def crop(self, count: int) -> None:
        """Drops the last tokens of each sequence."""
        if self.batch:
            assert isinstance(self.length, Tensor)
            self.length.sub_(count).clamp_(min=0)
            self._lengths.sub_(count).clamp_(min=0)

    def reorder(self, indices: Sequence[int]) -> Tensor:
        """Has sequence i be what sequence indices[i] is; returns the blocks that are to be copied for it."""
        self._check_batch(len(indices), self.batch)
        chosen = torch.tensor(indices, device=self._lengths.device)
        self._lengths.copy_(self._lengths[chosen])
        return torch.stack((self._block_tables[chosen].flatten(), self._block_tables.flatten()), 1)

    def reset(self) -> None:
        """Empties all sequences. Memory stays where it is, for as many sequences again."""
        if self.batch:
            assert isinstance(self.length, Tensor)
            self.length.zero_()
            self._lengths.zero_()
        self._begun, self._steps, self.pending = False, {}, None
