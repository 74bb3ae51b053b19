"""relayout against the limit: a plain copy of the same bytes, in the same run.

`uv run python -m benchmarks relayout [--json FILE]`. `ratio` is the plain copy's time over the op's, 1 being the limit.
`bytes` are those of the slots that move, each read once and written once.
"""

import argparse
import time
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import torchkv
from benchmarks import report
from benchmarks.common import BLOCK_SIZE, SETS, copy_time
from benchmarks.timing import jax_time, torch_time

HEADS, HEAD_SIZE = 8, 128


class Case(NamedTuple):
    """A cache that moves into another one.

    Attributes:
        name: How it is called.
        source: What the one is, beyond its sizes.
        destination: What the other is.
        slots: Of each, all of which move.
        num_layers: Of each.
        defragment: Whether they move to slots in a random order of blocks; else each to its own number.
    """

    name: str
    source: Mapping[str, Any] = MappingProxyType({})
    destination: Mapping[str, Any] = MappingProxyType({})
    slots: int = 16384
    num_layers: int | None = None
    defragment: bool = False

    def create(self) -> tuple[torchkv.PagedKVCache, torchkv.PagedKVCache]:
        """The two caches."""
        caches = []
        for of in (self.source, self.destination):
            extents = {"block_size": BLOCK_SIZE, "num_heads": HEADS, "head_size": HEAD_SIZE, **of}
            caches.append(
                torchkv.PagedKVCache.create(
                    num_blocks=self.slots // extents["block_size"],
                    num_layers=self.num_layers,
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    **extents,
                )
            )
        for tensor in caches[0].caches:
            tensor.view(torch.uint8).random_(0, 255)
        return caches[0], caches[1]

    def pairs(self) -> torch.Tensor | None:
        """What moves where."""
        if not self.defragment:
            return None
        blocks = torch.randperm(self.slots // BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
        targets = blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        pairs = torch.stack([torch.arange(self.slots), targets.flatten()], dim=1).int()
        return pairs.cuda() if torch.cuda.is_available() else pairs


CASES = (
    Case("NHD to NHD"),
    Case("NHD to NHD, defragmented", defragment=True),
    Case("NHD to HND", destination={"layout": "HND"}),
    Case("HND to NHD", source={"layout": "HND"}),
    Case("NHD to HEAD_MAJOR", destination={"layout": "HEAD_MAJOR"}),
    Case("NHD to PALLAS, blocks of 64", destination={"layout": "PALLAS", "block_size": 64}),
    Case("32 layers, blocks of 32", destination={"block_size": 32}, slots=1024, num_layers=32),
    Case("32 layers, KV_NHD to HND", {"layout": "KV_NHD"}, {"layout": "HND"}, slots=1024, num_layers=32),
    Case("fp8", {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8", "layout": "HND"}, slots=32768),
    Case("bfloat16 to fp8", destination={"kv_cache_dtype": "fp8"}),
)


def check(source: torchkv.PagedKVCache, destination: torchkv.PagedKVCache, pairs: torch.Tensor | None) -> None:
    """Raises unless the destination holds what the source does, where bits move."""
    if source.spec.kv_cache_dtype != destination.spec.kv_cache_dtype:
        return
    every = torch.arange(source.spec.num_blocks * source.spec.block_size, device=source.caches[0].device)
    slots, targets = (every, every) if pairs is None else pairs.unbind(1)
    for layer in (None,) if source.spec.num_layers is None else (0, source.spec.num_layers - 1):
        read = zip(source.read(slots, layer=layer), destination.read(targets, layer=layer), strict=True)
        if not all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in read):
            raise ValueError("something else was moved")


def torch_seconds(case: Case) -> float:
    """Time of a call of torchkv."""
    sets, pairs = [case.create() for _ in range(SETS)], case.pairs()
    for source, destination in sets:
        source.relayout(destination, pairs)
        check(source, destination, pairs)
    return torch_time([partial(source.relayout, destination, pairs) for source, destination in sets])


def jax_seconds(case: Case, estimate: float) -> float:
    """Time of a call of jaxkv; `estimate` is about what it takes."""
    import jax.numpy as jnp

    import jaxkv

    sets, pairs = [case.create() for _ in range(SETS)], case.pairs()
    arrays = [[jnp.copy(jnp.from_dlpack(t)) for t in cache.caches] for both in sets for cache in both]
    specs = [cache.spec for cache in sets[0]]
    given = None if pairs is None else jnp.asarray(pairs.cpu().numpy())
    again = 8 if torch.cuda.is_available() else 1

    def step(memory: Any, inputs: Any) -> Any:
        sources, given = inputs
        for _ in range(again):
            for i, source in enumerate(sources):
                new = jaxkv.PagedKVCache(tuple(memory[i]), specs[1])
                memory[i] = list(jaxkv.PagedKVCache(tuple(source), specs[0]).relayout(new, given).caches)
        return memory

    return jax_time(step, arrays[1::2], (arrays[::2], given), again * SETS, estimate)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks relayout", description=__doc__)
    parser.add_argument("--cases", nargs="+", help="parts of the cases' names; default: all")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--no-jax", action="store_true", help="torch only")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="fewer slots, for a CPU")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases and not any(part in case.name for part in args.cases):
            continue
        case = case._replace(slots=max(case.slots // args.divide, 64))
        source, destination = case.create()
        row: dict[str, Any] = {"case": case.name, "slots": case.slots, "num_layers": case.num_layers, "failed": {}}
        row |= {"heads": HEADS, "head_size": HEAD_SIZE, "bytes": (source.nbytes + destination.nbytes) // 2}
        times = {"copy": copy_time(2 * row["bytes"])}
        estimate = times["copy"] if torch.cuda.is_available() else 1e-3
        calls = {"torch": partial(torch_seconds, case), "jax": partial(jax_seconds, case, estimate)}
        for name in ("torch",) if args.no_jax else ("torch", "jax"):
            try:
                times[name] = calls[name]()
            except Exception as error:  # a failure is a result: the others go on
                row["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
                print(f"        {name}: {row['failed'][name][:200]}", flush=True)
        row |= {f"{name}_us": seconds * 1e6 for name, seconds in times.items()}
        row |= {f"{name}_ratio": times["copy"] / s for name, s in times.items() if name != "copy"}
        rows.append(row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}", flush=True)
        report.save(args.json, rows, benchmark="relayout", block_size=BLOCK_SIZE)
    columns = {"case": "s", "bytes": "d", "copy_us": ".2f", "torch_us": ".2f", "jax_us": ".2f"}
    print(report.table(rows, columns | {"torch_ratio": ".3f", "jax_ratio": ".3f"}))
