"""Copies and zeros of whole blocks against the limit: a plain copy, or fill, of the same bytes, in the same run.

`uv run python -m benchmarks blocks [--json FILE]`. Columns: `ratio` is the plain copy's time over the op's, 1 being the
limit. `bytes` are those of the blocks that are copied; the copy reads and writes as many, the fill writes them.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import torchkv
from benchmarks import report
from benchmarks.common import BLOCK_SIZE, SETS, copy_time, parse, take_times
from benchmarks.timing import jax_time, torch_time

HEADS, HEAD_SIZE = 8, 128


class Case(NamedTuple):
    """A call: how many blocks of which cache are copied, or filled with zeros.

    Attributes:
        name: How it is called.
        n: Pairs, or blocks.
        num_layers: Of the cache; None for one layer without an axis.
        layout: Its name.
        kv_cache_dtype: "auto" is bfloat16.
        per_token_head: Whether there are scale caches.
        how: "apart": no pair writes what another reads; "chain": each block moves on by one; "swap": two blocks each
            take each other's place; "zero": blocks are filled.
    """

    name: str
    n: int
    num_layers: int | None = None
    layout: str = "NHD"
    kv_cache_dtype: Any = "auto"
    per_token_head: bool = False
    how: str = "apart"

    def create(self) -> torchkv.PagedKVCache:
        """A cache with blocks for as many calls as take turns."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torchkv.PagedKVCache.create(
            num_blocks=SETS * (2 * self.n + 1), block_size=BLOCK_SIZE, num_heads=HEADS, head_size=HEAD_SIZE,
            num_layers=self.num_layers, layout=self.layout, kv_cache_dtype=self.kv_cache_dtype,
            per_token_head=self.per_token_head, device=device,
        )  # fmt: skip

    def indices(self, turn: int) -> np.ndarray:
        """Pairs or blocks of a call, in an order as they come, among blocks that are this turn's alone."""
        rng, first = np.random.default_rng(turn), turn * (2 * self.n + 1)
        blocks = first + rng.permutation(2 * self.n + 1)
        if self.how == "zero":
            return blocks[: self.n].astype(np.int32)
        sources, targets = blocks[: self.n], blocks[self.n : 2 * self.n]
        if self.how == "chain":
            targets = blocks[1 : self.n + 1]
        elif self.how == "swap":
            targets = sources.reshape(-1, 2)[:, ::-1].ravel()
        return rng.permutation(np.stack([sources, targets], axis=1)).astype(np.int32)


CASES = (
    Case("1 layer", 1024),
    Case("1 layer, few", 64),
    Case("1 layer, many", 4096),
    *(Case(f"1 layer, {layout}", 1024, layout=layout) for layout in ("HND", "HEAD_MAJOR", "PALLAS", "KV_NHD")),
    Case("32 layers", 64, num_layers=32),
    Case("32 layers, one pair", 1, num_layers=32),
    Case("32 layers, int8, token head", 64, num_layers=32, kv_cache_dtype="int8", per_token_head=True),
    Case("32 layers, nvfp4", 64, num_layers=32, kv_cache_dtype="nvfp4"),
    Case("1 layer, swap", 1024, how="swap"),
    Case("32 layers, swap", 64, num_layers=32, how="swap"),
    Case("1 layer, chain", 1024, how="chain"),
    Case("32 layers, chain", 64, num_layers=32, how="chain"),
    Case("1 layer, zero", 1024, how="zero"),
    Case("32 layers, zero", 64, num_layers=32, how="zero"),
)


def fill_time(nbytes: int) -> float:
    """Time of a plain fill of so many bytes, on torch's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SETS)]
    return torch_time([buffer.zero_ for buffer in buffers])


def memory_of(cache: torchkv.PagedKVCache) -> list[torch.Tensor]:
    """Caches and scale caches."""
    own = cache.spec.scale_layout is not None
    return [*cache.caches, *(t for t in (cache.k_scale, cache.v_scale) if own and t is not None)]


def moved(case: Case) -> int:
    """Bytes of the blocks that a call writes."""
    return case.n * case._replace(n=1).create().nbytes // (3 * SETS)


def check(case: Case, cache: torchkv.PagedKVCache, step: Callable[[], list[torch.Tensor]]) -> None:
    """Raises unless a step does what torch's own indexing does, in the first and the last array."""
    axes = [names.index(("block",)) for names in cache.spec.layout.arrays]
    tensors = list(cache.caches)
    for tensor in memory_of(cache):
        tensor.view(torch.uint8).random_(0, 255)
    wanted, indices = [tensor.view(torch.uint8).clone() for tensor in tensors], case.indices(0).astype(np.int64)
    for tensor, axis in zip(wanted, axes, strict=True):
        blocks = tensor.movedim(axis, 0)
        index = torch.from_numpy(indices).to(tensor.device)
        if case.how == "zero":
            blocks[index] = 0
        else:
            blocks[index[:, 1]] = blocks[index[:, 0]]
    for got, want in zip(step(), wanted, strict=False):
        if not torch.equal(got.view(torch.uint8), want):
            raise ValueError(f"{case.name}: something else was copied")


def torch_seconds(case: Case) -> float:
    """Time of a call of torchkv."""
    cache = case.create()
    move = cache.zero_blocks if case.how == "zero" else cache.copy_blocks
    indices = [torch.from_numpy(case.indices(turn)).to(cache.caches[0].device) for turn in range(SETS)]

    def step() -> list[torch.Tensor]:
        move(indices[0])
        return list(cache.caches)

    check(case, cache, step)
    return torch_time([partial(move, each) for each in indices])


def jax_seconds(case: Case, estimate: float) -> float:
    """Time of a call of jaxkv; `estimate` is about what it takes."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    cache = case.create()
    options = {"layout": cache.spec.layout, "scale_layout": cache.spec.scale_layout}
    op = jaxkv.zero_blocks if case.how == "zero" else jaxkv.copy_blocks
    indices = [jnp.asarray(case.indices(turn)) for turn in range(SETS)]

    def call(memory: Any, index: Any) -> Any:
        return op(memory, index, **options)

    def first() -> list[torch.Tensor]:
        new = jax.jit(call)([jnp.from_dlpack(tensor) for tensor in memory_of(cache)], indices[0])
        return [torch.from_dlpack(array) for array in new]  # not donated: the tensors stay as they were

    check(case, cache, first)
    memory = [jnp.copy(jnp.from_dlpack(tensor)) for tensor in memory_of(cache)]
    again = 8 if torch.cuda.is_available() else 1

    def step(memory: Any, given: Any) -> Any:
        for _ in range(again):
            for index in given:
                memory = list(call(memory, index))
        return memory

    return jax_time(step, memory, indices, again * SETS, estimate)


def main(argv: list[str]) -> None:
    args = parse("blocks", __doc__, argv, divide="fewer pairs, for a CPU")
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases and not any(part in case.name for part in args.cases):
            continue
        case = case._replace(n=max(case.n // args.divide, 1 if case.how != "swap" else 2))
        row: dict[str, Any] = {"case": case.name, "n": case.n, "num_layers": case.num_layers, "layout": case.layout}
        row |= {"kv_cache_dtype": case.kv_cache_dtype, "per_token_head": case.per_token_head, "how": case.how}
        row |= {"heads": HEADS, "head_size": HEAD_SIZE, "bytes": moved(case)}
        copy = fill_time(row["bytes"]) if case.how == "zero" else copy_time(2 * row["bytes"])
        calls = {"torch": partial(torch_seconds, case)}
        if not args.no_jax:
            calls["jax"] = partial(jax_seconds, case, copy if torch.cuda.is_available() else 1e-3)
        take_times(row, copy, calls)
        row["copy_tb_s"] = row["bytes"] * (1 if case.how == "zero" else 2) / copy / 1e12
        rows.append(row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}", flush=True)
        report.save(args.json, rows, benchmark="blocks", block_size=BLOCK_SIZE)
    columns = {"case": "s", "bytes": "d", "copy_tb_s": ".2f", "copy_us": ".2f", "torch_us": ".2f", "jax_us": ".2f"}
    print(report.table(rows, columns | {"torch_ratio": ".3f", "jax_ratio": ".3f"}))
