"""Batches in FlashInfer's pages, and attention of one row at a time."""

import math

import torch

HEADS, GROUP, DIM, PAGE, PAGES = 2, 2, 16, 4, 24
LENS = (5, 0, 9, 4, 12)
CPU = torch.empty(0)


class Batch:
    """Pages of some sequences, NaN wherever nothing is, and what lies in them."""

    def __init__(self, lens=LENS, dtype=torch.float32, kv_layout="NHD", head_size_v=DIM, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.lens, self.kv_layout = lens, kv_layout
        pages = torch.randperm(PAGES, generator=self.generator).int().tolist()
        self.tables = [[pages.pop() for _ in range(-(-n // PAGE))] for n in lens]
        counts = [0, *(len(table) for table in self.tables)]
        self.indptr = torch.tensor(counts).cumsum(0).int()
        self.indices = torch.tensor([page for table in self.tables for page in table], dtype=torch.int32)
        self.last = torch.tensor([(n - 1) % PAGE + 1 if n else 0 for n in lens], dtype=torch.int32)
        self.key = torch.full((PAGES, PAGE, HEADS, DIM), math.nan)
        self.value = torch.full((PAGES, PAGE, HEADS, head_size_v), math.nan)
        for table, n in zip(self.tables, lens, strict=True):
            for i in range(n):
                self.key[table[i // PAGE], i % PAGE] = self.random(HEADS, DIM)
                self.value[table[i // PAGE], i % PAGE] = self.random(HEADS, head_size_v)
        self.key, self.value = self.key.to(dtype), self.value.to(dtype)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    @property
    def pages(self):
        return self.indptr, self.indices, self.last

    @property
    def sizes(self):
        return HEADS * GROUP, HEADS, DIM, PAGE

    @property
    def caches(self):
        if self.kv_layout == "NHD":
            return self.key, self.value
        return self.key.transpose(1, 2).contiguous(), self.value.transpose(1, 2).contiguous()

    def row(self, q, sequence, last, first=0, scale=DIM**-0.5, cap=None, sinks=None):
        """Attention of one row, in float64, and its log-sum-exp to base 2."""
        at = [(self.tables[sequence][i // PAGE], i % PAGE) for i in range(max(first, 0), last)]
        if not at:
            return torch.zeros(len(q), self.value.shape[-1]).double(), torch.full((len(q),), -math.inf).double()
        key, value = (
            torch.stack([x[i] for i in at]).double().repeat_interleave(GROUP, 1) for x in (self.key, self.value)
        )
        logits = torch.einsum("hd,khd->hk", q.double(), key) * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        lse = (logits if sinks is None else torch.cat([logits, sinks[:, None].double()], 1)).logsumexp(1)
        return torch.einsum("hk,khd->hd", (logits - lse[:, None]).exp(), value), lse / math.log(2)


def wanted(batch, q, starts, causal=True, window=None, **options):
    out, lse = [], []
    for s, n in enumerate(batch.lens):
        rows = starts[s + 1] - starts[s]
        for i in range(rows):
            last = n - rows + i + 1 if causal else n
            found = batch.row(q[starts[s] + i], s, last, 0 if window is None else last - window, **options)
            out.append(found[0])
            lse.append(found[1])
    return torch.stack(out), torch.stack(lse)


def close(got, want, tolerance=1e-4):
    for x, y in zip(got, want, strict=True):
        assert not x.isnan().any()
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
