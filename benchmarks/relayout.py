"""relayout against the limit: a plain copy of the same bytes, in the same run.

`uv run python -m benchmarks relayout [--json FILE]`. `ratio` is the plain copy's time over the op's, 1 being the limit.
`bytes` are those of the slots that move, each read once and written once.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import torchkv
from benchmarks import report
from benchmarks.common import BLOCK_SIZE, SETS, copy_time, parse, take_times
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
        for tensor in memory_of(caches[0]):
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.random_(0, 120)  # numbers in every format, none of which is NaN
        return caches[0], caches[1]

    def pairs(self) -> torch.Tensor | None:
        """What moves where."""
        if not self.defragment:
            return None
        blocks = torch.randperm(self.slots // BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
        targets = blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        pairs = torch.stack([torch.arange(self.slots), targets.flatten()], dim=1).int()
        return pairs.cuda() if torch.cuda.is_available() else pairs


ONE_LAYER, LAYERS = 16384, 32
FP8, INT8 = {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int8", "per_token_head": True}
NVFP4 = {"kv_cache_dtype": "nvfp4"}

CASES = (
    # the same layout
    Case("NHD to NHD"),
    Case("NHD to NHD, blocks of 64", destination={"block_size": 64}),
    Case("NHD to NHD, defragmented", defragment=True),
    Case("NHD to NHD, defragmented, many", slots=4 * ONE_LAYER, defragment=True),
    Case("32 layers, blocks of 32", destination={"block_size": 32}, slots=ONE_LAYER // 16, num_layers=LAYERS),
    # others
    Case("NHD to HND", destination={"layout": "HND"}),
    Case("HND to NHD", source={"layout": "HND"}),
    Case("NHD to PACKED_NHD", destination={"layout": "PACKED_NHD"}),
    Case("NHD to INTERLEAVED", destination={"layout": "INTERLEAVED"}),
    Case("NHD to PALLAS, blocks of 64", destination={"layout": "PALLAS", "block_size": 64}),
    Case("NHD to HEAD_MAJOR", destination={"layout": "HEAD_MAJOR"}),
    Case("HEAD_MAJOR to NHD, defragmented", source={"layout": "HEAD_MAJOR"}, defragment=True),
    Case("32 layers, KV_NHD to HND", {"layout": "KV_NHD"}, {"layout": "HND"}, slots=ONE_LAYER // 16, num_layers=LAYERS),
    # quantised, the same format
    Case("fp8, NHD to HND", FP8, FP8 | {"layout": "HND"}, slots=2 * ONE_LAYER),
    Case("int8, token head, NHD to HND", INT8, INT8 | {"layout": "HND"}, slots=2 * ONE_LAYER),
    # other formats
    Case("bf16 to fp8", destination=FP8),
    Case("bf16 to fp8, defragmented", destination=FP8, defragment=True),
    Case("32 layers, bf16 to fp8, HND", destination=FP8 | {"layout": "HND"}, slots=ONE_LAYER // 16, num_layers=LAYERS),
    Case("fp8 to bf16", FP8),
    Case("bf16 to int8, token head", destination=INT8),
    Case("int8, token head, to bf16", INT8),
    Case("bf16 to nvfp4", destination=NVFP4),
    Case("bf16 to fp8, NHD to HEAD_MAJOR", destination=FP8 | {"layout": "HEAD_MAJOR"}),
)


def memory_of(cache: Any) -> list[Any]:
    """Caches and scale caches."""
    own = cache.spec.scale_layout is not None
    return [*cache.caches, *(t for t in (cache.k_scale, cache.v_scale) if own and t is not None)]


def check(case: Case, move: Callable[[Any, Any, torch.Tensor | None], torchkv.PagedKVCache]) -> None:
    """Raises unless a destination, moved to, holds what the source does: its bits, or about its numbers."""
    source, destination = case.create()
    pairs = case.pairs()
    destination = move(source, destination, pairs)
    every = torch.arange(case.slots, device=source.caches[0].device)
    slots, targets = (every, every) if pairs is None else pairs.unbind(1)
    alike = source.spec.kv_cache_dtype == destination.spec.kv_cache_dtype
    for layer in (None,) if source.spec.num_layers is None else (0, source.spec.num_layers - 1):
        read = zip(source.read(slots, layer=layer), destination.read(targets, layer=layer), strict=True)
        for old, new in read:
            near = torch.equal(old.view(torch.int16), new.view(torch.int16))
            if not alike:  # half a step of a small number: of e4m3, of int8 where a head has 4, of e2m1 where 16 have 4
                least = {"nvfp4": 1.0, "int8": 2**-5}.get(destination.spec.kv_cache_dtype, 2**-9)
                near = bool(((old - new).abs() <= old.abs() / 16 + least).all())
            if not near:
                raise ValueError(f"{case.name}: something else was moved")


def torch_seconds(case: Case) -> float:
    """Time of a call of torchkv."""

    def move(source: Any, destination: Any, pairs: Any) -> torchkv.PagedKVCache:
        source.relayout(destination, pairs)
        return destination

    check(case, move)
    sets, pairs = [case.create() for _ in range(SETS)], case.pairs()
    return torch_time([partial(source.relayout, destination, pairs) for source, destination in sets])


def jax_seconds(case: Case, estimate: float) -> float:
    """Time of a call of jaxkv; `estimate` is about what it takes."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    def cache_of(memory: Any, spec: Any) -> jaxkv.PagedKVCache:
        count = len(spec.shapes)
        return jaxkv.PagedKVCache(tuple(memory[:count]), spec, *memory[count:])

    def arrays_of(cache: Any) -> list[Any]:
        return [jnp.copy(jnp.from_dlpack(tensor)) for tensor in memory_of(cache)]

    def call(new: Any, old: Any, given: Any) -> list[Any]:
        return memory_of(cache_of(old, specs[0]).relayout(cache_of(new, specs[1]), given))

    def move(source: Any, destination: Any, pairs: Any) -> torchkv.PagedKVCache:
        new = jax.jit(call)(arrays_of(destination), arrays_of(source), given)
        moved = [torch.from_dlpack(array).view(t.dtype) for array, t in zip(new, memory_of(destination), strict=True)]
        count = len(destination.spec.shapes)
        return torchkv.PagedKVCache(tuple(moved[:count]), destination.spec, *moved[count:])

    sets, pairs = [case.create() for _ in range(SETS)], case.pairs()
    specs = [cache.spec for cache in sets[0]]
    given = None if pairs is None else jnp.asarray(pairs.cpu().numpy())
    check(case, move)
    arrays = [[arrays_of(cache) for cache in both] for both in sets]
    again = 8 if torch.cuda.is_available() else 1

    def step(memory: Any, inputs: Any) -> Any:
        sources, given = inputs
        for _ in range(again):
            memory = [call(new, old, given) for new, old in zip(memory, sources, strict=True)]
        return memory

    memory, sources = [both[1] for both in arrays], [both[0] for both in arrays]
    return jax_time(step, memory, (sources, given), again * SETS, estimate)


def main(argv: list[str]) -> None:
    args = parse("relayout", __doc__, argv, divide="fewer slots, for a CPU")
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases and not any(part in case.name for part in args.cases):
            continue
        case = case._replace(slots=max(case.slots // args.divide, 64))
        source, destination = case.create()
        row: dict[str, Any] = {"case": case.name, "slots": case.slots, "num_layers": case.num_layers}
        row |= {"source": str(source.spec.layout), "destination": str(destination.spec.layout)}
        row |= {"heads": HEADS, "head_size": HEAD_SIZE, "bytes": (source.nbytes + destination.nbytes) // 2}
        copy = copy_time(2 * row["bytes"])
        calls = {"torch": partial(torch_seconds, case)}
        if not args.no_jax:
            calls["jax"] = partial(jax_seconds, case, copy if torch.cuda.is_available() else 1e-3)
        take_times(row, copy, calls)
        row["copy_tb_s"] = 2 * row["bytes"] / copy / 1e12
        rows.append(row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}", flush=True)
        report.save(args.json, rows, benchmark="relayout", block_size=BLOCK_SIZE)
    columns = {"case": "s", "bytes": "d", "copy_tb_s": ".2f", "copy_us": ".2f", "torch_us": ".2f", "jax_us": ".2f"}
    print(report.table(rows, columns | {"torch_ratio": ".3f", "jax_ratio": ".3f"}))
