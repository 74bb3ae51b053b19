"""Blocks swapped to pinned memory of the host and back, against one plain copy of the same bytes, in the same run.

`uv run python -m benchmarks swap [--json FILE]`. Columns: `ratio` is the plain copy's time over the op's, 1 being the
limit; the plain copy is one `copy_` between a tensor on the device and one in pinned memory, in the same direction.
`gb_s` are the bytes of the blocks that are copied, over the time.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import torchkv
from benchmarks import report
from benchmarks.blocks import memory_of
from benchmarks.common import BLOCK_SIZE, SETS, parse, take_times
from benchmarks.timing import jax_time, torch_time

HEADS, HEAD_SIZE = 8, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """A call: how many blocks of which cache are swapped.

    Attributes:
        name: How it is called.
        n: Pairs.
        num_layers: Of the cache; None for one layer without an axis.
        layout: Its name.
        kv_cache_dtype: "auto" is bfloat16.
        per_token_head: Whether there are scale caches.
        adjacent: Whether blocks lie side by side, in order, on both sides; else they are scattered.
        out: Whether they go to the host; else they come from there.
    """

    name: str
    n: int
    num_layers: int | None = None
    layout: str = "NHD"
    kv_cache_dtype: Any = "auto"
    per_token_head: bool = False
    adjacent: bool = False
    out: bool = True

    def create(self) -> tuple[torchkv.PagedKVCache, torchkv.PagedKVCache]:
        """A cache and one in the host's memory, with blocks for as many calls as take turns: source, destination."""
        cache = torchkv.PagedKVCache.create(
            num_blocks=SETS * self.n, block_size=BLOCK_SIZE, num_heads=HEADS, head_size=HEAD_SIZE,
            num_layers=self.num_layers, layout=self.layout, kv_cache_dtype=self.kv_cache_dtype,
            per_token_head=self.per_token_head, device=DEVICE,
        )  # fmt: skip
        host = cache.create_host(num_blocks=SETS * self.n)
        return (cache, host) if self.out else (host, cache)

    def pairs(self, turn: int) -> np.ndarray:
        """Pairs of a call, among blocks that are this turn's alone."""
        rng, blocks = np.random.default_rng(turn), turn * self.n + np.arange(self.n)
        sides = [blocks, blocks] if self.adjacent else [rng.permutation(blocks), rng.permutation(blocks)]
        return np.stack(sides, axis=1).astype(np.int32)


KINDS = (  # of 32 MiB and less: pinned memory is slow to allocate
    Case("32 layers", 16, num_layers=32),
    Case("32 layers, adjacent", 16, num_layers=32, adjacent=True),
    Case("32 layers, one pair", 1, num_layers=32),
    Case("32 layers, blocks in front", 16, num_layers=32, layout="block layer slot head dim"),
    Case("32 layers, HEAD_MAJOR", 16, num_layers=32, layout="HEAD_MAJOR"),
    Case("32 layers, int8, token head", 32, num_layers=32, kv_cache_dtype="int8", per_token_head=True),
    Case("1 layer", 512),
    Case("1 layer, adjacent", 512, adjacent=True),
)
CASES = tuple(
    kind._replace(name=f"{kind.name}, {way}", out=way == "to the host")
    for kind in KINDS
    for way in ("to the host", "from the host")
)


def copy_seconds(nbytes: int, out: bool) -> float:
    """Time of one plain copy of so many bytes between torch's device and pinned memory."""
    pinned = torch.cuda.is_available()
    here = [torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(SETS)]
    there = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(SETS)]
    both = zip(there, here, strict=True) if out else zip(here, there, strict=True)
    return torch_time([partial(new.copy_, old, non_blocking=True) for new, old in both])


def moved(case: Case) -> int:
    """Bytes of the blocks that a call copies."""
    return case._replace(n=1).create()[0].nbytes * case.n // SETS


def fill(cache: torchkv.PagedKVCache) -> None:
    """Random bytes, made on the device: it is the faster one."""
    for tensor in memory_of(cache):
        tensor.view(torch.uint8).copy_(
            torch.randint(0, 255, tensor.view(torch.uint8).shape, dtype=torch.uint8, device=DEVICE)
        )


def check(case: Case, source: torchkv.PagedKVCache, destination: list[torch.Tensor]) -> None:
    """Raises unless the first call's blocks are where they belong, in the first and the last array of the caches."""
    pairs = torch.from_numpy(case.pairs(0).astype(np.int64))
    axes = [names.index(("block",)) for names in source.spec.layout.arrays]
    for old, new, axis in zip(source.caches, destination, axes, strict=False):
        wanted = old.cpu().view(torch.uint8).movedim(axis, 0)[pairs[:, 0]]
        if not torch.equal(new.cpu().view(torch.uint8).movedim(axis, 0)[pairs[:, 1]], wanted):
            raise ValueError(f"{case.name}: something else was copied")


def torch_seconds(case: Case) -> float:
    """Time of a call of torchkv."""
    source, destination = case.create()
    fill(source)
    every = [torch.from_numpy(case.pairs(turn)).to(DEVICE) for turn in range(SETS)]
    source.swap_blocks(destination, every[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    check(case, source, list(destination.caches))
    return torch_time([partial(source.swap_blocks, destination, pairs) for pairs in every])


def jax_seconds(case: Case, estimate: float) -> float:
    """Time of a call of jaxkv; `estimate` is about what it takes."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    source, destination = case.create()
    options = {"layout": source.spec.layout, "scale_layout": source.spec.scale_layout}
    fill(source)
    device = jax.devices()[0]
    sides = []
    for cache, on_host in ((source, not case.out), (destination, case.out)):
        place = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host" if on_host else "device")
        arrays = [jnp.from_dlpack(tensor.to(DEVICE)) for tensor in memory_of(cache)]
        sides.append([jax.device_put(array, place) for array in arrays])
    old, memory = sides
    every = [jnp.asarray(case.pairs(turn)) for turn in range(SETS)]

    def call(memory: Any, inputs: Any) -> Any:
        old, given = inputs  # an argument of the program: as a constant, it would be in the device's memory
        for pairs in given:
            memory = list(jaxkv.swap_blocks(old, memory, pairs, **options))
        return memory

    new = jax.jit(call)(memory, (old, every[:1]))
    check(case, source, [_as_torch(array, like) for array, like in zip(new, memory_of(source), strict=True)])
    del new
    return jax_time(call, memory, (old, every), SETS, estimate)


def _as_torch(array: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array).view(np.uint8).copy()).view(like.dtype)


def main(argv: list[str]) -> None:
    args = parse("swap", __doc__, argv, divide="fewer pairs, for a CPU")
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases and not any(part in case.name for part in args.cases):
            continue
        case = case._replace(n=max(case.n // args.divide, 1))
        row: dict[str, Any] = {"case": case.name, "n": case.n, "num_layers": case.num_layers, "layout": case.layout}
        row |= {"kv_cache_dtype": case.kv_cache_dtype, "per_token_head": case.per_token_head}
        row |= {"adjacent": case.adjacent, "to_host": case.out, "heads": HEADS, "head_size": HEAD_SIZE}
        row["bytes"] = moved(case)
        copy = copy_seconds(row["bytes"], case.out)
        calls = {"torch": partial(torch_seconds, case)}
        if not args.no_jax:
            calls["jax"] = partial(jax_seconds, case, copy if torch.cuda.is_available() else 1e-3)
        take_times(row, copy, calls)
        row |= {
            f"{name}_gb_s": row["bytes"] / row[f"{name}_us"] / 1e3 for name in ("copy", *calls) if f"{name}_us" in row
        }
        rows.append(row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}", flush=True)
        report.save(args.json, rows, benchmark="swap", block_size=BLOCK_SIZE)
    columns = {"case": "s", "bytes": "d", "copy_gb_s": ".1f", "torch_gb_s": ".1f", "jax_gb_s": ".1f"}
    print(report.table(rows, columns | {"torch_ratio": ".3f", "jax_ratio": ".3f"}))
