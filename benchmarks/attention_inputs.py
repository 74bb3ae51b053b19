"""What the attention benchmark computes: cases, and their caches, queries, block tables and right answers."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kvcore.layout import Address, CacheLayout

BLOCK_SIZE = 16
SCALES = (0.5, 0.25)  # of quantised keys and values
L2_BYTES = 2**28  # what has to lie between two uses of a block, for it to come from memory and not from the L2 cache


@dataclass(frozen=True)
class Case:
    """Sequences of one length; all have one query token, but for the first where `queries` says so."""

    name: str
    batch: int
    context: int
    layout: str = "NHD"
    queries: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    head_size_v: int = 128
    kv_cache_dtype: str = "auto"
    sliding_window: int | None = None
    soft_cap: float | None = None
    peers: tuple[str, ...] = ()
    series: bool = False  # whether it is a point of the plot

    @property
    def tokens(self) -> int:
        return self.queries + self.batch - 1

    @property
    def size(self) -> str:
        return f"{self.batch}x{self.context}"

    @property
    def read(self) -> int:
        """Bytes of K and V that are seen, counted once."""
        positions = self.batch * min(self.context, self.sliding_window or self.context)
        values = 0 if self.layout == "MLA" else self.head_size_v
        return positions * self.kv_heads * (self.head_size + values) * (2 if self.kv_cache_dtype == "auto" else 1)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of what the causal mask leaves."""
        seen = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) // 2
        seen += (self.batch - 1) * self.context
        return 2 * self.q_heads * (self.head_size + self.head_size_v) * seen

    def divided(self, by: int) -> "Case":
        """A smaller case, for a CPU."""
        if by == 1:
            return self

        def blocks(positions: int) -> int:
            return max(2 * BLOCK_SIZE, positions // by // BLOCK_SIZE * BLOCK_SIZE)

        return replace(
            self,
            batch=max(min(self.batch, 2), self.batch // by),
            context=blocks(self.context),
            queries=blocks(self.queries) // 2 if self.queries > 1 else 1,
            sliding_window=None if self.sliding_window is None else blocks(self.sliding_window) // 2,
        )


class Inputs:
    """Caches of random numbers, and sets of queries and block tables that take turns, on the device that torch has."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.layout = CacheLayout.of(case.layout)
        blocks = case.batch * case.context // BLOCK_SIZE
        sets = 1
        if case.queries == 1 and self.device == "cuda":
            sets = min(8, math.ceil(L2_BYTES / case.read))
        self.num_blocks = sets * blocks
        shapes = self.layout.shapes(
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_heads=case.kv_heads,
            head_size=case.head_size,
            head_size_v=case.head_size_v,
        )
        self.scales: tuple[torch.Tensor | None, ...] = (None, None)
        self.caches = [self._random(shape) for shape in shapes]
        if case.kv_cache_dtype != "auto":
            self.scales = tuple(torch.tensor([s], device=self.device) for s in SCALES)
            halves = zip(self.caches, SCALES, strict=True)
            self.caches = [(c / scale).to(torch.float8_e4m3fn).view(torch.uint8) for c, scale in halves]
        order = torch.randperm(self.num_blocks, device=self.device, generator=self.generator)
        self.tables = list(order.int().view(sets, case.batch, -1))
        self.queries = [self._random((case.tokens, case.q_heads, case.head_size)) for _ in range(sets)]
        self.seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=self.device)
        starts = [0, *range(case.queries, case.tokens + 1)]
        self.query_starts = torch.tensor(starts, dtype=torch.int32, device=self.device) if case.queries > 1 else None

    @property
    def sets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of query and block_tables."""
        return list(zip(self.queries, self.tables, strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `paged_attention` that are no arrays, alike in both frameworks."""
        return {
            "sliding_window": self.case.sliding_window,
            "soft_cap": self.case.soft_cap,
            "kv_cache_dtype": self.case.kv_cache_dtype,
            "layout": self.layout,
            "head_size_v": self.case.head_size_v if self.layout.latent else None,
        }

    @property
    def checked(self) -> list[int]:
        """Query tokens whose results are checked: the first and last of the long sequence, and the last of all."""
        return sorted({0, self.case.queries - 1, self.case.tokens - 1})

    @cached_property
    def expected(self) -> torch.Tensor:
        """What `checked` tokens of the first set should give: float32 `[tokens, heads, head_size_v]`."""
        return torch.stack([self._attend(token) for token in self.checked])

    def error(self, out: torch.Tensor) -> float:
        """The largest difference to what is expected, relative to the largest element, over the checked tokens."""
        got = out[self.checked].to(self.expected)
        return ((got - self.expected).abs().max() / self.expected.abs().max()).item()

    def _attend(self, token: int) -> torch.Tensor:
        case = self.case
        long = token < case.queries
        table = self.tables[0][0 if long else token - case.queries + 1].long()
        last = case.context - case.queries + token if long else case.context - 1
        first = max(0, last + 1 - case.sliding_window) if case.sliding_window else 0
        position = torch.arange(first, last + 1, device=self.device)
        slots = table[position // BLOCK_SIZE], position % BLOCK_SIZE
        key, value = (view[slots] for view in self._views())
        if case.kv_cache_dtype != "auto":
            key, value = (x.view(torch.float8_e4m3fn).float() * s for x, s in zip((key, value), SCALES, strict=True))
        query = self.queries[0][token].float().view(case.kv_heads, -1, case.head_size)
        scores = torch.einsum("hgd,nhd->hgn", query, key.float()) * case.head_size**-0.5
        if case.soft_cap is not None:
            scores = torch.tanh(scores / case.soft_cap) * case.soft_cap
        out = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), value.float())
        return out.reshape(case.q_heads, case.head_size_v)

    def _views(self) -> list[torch.Tensor]:
        """K and V as `[block, slot, head, dim]`, whatever the layout."""
        case = self.case
        place = self.layout.place(
            [c.shape for c in self.caches], head_size=case.head_size, head_size_v=case.head_size_v
        )

        def view(cache: torch.Tensor, at: Address, size: int) -> torch.Tensor:
            shape = (self.num_blocks, BLOCK_SIZE, case.kv_heads, size)
            return cache.as_strided(shape, (at.block, at.slot, at.head, at.dim), at.offset)

        key = view(self.caches[0], place.key, case.head_size)
        return [key, view(self.caches[-1], place.value, case.head_size_v)]

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=self.generator)
