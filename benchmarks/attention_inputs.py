"""What the attention benchmark computes: cases, and their caches, queries, block tables and right answers."""

import functools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch

import torchkv
from benchmarks.common import BLOCK_SIZE
from kvcore.cache_spec import CacheSpec
from kvcore.choices import ScaledDtype

L2_BYTES = 2**28  # what has to lie between two uses of a block, for it to come from memory and not from the L2 cache
TOLERANCE = 2**-7  # of the largest element of the result


@dataclass(frozen=True)
class Case:
    """Sequences of one length, each with one query token, but for the first `long`, which have `queries`."""

    name: str
    batch: int
    context: int
    layout: str = "NHD"
    queries: int = 1
    long: int = 1
    block_size: int = BLOCK_SIZE
    causal: bool = True
    q_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    head_size_v: int = 128
    kv_cache_dtype: str = "auto"
    per_token_head: bool = False  # whether each token's head has a scale of its own
    sliding_window: int | None = None
    soft_cap: float | None = None
    peers: tuple[str, ...] = ()
    series: bool = False  # whether it is a point of the plot

    @property
    def tokens(self) -> int:
        return self.long * self.queries + self.batch - self.long

    @property
    def size(self) -> str:
        return f"{self.batch}x{self.context}"

    @property
    def cache(self) -> dict[str, Any]:
        """What a cache for it is, but for its length."""
        return {
            "block_size": self.block_size,
            "num_heads": self.kv_heads,
            "head_size": self.head_size,
            "num_layers": None,
            "head_size_v": self.head_size_v,
            "layout": self.layout,
            "kv_cache_dtype": self.kv_cache_dtype,
            "per_token_head": self.per_token_head,
        }

    @property
    def read(self) -> int:
        """Bytes of K and V that are seen, with their scales, counted once."""
        positions = self.batch * min(self.context, self.sliding_window or self.context)
        return positions * CacheSpec.create(num_blocks=1, dtype="bfloat16", **self.cache).nbytes // self.block_size

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of what the masks leave."""
        window = self.sliding_window or self.context
        before = self.context - self.queries
        seen = sum(min(before + i + 1 if self.causal else self.context, window) for i in range(self.queries))
        seen = self.long * seen + (self.batch - self.long) * min(self.context, window)
        return 2 * self.q_heads * (self.head_size + self.head_size_v) * seen

    def divided(self, by: int) -> "Case":
        """A smaller case, for a CPU."""
        if by == 1:
            return self

        def blocks(positions: int) -> int:
            return max(2 * self.block_size, positions // by // self.block_size * self.block_size)

        batch, queries = max(min(self.batch, 2), self.batch // by), self.queries
        if queries >= self.block_size:
            queries = blocks(queries) // (1 if queries == self.context else 2)
        return replace(
            self,
            batch=batch,
            context=blocks(self.context),
            queries=queries,
            long=min(self.long, batch),
            sliding_window=None if self.sliding_window is None else blocks(self.sliding_window) // 2,
        )


class Inputs:
    """A cache of random numbers, and sets of queries and block tables that take turns, on the device that torch has."""

    def __init__(self, case: Case, sets: int | None = None) -> None:
        self.case = case
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(0)
        if sets is None:
            several = case.queries < BLOCK_SIZE and self.device == "cuda"
            sets = min(8, math.ceil(L2_BYTES / case.read)) if several else 1
        self.num_blocks = sets * case.batch * case.context // case.block_size
        self.cache = self._cache()
        self.layout, self.caches = self.cache.spec.layout, list(self.cache.caches)
        self.scales = (self.cache.k_scale, self.cache.v_scale)
        order = torch.randperm(self.num_blocks, device=self.device, generator=self.generator)
        self.tables = list(order.int().view(sets, case.batch, -1))
        self.queries = [self._random((case.tokens, case.q_heads, case.head_size)) for _ in range(sets)]
        self.seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=self.device)
        ends = range(case.long * case.queries, case.tokens + 1)
        starts = [*range(0, case.long * case.queries, case.queries), *ends]
        self.query_starts = torch.tensor(starts, dtype=torch.int32, device=self.device) if case.queries > 1 else None

    @property
    def sets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of query and block_tables."""
        return list(zip(self.queries, self.tables, strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `paged_attention` that are no arrays, alike in both frameworks."""
        case = self.case
        own = {"causal": case.causal, "sliding_window": case.sliding_window, "soft_cap": case.soft_cap}
        return own | self.cache.spec.reading

    @property
    def checked(self) -> list[int]:
        """Query tokens whose results are checked: the first and last of the first sequence, and the last of all."""
        return sorted({0, self.case.queries - 1, self.case.tokens - 1})

    @cached_property
    def expected(self) -> torch.Tensor:
        """What `checked` tokens of the first set should give: float32 `[tokens, heads, head_size_v]`."""
        return torch.stack([self._attend(token) for token in self.checked])

    def error(self, out: torch.Tensor) -> float:
        """The largest difference to what is expected, relative to the largest element, over the checked tokens."""
        got = out[self.checked].to(self.expected)
        return ((got - self.expected).abs().max() / self.expected.abs().max()).item()

    def gathered(self, sequence: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a sequence in the first set, `[position, head, dim]`, by torch's own operations."""
        tables, seq_lens = (x[sequence : sequence + 1] for x in (self.tables[0], self.seq_lens))
        key, value = self.cache.gather(tables, seq_lens, self.case.context, dtype=dtype, backend="torch")
        return key[0], value[0]

    def _attend(self, token: int) -> torch.Tensor:
        case = self.case
        sequence, index = divmod(token, case.queries)
        if sequence >= case.long:
            sequence, index = token - case.long * (case.queries - 1), case.queries - 1
        last = case.context - case.queries + index if case.causal else case.context - 1
        first = max(0, last + 1 - case.sliding_window) if case.sliding_window else 0
        key, value = (x[first : last + 1] for x in self.gathered(sequence, torch.float32))
        query = self.queries[0][token].float().view(case.kv_heads, -1, case.head_size)
        scores = torch.einsum("hgd,nhd->hgn", query, key) * case.head_size**-0.5
        if case.soft_cap is not None:
            scores = torch.tanh(scores / case.soft_cap) * case.soft_cap
        out = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), value)
        return out.reshape(case.q_heads, case.head_size_v)

    def _cache(self) -> torchkv.PagedKVCache:
        case = self.case
        create = functools.partial(
            torchkv.PagedKVCache.create, num_blocks=self.num_blocks, device=self.device, **case.cache
        )
        if case.kv_cache_dtype == "auto":
            cache = create()
            for array in cache.caches:
                array.normal_(generator=self.generator)
            return cache
        tokens = self.num_blocks * case.block_size
        if case.layout == "MLA":
            rows = [self._random((tokens, size)) for size in (case.head_size_v, case.head_size - case.head_size_v)]
        else:
            rows = [self._random((tokens, case.kv_heads, size)) for size in (case.head_size, case.head_size_v)]
        scales = (None, None)
        if not case.per_token_head and case.kv_cache_dtype != "fp8_ds_mla":
            scales = torchkv.kv_scales(rows[0], rows[1], cast("ScaledDtype", case.kv_cache_dtype))
        cache = create(k_scale=scales[0], v_scale=scales[1])
        cache.write(rows[0], rows[1], torch.arange(tokens, device=self.device))
        return cache

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=self.generator)
